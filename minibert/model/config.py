"""The shape of a BERT, as ``config.json`` names it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType

from minibert.files import MinibertError, read_json

# What config.json may ask for and this model does not do: anything else is an error, because
# ignoring it would load the weights and compute something other than what they were trained for.
ONLY = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}

# Sizes and the most they may be, far above any BERT there is: a config.json that asks for more is
# damaged, and is refused before a model of that size is begun.
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
    """Sizes and rates of a BERT. The names are those of ``config.json``; the defaults BERT-base's.

    Raises:
        ValueError: a size below 1, a rate outside [0, 1), or heads that do not divide the hidden
            size.
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
            if not _is_number(value, int) or not 1 <= value <= most:
                raise ValueError(
                    f"{name} must be a positive integer, at most {most}, got {value!r}"
                )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = vars(self)[name]
            if value is None and name == "classifier_dropout":
                continue
            if not _is_number(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = vars(self)[name]
            if not _is_number(value, int | float) or not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if not _is_number(self.pad_token_id, int) or not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be an id of the vocabulary, 0 to {self.vocab_size - 1}, "
                f"got {self.pad_token_id!r}"
            )
        if not 0 < len(self.labels) <= MOST_LABELS:
            raise ValueError(
                f"labels must be at least one and at most {MOST_LABELS}, got {len(self.labels)}"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be distinct, got {self.labels!r}")

    @property
    def head_size(self) -> int:
        """K: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        """L: how many labels the classifier tells apart."""
        return len(self.labels)

    @classmethod
    def from_dict(cls, raw: dict, source: Path | str = "config.json") -> BertConfig:
        """Read the dictionary of a ``config.json``; keys that BERT does not use are passed over.

        Raises:
            MinibertError: a value that this model cannot honour, with ``source`` and the key.
        """
        if not isinstance(raw, dict):
            raise MinibertError(f"{source}: must hold a JSON object, got {type(raw).__name__}")
        for key, value in ONLY.items():
            if raw.get(key, value) != value:
                raise MinibertError(
                    f"{source}: {key} is {raw[key]!r}, but minibert computes {value!r} only: "
                    "use a BERT encoder checkpoint"
                )
        names = {field.name for field in fields(cls)} - {"labels"}
        values = {key: value for key, value in raw.items() if key in names}
        if labels := _labels(raw, source):
            values["labels"] = labels
        try:
            return cls(**values)
        except ValueError as error:
            raise MinibertError(
                f"{source}: {error}: use the config.json that belongs to the weights"
            ) from None

    @classmethod
    def from_file(cls, path: Path) -> BertConfig:
        """Read a ``config.json``.

        Raises:
            MinibertError: unreadable, not JSON, or not a BERT this model can be.
        """
        return cls.from_dict(read_json(path, "name a directory that holds a BERT"), path)

    def to_dict(self, architecture: str) -> dict:
        """The dictionary of a ``config.json`` that transformers reads the same way."""
        raw = asdict(self)
        labels = raw.pop("labels")
        return {
            "architectures": [architecture],
            **ONLY,
            **raw,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }


def _is_number(value: object, kind: type | UnionType) -> bool:
    """Whether it is one of that kind; true and false are numbers to Python alone."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _labels(raw: dict, source: Path | str) -> tuple[str, ...]:
    """The labels in the order of their ids, empty where the file names none."""
    remedy = "use the config.json that belongs to the weights"
    id2label = raw.get("id2label")
    if id2label is None:
        count = raw.get("num_labels", 0)
        if not _is_number(count, int) or not 0 <= count <= MOST_LABELS:
            raise MinibertError(
                f"{source}: num_labels must be a count, at most {MOST_LABELS}, got {count!r}: "
                f"{remedy}"
            )
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(id2label, dict) or not all(isinstance(v, str) for v in id2label.values()):
        raise MinibertError(f"{source}: id2label must map ids to label names: {remedy}")
    if len(id2label) > MOST_LABELS:
        raise MinibertError(
            f"{source}: id2label has {len(id2label)} labels, more than {MOST_LABELS}: {remedy}"
        )
    try:
        "".join(id2label.values()).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.end]
        raise MinibertError(f"{source}: id2label: {near!r} is not Unicode: {remedy}") from None
    try:
        by_id = {int(key): label for key, label in id2label.items()}
    except ValueError:
        by_id = {}
    if sorted(by_id) != list(range(len(id2label))):
        raise MinibertError(
            f"{source}: id2label must number its labels 0, 1, 2, ... without a gap: {remedy}"
        )
    return tuple(by_id[i] for i in range(len(by_id)))
