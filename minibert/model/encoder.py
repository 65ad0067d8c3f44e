"""BERT (Devlin et al. 2019, arXiv:1810.04805), from token ids to labels.

Reading order: ``BertForTokenClassification.forward``, ``Bert.forward``, ``EncoderLayer.forward``,
``SelfAttention.forward``; then attention.py for ``attend``, residual.py for ``add_norm`` and
layout.py for ``layout``.

Every sum, product and random draw happens in the order in which transformers does it, so that in
one process on one machine both give the same bits: outputs, gradients and dropout masks. Where an
order looks arbitrary, that is the reason.

Shape legend: B sentences, S padded length, N tokens in the batch (B * S, or without padding their
true number), D hidden size, H heads, K head size, F feed-forward size, L labels, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.files import write_text
from minibert.model import attention, residual
from minibert.model.attention import AttentionFn
from minibert.model.config import BertConfig
from minibert.model.layout import Layout, Packed, Padded
from minibert.model.residual import AddNormFn
from minibert.pretrained import hub, weights
from minibert.text.bio import IGNORE

if TYPE_CHECKING:
    from typing_extensions import Self


def draw(module: nn.Module, std: float) -> None:
    """Draw the parameters of ``module`` anew by BERT's rule, in their order, a body's excepted."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("bert."):
                parameter.copy_(weights.fresh(name, tuple(parameter.shape), parameter.dtype, std))


