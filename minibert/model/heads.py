"""BERT with a head, which turns hidden states into an answer.

A head owns its scores, its loss and its decoding:

    head(x_ND) -> scores_NL        head.loss(scores_NL, labels_N, layout) -> scalar
    head.decode(scores_WL) -> label ids and probabilities, for a head that labels words

Class and argument names are those of transformers. Shape legend: see layout.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model.config import FAMILIES, BertConfig
from minibert.model.crf import Chain, pack
from minibert.model.encoder import ACTIVATIONS, Bert, implementation, initialise
from minibert.model.labels import IGNORE, best_labels, well_formed_chain
from minibert.model.layout import Layout, Packed, Padded

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from minibert.pretrained import load


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

        Scores are those of every word's first piece, float32, on the CPU; at least one word.
        ``well_formed``: the best well-formed sequence, not each word's best label.
        """
        logp_WL = scores_WL.log_softmax(-1)
        ids = best_labels(logp_WL, self.labels) if well_formed else logp_WL.argmax(-1).tolist()
        return ids, logp_WL[range(len(ids)), ids].exp().tolist()


class CRFHead(TokenClassificationHead):
    """The same scores, and a chain of labels over the words of a sentence (crf.py)."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        L = config.num_labels
        self.crf = Chain(torch.zeros(L), torch.zeros(L, L), torch.zeros(L))

    def loss(self, scores_NC: Tensor, labels_N: Tensor, layout: Layout) -> Tensor:
        """-log p(labels) per word: a scalar."""
        word_N = labels_N != IGNORE
        counts = [int(part.sum()) for part in word_N.cpu().split(layout.lengths)]
        scores = pack(scores_NC[word_N].to(self.crf.start_L.dtype), counts)
        return self.crf.loss(scores, pack(labels_N[word_N], counts)).sum() / sum(counts)

    @torch.inference_mode(False)  # probabilities are gradients
    def decode(self, scores_WL: Tensor, well_formed: bool = True) -> tuple[list[int], list[float]]:
        """The most probable sequence, and the probability of each of its labels."""
        weights = [weight.detach().double().cpu() for weight in self.crf.parameters()]
        if well_formed:
            rules = well_formed_chain(self.labels).parameters()
            weights = [weight + rule for weight, rule in zip(weights, rules)]
        chain = Chain(*weights)
        scores = pack(scores_WL.double(), [len(scores_WL)])
        ids = chain.best(scores).data.tolist()
        return ids, chain.probabilities(scores).data[range(len(ids)), ids].tolist()


TOKEN_HEADS = {"linear": TokenClassificationHead, "crf": CRFHead}  # by config.head


class MaskedLMHead(Head):
    """A word-piece for every token, by the table of word embeddings (Devlin et al. 2019, 3.1)."""

    def __init__(self, config: BertConfig, word: nn.Embedding):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[FAMILIES[config.model_type].head_act or config.hidden_act]
        initialise(self, config.initializer_range)
        self._tied = (word,)  # in a tuple, which nn.Module does not register a second time

    def forward(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to scores (N, V)."""
        x_ND = self.norm(self.activation(self.transform(x_ND)))
        return F.linear(x_ND, self._tied[0].weight, self.bias)


class BertOutput(NamedTuple):
    """Named as in transformers; leading axes (B, S) of a padded batch, (N,) of a packed one."""

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
        """Of the parameters."""
        return self.bert.embeddings.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.bert.embeddings.norm.weight.dtype

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, **options: Unpack[load.Options]) -> Self:
        """Load a checkpoint; ``minibert.pretrained.load.model`` explains the options."""
        from minibert.pretrained import load  # the only way up from this folder: to the disk

        return load.model(cls, name_or_dir, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers opens as they are."""
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
            ValueError: arguments that do not fit together or to the model.
        """
        batch = self._layout(input_ids, attention_mask, layout)
        if output_attentions and self.attn_implementation != "eager":
            kept = f"{self.attn_implementation!r} keeps no attention maps"
            raise ValueError(f'{kept}: load the model with attn_implementation="eager"')
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
            raise ValueError(f"input_ids has shape {shape}: give (B, S), or (N,) with a layout")
        if packed is not None and mask is not None:
            raise ValueError("a packed batch has no padding: attention_mask must be None")
        if packed is not None and shape != ((tokens := sum(packed.lengths)),):
            raise ValueError(f"input_ids has shape {shape}, but the layout holds {tokens} tokens")
        layout = packed or Padded.from_mask(input_ids, mask)
        longest = shape[-1] if packed is None else max(packed.lengths)
        if longest > (limit := self.config.max_length):
            size = f"a sentence of {longest} tokens, but the model has {limit} positions"
            raise ValueError(f"{size}: cut it into windows, as minibert.Tagger does")
        return layout


class BertForTokenClassification(BertWithHead):
    """BERT that labels every token."""

    head: TokenClassificationHead

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation)
        self.head = TOKEN_HEADS[config.head](config)


class BertForMaskedLM(BertWithHead):
    """BERT that fills in masked word-pieces."""

    head: MaskedLMHead

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation)
        self.head = MaskedLMHead(config, self.bert.embeddings.word)
