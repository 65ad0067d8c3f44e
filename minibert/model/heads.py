"""BERT with a head: what a user calls, and what turns hidden states into an answer.

A head owns its scores, its loss and its decoding:

    head(x_ND) -> scores_NL        head.loss(scores_NL, labels_N, layout) -> scalar
    head.decode(scores_WL) -> label ids and probabilities, for a head that labels words

Class and argument names are those of transformers. Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model.config import BertConfig
from minibert.model.encoder import Bert, implementation, initialise
from minibert.model.labels import IGNORE, best_labels
from minibert.model.layout import Layout, Packed, Padded

if TYPE_CHECKING:
    from typing_extensions import Self


class Head(nn.Module):
    """What both heads share: the loss."""

    def loss(self, scores_NC: Tensor, labels_N: Tensor, layout: Layout) -> Tensor:
        """Mean cross-entropy over the labels that are not ``IGNORE``: a scalar."""
        return F.cross_entropy(scores_NC, labels_N, ignore_index=IGNORE)


class TokenClassificationHead(Head):
    """A label for every token: dropout and one linear layer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.labels = config.labels
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        initialise(self, config.initializer_range)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to scores (N, L)."""
        return self.classifier(self.dropout(x_ND))

    def decode(self, scores_WL: Tensor, well_formed: bool = True) -> tuple[list[int], list[float]]:
        """The labels of one sentence, and the probability of each.

        Args:
            scores_WL: of every word's first piece, float32, on the CPU; at least one word.
            well_formed: the most probable well-formed BIO sequence, not each word's best label.
        """
        logp_WL = scores_WL.log_softmax(-1)
        ids = best_labels(logp_WL, self.labels) if well_formed else logp_WL.argmax(-1).tolist()
        return ids, logp_WL[range(len(ids)), ids].exp().tolist()


class MaskedLMHead(Head):
    """A word-piece for every token, as BERT was pretrained (Devlin et al. 2019, section 3.1).

    The output layer is the table of word embeddings.
    """

    def __init__(self, config: BertConfig, word: nn.Embedding):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        initialise(self, config.initializer_range)
        self._tied = (word,)  # in a tuple, which nn.Module does not register a second time

    def forward(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to scores (N, V)."""
        x_ND = self.norm(F.gelu(self.transform(x_ND)))
        return F.linear(x_ND, self._tied[0].weight, self.bias)


@dataclass(eq=False)
class BertOutput:
    """The output of a model with a head, named as in transformers.

    The leading axes are (B, S) for a padded batch, (N,) for a packed one.
    """

    logits: Tensor
    loss: Tensor | None = None  # scalar
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, then every layer: (..., D)
    attentions: tuple | None = None  # by layer: (B, H, S, S); packed: a list of (H, S, S)


class BertWithHead(nn.Module):
    """What the models share: the encoder, and the way from arguments to a layout and back."""

    head: Head

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__()
        self.config = config
        self.attn_implementation = attn_implementation
        self.bert = Bert(config, implementation(attn_implementation))
        self.load_report: Any = None  # a pretrained.load.LoadReport if it came from a checkpoint

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.bert.embeddings.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.bert.embeddings.norm.weight.dtype

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        labels: Sequence[str] | None = None,
        num_labels: int | None = None,
        attn_implementation: str = "sdpa",
        dtype: str | torch.dtype = "fp32",
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> Self:
        """Load a checkpoint. Parameters that it lacks, such as a new classifier, are initialised.

        Args:
            name_or_dir: a directory with config.json and model.safetensors, or a registry name.
            labels: names of the classes, or ``num_labels``; default: those of config.json.
            attn_implementation: "eager", "sdpa", "fused", or "auto": fused if it runs, else sdpa.
            dtype: of the parameters: "fp32", "bf16", "fp16", "auto" or a torch.dtype.
            device: of the parameters.
            seed: for the missing parameters; None draws from the generator's current state.

        Returns:
            The model in eval mode, with a ``load_report`` of what was unused and what is new.

        Raises:
            MinibertError: a file is missing, damaged or does not fit; "fused" cannot run here.
            ValueError: arguments that contradict each other.
        """
        from minibert.pretrained import load  # the only way up from this folder: to the disk

        attn = attn_implementation
        return load.model(cls, name_or_dir, labels, num_labels, attn, dtype, device, seed)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers opens as they are.

        Raises:
            MinibertError: the directory cannot be written or the disk is full.
        """
        from minibert.pretrained import load

        load.save(self, Path(directory))

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
            attention_mask: (B, S), nonzero at real tokens; None when all are. Padded batches only.
            token_type_ids: int64 like ``input_ids``, the segment of each token; None: all 0.
            labels: int64 like ``input_ids``; -100 where a token does not count.
            layout: the ``Packed`` layout of one-dimensional ``input_ids``.
            output_hidden_states: also return the embeddings and the output of every layer.
            output_attentions: also return the attention maps; eager only.

        Raises:
            ValueError: shapes that do not fit together, a sentence longer than the model has
                positions, or attention maps from an implementation that keeps none.
        """
        batch = self._layout(input_ids, attention_mask, layout)
        if output_attentions and self.attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={self.attn_implementation!r} keeps no attention maps: "
                'load the model with attn_implementation="eager" for output_attentions=True'
            )
        for name, x in (("token_type_ids", token_type_ids), ("labels", labels)):
            if x is not None and x.shape != input_ids.shape:
                shapes = f"{tuple(x.shape)}, but input_ids has {tuple(input_ids.shape)}"
                raise ValueError(f"{name} has shape {shapes}: they must be equal")
        input_N = input_ids.flatten()
        segment_N = input_N * 0 if token_type_ids is None else token_type_ids.flatten()
        encoded = self.bert(input_N, segment_N, batch, output_hidden_states, output_attentions)
        scores_NC = self.head(encoded.x_ND)
        return BertOutput(
            logits=batch.unflatten(scores_NC),
            loss=None if labels is None else self.head.loss(scores_NC, labels.flatten(), batch),
            hidden_states=tuple(map(batch.unflatten, encoded.hidden_states)) or None,
            attentions=tuple(map(batch.unflatten_maps, encoded.attentions)) or None,
        )

    def _layout(self, input_ids: Tensor, mask: Tensor | None, packed: Packed | None) -> Layout:
        shape = tuple(input_ids.shape)
        if packed is None and len(shape) != 2:
            raise ValueError(
                f"input_ids has shape {shape}: give (B, S), "
                "or (N,) together with layout=Packed.from_lengths(...)"
            )
        if packed is not None and mask is not None:
            raise ValueError("a packed batch has no padding: attention_mask must be None")
        if packed is not None and shape != (sum(packed.lengths),):
            tokens = sum(packed.lengths)
            raise ValueError(f"input_ids has shape {shape}, but the layout holds {tokens} tokens")
        layout = packed or Padded.from_mask(input_ids, mask)
        limit = self.config.max_position_embeddings
        if layout.max_length > limit:
            raise ValueError(
                f"a sentence of {layout.max_length} tokens, but the model has {limit} positions: "
                "cut it into windows, as minibert.Tagger does"
            )
        return layout


class BertForTokenClassification(BertWithHead):
    """BERT that labels every token."""

    head: TokenClassificationHead

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation)
        self.head = TokenClassificationHead(config)


class BertForMaskedLM(BertWithHead):
    """BERT that fills in masked word-pieces."""

    head: MaskedLMHead

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation)
        self.head = MaskedLMHead(config, self.bert.embeddings.word)
