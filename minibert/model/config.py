"""The sizes and rates of a model, named as in ``config.json``, and the families of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Family(NamedTuple):
    """What a family computes differently; pretrained/families.py names it."""

    embeddings: tuple[str, ...]  # in the order of drawing; ERNIE's task table is the last
    counts: bool = False  # positions count ids that are not padding, from pad_token_id + 1
    head_act: str | None = None  # of the masked-LM head; None: hidden_act


FAMILIES = {  # by model_type
    "bert": Family(("word", "position", "segment", "norm")),
    "roberta": Family(("word", "segment", "norm", "position"), counts=True, head_act="gelu"),
    "ernie": Family(("word", "position", "segment", "norm")),
}


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and rates; the defaults are BERT-base's (cased); ``config_json`` checks them."""

    model_type: str = "bert"  # of FAMILIES
    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    task_type_vocab_size: int = 0  # ERNIE 2.0 and 3.0; 0: no such table
    hidden_act: str = "gelu"  # or "relu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # id2label, in the order of the ids
    head: str = "linear"  # of token classification: "linear" or "crf"

    @property
    def max_length(self) -> int:
        """Tokens of the longest sentence: 512 with RoBERTa's 514 positions."""
        unused = self.pad_token_id + 1 if FAMILIES[self.model_type].counts else 0
        return self.max_position_embeddings - unused

    @property
    def head_size(self) -> int:
        """K: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        """L: the number of classes."""
        return len(self.labels)
