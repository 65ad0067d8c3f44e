"""config.json in and out."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from minibert.files import MinibertError, read_json
from minibert.model.config import FAMILIES, BertConfig
from minibert.model.encoder import ACTIVATIONS
from minibert.model.heads import TOKEN_HEADS
from minibert.pretrained import families

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

# The values that this model computes with. Any other is an error: if it were ignored, the weights
# would load and the model would compute something other than what they were trained for.
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# Keys that change what the weights mean, if they hold anything.
FOREIGN = ("pruned_heads", "quantization_config")
TASKS, MOST_TASKS = "task_type_vocab_size", 10_000
REMEDY = "use the config.json that belongs to the weights"


def read(path: Path) -> BertConfig:
    """The configuration in a ``config.json``.

    Raises:
        MinibertError: unreadable, not JSON, or not a BERT that this model can be.
    """
    return parse(read_json(path, "name a directory that holds a BERT"), path)


def parse(raw: dict, source: Path | str = "config.json") -> BertConfig:
    """The configuration in the dictionary of a ``config.json``; other keys are skipped.

    Raises:
        MinibertError: a value that this model cannot honour, with ``source`` and the key.
    """
    if not isinstance(raw, dict):
        raise MinibertError(f"{source}: must hold a JSON object, got {type(raw).__name__}")
    can = {key: [value] for key, value in ONLY.items()}
    can |= {"model_type": [*FAMILIES], "hidden_act": [*ACTIVATIONS], "use_task_id": [False, True]}
    for key, known in can.items():
        if raw.get(key, known[0]) not in known:
            raise MinibertError(
                f"{source}: {key} is {raw[key]!r}, but minibert computes "
                f"{' or '.join(map(repr, known))} only: use an encoder checkpoint that has it"
            )
    names = {field.name for field in fields(BertConfig)} - {"labels", TASKS}
    model_type = raw.get("model_type", "bert")
    values = families.NAMES[model_type].defaults | {k: v for k, v in raw.items() if k in names}
    if model_type == "ernie" and raw.get("use_task_id", False):
        tasks = values[TASKS] = raw.get(TASKS, 3)
        if not is_number(tasks, int) or not 1 <= tasks <= MOST_TASKS:
            raise MinibertError(
                f"{source}: {TASKS} must be an integer from 1 to {MOST_TASKS}, got {tasks!r}: "
                f"{REMEDY}"
            )
    for key in FOREIGN:
        if raw.get(key):
            raise MinibertError(
                f"{source}: has {key}, which minibert does not compute with: "
                "use a BERT encoder checkpoint without it"
            )
    if labels := _labels(raw, source):
        values["labels"] = labels
    try:
        return checked(BertConfig(**values))
    except ValueError as error:
        raise MinibertError(f"{source}: {error}: {REMEDY}") from None


def checked(config: BertConfig) -> BertConfig:
    """The same configuration.

    Raises:
        ValueError: a size below 1 or above its limit, a rate outside [0, 1), a hidden size that the
            number of heads does not divide, too few positions, labels that repeat, or an unknown
            head.
    """
    values = vars(config)
    for name, most in MOST.items():
        if not is_number(values[name], int) or not 1 <= values[name] <= most:
            raise ValueError(f"{name} must be an integer from 1 to {most}, got {values[name]!r}")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        value = values[name]
        is_default = name == "classifier_dropout" and value is None
        if not is_default and not (is_number(value, int, float) and 0 <= value < 1):
            raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    for name in ("initializer_range", "layer_norm_eps"):
        if not is_number(values[name], int, float) or not 0 < values[name] < 1:
            raise ValueError(f"{name} must be in (0, 1), got {values[name]!r}")
    D, H = config.hidden_size, config.num_attention_heads
    if D % H:
        raise ValueError(f"hidden_size {D} is not a multiple of num_attention_heads {H}")
    pad, last = config.pad_token_id, config.vocab_size - 1
    if not is_number(pad, int) or not 0 <= pad <= last:
        raise ValueError(f"pad_token_id must be a vocabulary id, 0 to {last}, got {pad!r}")
    if config.max_length < 1:
        raise ValueError(
            f"max_position_embeddings is {config.max_position_embeddings}, but the positions of "
            f"{config.model_type} begin after pad_token_id {pad}"
        )
    if not 0 < len(config.labels) <= MOST_LABELS:
        raise ValueError(f"labels must number 1 to {MOST_LABELS}, got {len(config.labels)}")
    if len(set(config.labels)) != len(config.labels):
        raise ValueError(f"labels must be distinct, got {config.labels!r}")
    if not isinstance(config.head, str) or config.head not in TOKEN_HEADS:
        raise ValueError(f"head must be one of {', '.join(TOKEN_HEADS)}, got {config.head!r}")
    return config


def is_number(value: object, *kinds: type) -> bool:
    """Whether it is of one of these kinds; a bool, which Python counts as an int, is not."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def to_dict(config: BertConfig, architecture: str) -> dict:
    """The dictionary of a ``config.json`` that transformers reads the same way.

    Args:
        config: of a model.
        architecture: the name of its class here.
    """
    raw = asdict(config)
    labels, tasks = raw.pop("labels"), raw.pop(TASKS)
    if config.model_type == "ernie":
        raw |= {"use_task_id": tasks > 0, TASKS: max(1, tasks)}
    if raw["head"] == "linear":
        del raw["head"]  # transformers knows no other, and no such key
    return {
        "architectures": [families.class_name(architecture, config.model_type)],
        **ONLY,
        **raw,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _labels(raw: dict, source: Path | str) -> tuple[str, ...]:
    """The labels in the order of their ids, empty where the file names none."""
    id2label = raw.get("id2label")
    if id2label is None:
        count = raw.get("num_labels", 0)
        if not is_number(count, int) or not 0 <= count <= MOST_LABELS:
            raise MinibertError(
                f"{source}: num_labels must be a count, at most {MOST_LABELS}, got {count!r}: "
                f"{REMEDY}"
            )
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(id2label, dict) or not all(isinstance(v, str) for v in id2label.values()):
        raise MinibertError(f"{source}: id2label must map ids to label names: {REMEDY}")
    if len(id2label) > MOST_LABELS:
        raise MinibertError(
            f"{source}: id2label has {len(id2label)} labels, more than {MOST_LABELS}: {REMEDY}"
        )
    try:
        "".join(id2label.values()).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 20) : error.end]
        raise MinibertError(f"{source}: id2label: {near!r} is not Unicode: {REMEDY}") from None
    try:
        by_id = {int(key): label for key, label in id2label.items()}
    except ValueError:
        by_id = {}
    if sorted(by_id) != list(range(len(id2label))):
        raise MinibertError(
            f"{source}: id2label must number its labels 0, 1, 2, ... without a gap: {REMEDY}"
        )
    return tuple(by_id[i] for i in range(len(by_id)))
