"""The sizes and rates of a BERT, named as in ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and rates; the defaults are BERT-base's (cased); ``config_json`` checks them."""

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
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # id2label, in the order of the ids
    head: str = "linear"  # of token classification: "linear" or "crf"

    @property
    def head_size(self) -> int:
        """K: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        """L: the number of classes."""
        return len(self.labels)
