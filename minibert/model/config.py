"""The sizes and rates of a BERT, named as in ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass

# The largest value of each size, far above any BERT: a config.json that exceeds one is damaged, and
# is refused before memory is allocated for it.
MOST = {
    "vocab_size": 10_000_000,
    "hidden_size": 100_000,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 10_000,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 1_000_000,
    "type_vocab_size": 10_000,
}
MOST_LABELS = 100_000


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and rates; the defaults are BERT-base's (cased).

    Raises:
        ValueError: a size below 1, a rate outside [0, 1), or a hidden size that the number of heads
            does not divide.
    """

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

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = vars(self)[name]
            if not is_number(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = vars(self)[name]
            is_default = name == "classifier_dropout" and value is None
            if not is_default and not (is_number(value, int, float) and 0 <= value < 1):
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = vars(self)[name]
            if not is_number(value, int, float) or not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value!r}")
        D, H = self.hidden_size, self.num_attention_heads
        if D % H:
            raise ValueError(f"hidden_size {D} is not a multiple of num_attention_heads {H}")
        pad, last = self.pad_token_id, self.vocab_size - 1
        if not is_number(pad, int) or not 0 <= pad <= last:
            raise ValueError(f"pad_token_id must be a vocabulary id, 0 to {last}, got {pad!r}")
        if not 0 < len(self.labels) <= MOST_LABELS:
            raise ValueError(f"labels must number 1 to {MOST_LABELS}, got {len(self.labels)}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be distinct, got {self.labels!r}")

    @property
    def head_size(self) -> int:
        """K: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        """L: the number of classes."""
        return len(self.labels)


def is_number(value: object, *kinds: type) -> bool:
    """Whether it is of one of these kinds; a bool, which Python counts as an int, is not."""
    return isinstance(value, kinds) and not isinstance(value, bool)
