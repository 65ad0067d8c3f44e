"""config.json in and out."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from minibert.files import MinibertError, read_json
from minibert.model.config import MOST_LABELS, BertConfig, is_number

# The values that this model computes with. Any other is an error: if it were ignored, the weights
# would load and the model would compute something other than what they were trained for.
ONLY = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def read(path: Path) -> BertConfig:
    """The configuration in a ``config.json``.

    Raises:
        MinibertError: unreadable, not JSON, or not a BERT that this model can be.
    """
    return parse(read_json(path, "name a directory that holds a BERT"), path)


def parse(raw: dict, source: Path | str = "config.json") -> BertConfig:
    """The configuration in the dictionary of a ``config.json``; keys that BERT ignores are skipped.

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
    names = {field.name for field in fields(BertConfig)} - {"labels"}
    values = {key: value for key, value in raw.items() if key in names}
    if labels := _labels(raw, source):
        values["labels"] = labels
    try:
        return BertConfig(**values)
    except ValueError as error:
        raise MinibertError(
            f"{source}: {error}: use the config.json that belongs to the weights"
        ) from None


def to_dict(config: BertConfig, architecture: str) -> dict:
    """The dictionary of a ``config.json`` that transformers reads the same way."""
    raw = asdict(config)
    labels = raw.pop("labels")
    return {
        "architectures": [architecture],
        **ONLY,
        **raw,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _labels(raw: dict, source: Path | str) -> tuple[str, ...]:
    """The labels in the order of their ids, empty where the file names none."""
    remedy = "use the config.json that belongs to the weights"
    id2label = raw.get("id2label")
    if id2label is None:
        count = raw.get("num_labels", 0)
        if not is_number(count, int) or not 0 <= count <= MOST_LABELS:
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
