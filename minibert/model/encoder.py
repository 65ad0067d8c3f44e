"""The encoder of BERT (Devlin et al. 2019, arXiv:1810.04805): token ids to hidden states.

Reading order: ``Bert.forward``, ``EncoderLayer.forward``, ``SelfAttention.forward``; then
attention.py for ``attend`` and heads.py for what follows the encoder.

Sums, products and random draws happen in the order of transformers, so that in one process on one
machine both give the same bits: outputs, gradients and dropout masks. Where an order looks
arbitrary, that is why. Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model.attention import AttentionFn, eager, sdpa
from minibert.model.config import FAMILIES, BertConfig
from minibert.model.layout import Layout

AddNormFn = Callable[[Tensor, Tensor, nn.LayerNorm, nn.Dropout], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


def add_norm(y_ND: Tensor, x_ND: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
    """LayerNorm(dropout(y) + x), what follows attention and feed-forward: (N, D) to (N, D)."""
    return norm(dropout(y_ND) + x_ND)


class Implementation(NamedTuple):
    """The two operations of a layer that have more than one version."""

    attend: AttentionFn
    add_norm: AddNormFn


# By the name that ``attn_implementation`` takes. A faster version registers itself here.
IMPLEMENTATIONS = {
    "eager": Implementation(eager, add_norm),
    "sdpa": Implementation(sdpa, add_norm),
}


def implementation(name: str) -> Implementation:
    """The implementation of that name, a ValueError if there is none."""
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attn_implementation={name!r} is not registered: choose one of {known}")
    return IMPLEMENTATIONS[name]


def initial(name: str, shape: tuple[int, ...], dtype: torch.dtype, std: float) -> Tensor:
    """A new parameter by BERT's rule: norms 1, biases 0, everything else from N(0, std²)."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if "norm." in name:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0.0, std)


@torch.no_grad()
def initialise(module: nn.Module, std: float) -> None:
    """Initialise the parameters of ``module`` in their order, by BERT's rule."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial(name, tuple(parameter.shape), parameter.dtype, std))


class Embeddings(nn.Module):
    """Word + segment + position, normalised (Devlin et al. 2019, section 3, figure 2).

    ``FAMILIES`` has the order of RoBERTa and ERNIE, which may add a table of tasks.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        D, pad, tasks = config.hidden_size, config.pad_token_id, config.task_type_vocab_size
        family = FAMILIES[config.model_type]
        self.word = nn.Embedding(config.vocab_size, D, pad)
        positions = config.max_position_embeddings
        self.position = nn.Embedding(positions, D, pad if family.counts else None)
        self.segment = nn.Embedding(config.type_vocab_size, D)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        for name in family.embeddings:  # transformers' order
            self.add_module(name, self._modules.pop(name))
        self.task = nn.Embedding(tasks, D) if tasks else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_N: Tensor, segment_N: Tensor, layout: Layout) -> Tensor:
        """Ids (N,) and segments (N,), both int64, to x (N, D)."""
        # (word + segment) + position: any other order changes the result by 1e-6.
        x_ND = self.word(input_N) + self.segment(segment_N)
        x_ND = x_ND + self.positions(input_N, layout)
        if self.task is not None:
            x_ND = x_ND + self.task(input_N * 0)
        return self.dropout(self.norm(x_ND))

    def positions(self, input_N: Tensor, layout: Layout) -> Tensor:
        """The position of every token, (N, D)."""
        pad = self.position.padding_idx
        if pad is None:
            return layout.spread_positions(self.position.weight)
        # RoBERTa counts the ids that are not padding, whatever the mask says.
        real_N = (input_N != pad).long()
        return self.position(layout.count(real_N) * real_N + pad)


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: BertConfig, attend: AttentionFn):
        super().__init__()
        D = config.hidden_size
        self.head_size = config.head_size
        self.dropout_p = config.attention_probs_dropout_prob
        self.attend = attend
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D)
        self.value = nn.Linear(D, D)
        self.output = nn.Linear(D, D)

    def forward(self, x_ND: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor] | None]:
        """x (N, D) to the attended values (N, D), and the attention maps if there are any."""
        q_NHK = self.query(x_ND).unflatten(1, (-1, self.head_size))
        k_NHK = self.key(x_ND).unflatten(1, (-1, self.head_size))
        v_NHK = self.value(x_ND).unflatten(1, (-1, self.head_size))
        dropout_p = self.dropout_p if self.training else 0.0
        attended = self.attend(q_NHK, k_NHK, v_NHK, layout, dropout_p)
        return self.output(attended.context_NHK.flatten(1)), attended.probs


class FeedForward(nn.Module):
    """Two linear layers, between them GELU (Hendrycks & Gimpel 2016); ERNIE 1.0: ReLU."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, D) through (N, F)."""
        return self.down(self.activation(self.up(x_ND)))


class EncoderLayer(nn.Module):
    """Attention, then feed-forward; after each: dropout, add the input, normalise."""

    def __init__(self, config: BertConfig, version: Implementation):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.add_norm = version.add_norm
        self.attention = SelfAttention(config, version.attend)
        self.attention_norm = nn.LayerNorm(D, eps=eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(D, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_ND: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor] | None]:
        """x (N, D) to x (N, D), and the attention maps if there are any."""
        attended_ND, probs = self.attention(x_ND, layout)
        x_ND = self.add_norm(attended_ND, x_ND, self.attention_norm, self.dropout)
        y_ND = self.feed_forward(x_ND)
        return self.add_norm(y_ND, x_ND, self.feed_forward_norm, self.dropout), probs


class Encoded(NamedTuple):
    """The encoder's output, flat over tokens; the lists are empty unless requested."""

    x_ND: Tensor
    hidden_states: list[Tensor]  # embeddings and every layer, each (N, D)
    attentions: list[list[Tensor]]  # by layer, then block of the layout: (rows, H, S, S)


class Bert(nn.Module):
    """Embeddings and the stack of encoder layers, without a head."""

    def __init__(self, config: BertConfig, version: Implementation):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            EncoderLayer(config, version) for _ in range(config.num_hidden_layers)
        )
        # Before any head is drawn, as in transformers: the same seed then gives the same model.
        initialise(self, config.initializer_range)
        for table in (self.embeddings.word, self.embeddings.position):
            if table.padding_idx is not None:
                table.weight.data[table.padding_idx].zero_()

    def forward(
        self,
        input_N: Tensor,
        segment_N: Tensor,
        layout: Layout,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Encoded:
        """Ids (N,) and segments (N,), int64, to the last hidden state (N, D)."""
        x_ND = self.embeddings(input_N, segment_N, layout)
        hidden_states, attentions = [x_ND] if output_hidden_states else [], []
        for layer in self.layers:
            x_ND, probs = layer(x_ND, layout)
            if output_hidden_states:
                hidden_states.append(x_ND)
            if output_attentions:
                attentions.append(probs)
        return Encoded(x_ND, hidden_states, attentions)