class Embeddings(nn.Module):
    """Word, segment and position added up, normalised (section 3, figure 2 of the paper)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, D)
        self.segment = nn.Embedding(config.type_vocab_size, D)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_N: Tensor, segment_N: Tensor, layout: Layout) -> Tensor:
        """Ids (N,) and segments (N,), both int64, to x (N, D)."""
        # (word + segment) + position: any other order moves the result by 1e-6.
        x_ND = self.word(input_N) + self.segment(segment_N)
        x_ND = x_ND + layout.spread_positions(self.position.weight)
        return self.dropout(self.norm(x_ND))


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
    """Two linear layers with a GELU between them, the exact one by erf (Hendrycks & Gimpel)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, D) by way of (N, F)."""
        return self.down(F.gelu(self.up(x_ND)))


class EncoderLayer(nn.Module):
    """Attention, then feed-forward; after each: dropout, add what went in, normalise."""

    def __init__(self, config: BertConfig, attend: AttentionFn, add_norm: AddNormFn):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.add_norm = add_norm
        self.attention = SelfAttention(config, attend)
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


@dataclass
class Encoded:
    """What the encoder gives: flat over tokens, as the heads want it."""

    x_ND: Tensor
    hidden_states: list[Tensor] | None  # embeddings and every layer, each (N, D)
    attentions: list[list[Tensor]] | None  # by layer, by block of the layout: (rows, H, S, S)


class Bert(nn.Module):
    """Embeddings and the stack of encoder layers, without a head."""

    def __init__(self, config: BertConfig, attend: AttentionFn, add_norm: AddNormFn):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            EncoderLayer(config, attend, add_norm) for _ in range(config.num_hidden_layers)
        )
        # Before any head draws, as in transformers: the same seed then gives the same model.
        draw(self, config.initializer_range)
        with torch.no_grad():
            self.embeddings.word.weight[config.pad_token_id].zero_()

    def plain_layers(self) -> list[EncoderLayer]:
        """The layers, for whoever needs their parts.

        Raises:
            ValueError: they have been prepacked (prepacked.py) and have no parts.
        """
        layers = [layer for layer in self.layers if isinstance(layer, EncoderLayer)]
        if len(layers) < len(self.layers):
            raise ValueError(
                "the layers are prepacked and keep no plain weights: load the model by "
                "from_pretrained, or the Tagger with prepack=False"
            )
        return layers

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
        hidden_states, attentions = [x_ND], []
        for layer in self.layers:
            x_ND, probs = layer(x_ND, layout)
            if output_hidden_states:
                hidden_states.append(x_ND)
            if output_attentions:
                attentions.append(probs)
        return Encoded(
            x_ND,
            hidden_states if output_hidden_states else None,
            attentions if output_attentions else None,
        )


@dataclass
class BertOutput:
    """What a model with a head returns; the names are those of transformers.

    For a padded batch the leading axes are (B, S), for a packed one (N,).
    """

    logits: Tensor
    loss: Tensor | None = None  # scalar: mean cross-entropy over labels that are not -100
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, then every layer: (..., D)
    attentions: tuple | None = None  # by layer: (B, H, S, S); packed: a list of (H, S, S)


class BertWithHead(nn.Module):
    """What both heads share: the body, and the way from arguments to a layout and back."""

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__()
        self.config = config
        self.attn_implementation = attn_implementation
        attend = attention.implementation(attn_implementation)
        self.bert = Bert(config, attend, residual.implementation(attn_implementation))
        self.load_report: weights.LoadReport | None = None

    def head(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to logits (N, classes)."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        labels: Sequence[str] | None = None,
        num_labels: int | None = None,
        attn_implementation: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> Self:
        """Load a checkpoint; what it lacks (a new classifier) is drawn.

        Args:
            name_or_dir: a directory with config.json and model.safetensors, or a name of
                ``hub.MODELS``.
            labels: label names, by id; default: those of config.json.
            num_labels: instead of ``labels``, how many nameless ones.
            attn_implementation: "eager", "sdpa", "fused" or "auto"; see attention.py.
            dtype: of the parameters.
            device: where they go.
            seed: for what is drawn; None takes torch's generator as it stands.

        Returns:
            The model in eval mode. ``load_report`` on it says what was unused and what is new.

        Raises:
            MinibertError: a file that is missing, damaged or does not fit the others; "fused"
                where it cannot run.
            ValueError: arguments that contradict each other.
        """
        directory = hub.locate_model(name_or_dir)
        config = BertConfig.from_file(directory / "config.json")
        if num_labels is not None:
            if labels is not None and len(labels) != num_labels:
                raise ValueError(f"num_labels is {num_labels}, but {len(labels)} labels are given")
            labels = labels or [f"LABEL_{i}" for i in range(num_labels)]
        if labels is not None:
            config = replace(config, labels=tuple(labels))
        device = torch.device(device)
        choice = attention.choose(attn_implementation, device, dtype, config.head_size)
        path = directory / weights.WEIGHTS
        tensors = weights.read(path)
        with weights.Blank():
            model = cls(config, choice.name)
        if seed is not None:
            torch.manual_seed(seed)
        model.load_report = weights.fill(
            model, tensors, dtype, config.initializer_range, path, last_use=True
        )
        return model.to(device).eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers opens as they are.

        Raises:
            MinibertError: the directory cannot be written or the disk is full.
            ValueError: the layers have been prepacked.
        """
        self.bert.plain_layers()
        weights.save(self, Path(directory) / weights.WEIGHTS)
        config = json.dumps(self.config.to_dict(type(self).__name__), indent=2)
        write_text(Path(directory) / "config.json", config + "\n")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        layout: Packed | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BertOutput:
        """Run the model on a padded batch, or with ``layout`` on a packed one.

        Args:
            input_ids: int64, (B, S); packed: (N,).
            attention_mask: (B, S), nonzero at real tokens; None when all are. Padded only.
            token_type_ids: int64 like ``input_ids``, the segment of each token; None: all 0.
            labels: int64 like ``input_ids``; -100 where a token does not count.
            layout: the ``Packed`` layout of a one-dimensional ``input_ids``.
            output_hidden_states: also return the embeddings and every layer's output.
            output_attentions: also return the attention maps; eager attention only.

        Raises:
            ValueError: shapes that do not fit together, a sentence longer than
                ``max_position_embeddings``, or attention maps asked of another implementation.
        """
        batch = self._layout(input_ids, attention_mask, layout)
        if output_attentions and self.attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={self.attn_implementation!r} keeps no attention maps: "
                'load the model with attn_implementation="eager" for output_attentions=True'
            )
        for name, given in (("token_type_ids", token_type_ids), ("labels", labels)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}, "
                    f"but input_ids has {tuple(input_ids.shape)}: they must be equal"
                )
        input_N = input_ids.flatten()
        segment_N = input_N * 0 if token_type_ids is None else token_type_ids.flatten()
        encoded = self.bert(input_N, segment_N, batch, output_hidden_states, output_attentions)
        logits_NC = self.head(encoded.x_ND)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_NC, labels.flatten(), ignore_index=IGNORE)
        return BertOutput(
            logits=batch.unflatten(logits_NC),
            loss=loss,
            hidden_states=encoded.hidden_states
            and tuple(batch.unflatten(x_ND) for x_ND in encoded.hidden_states),
            attentions=encoded.attentions
            and tuple(batch.unflatten_maps(maps) for maps in encoded.attentions),
        )

    def _layout(
        self, input_ids: Tensor, attention_mask: Tensor | None, layout: Packed | None
    ) -> Layout:
        if layout is None:
            if input_ids.dim() != 2:
                raise ValueError(
                    f"input_ids has shape {tuple(input_ids.shape)}: give (B, S), "
                    "or (N,) together with layout=Packed.from_lengths(...)"
                )
            dtype = self.bert.embeddings.norm.weight.dtype
            chosen: Layout = Padded.from_mask(input_ids, attention_mask, dtype)
        else:
            if attention_mask is not None:
                raise ValueError("a packed batch has no padding: attention_mask must be None")
            if input_ids.shape != (sum(layout.lengths),):
                raise ValueError(
                    f"input_ids has shape {tuple(input_ids.shape)}, "
                    f"but the layout holds {sum(layout.lengths)} tokens"
                )
            chosen = layout
        limit = self.config.max_position_embeddings
        if chosen.max_length > limit:
            raise ValueError(
                f"a sentence of {chosen.max_length} tokens, but the model has {limit} positions: "
                "window it (minibert.pretrained.tokenizer does)"
            )
        return chosen


class BertForTokenClassification(BertWithHead):
    """A label for every token: dropout and one linear layer on the encoder."""

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation)
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        draw(self, config.initializer_range)

    def head(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to logits (N, L)."""
        return self.classifier(self.dropout(x_ND))


class BertForMaskedLM(BertWithHead):
    """A word-piece for every token: the head BERT was pretrained with (section 3.1, task 1)."""

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        draw(self, config.initializer_range)

    def head(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to logits (N, V), by the word embeddings themselves."""
        x_ND = self.transform_norm(F.gelu(self.transform(x_ND)))
        return F.linear(x_ND, self.bert.embeddings.word.weight, self.bias)
