"""The families of models as they are on disk: names of tensors and classes, and defaults.

``model.config.FAMILIES`` has what they compute differently. Sources: BERT, Devlin et al. 2019
(arXiv:1810.04805); RoBERTa, Liu et al. 2019 (arXiv:1907.11692); ERNIE 1.0, 2.0 and 3.0, Sun et al.
(arXiv:1904.09223, 1907.12412, 2107.02137).
"""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """How one family is spelled."""

    classes: str  # of transformers: BertForMaskedLM
    prefixes: tuple[str, ...]  # of the encoder's tensors; the first is what transformers writes
    tensors: dict[str, str]  # BERT's name of a tensor begins with the key: here with the value
    defaults: dict[str, int]  # of config.json, where transformers' are not BERT's


NAMES = {
    "bert": Names("Bert", ("bert.",), {}, {}),
    "roberta": Names(
        "Roberta",
        ("roberta.",),
        {
            "bert.": "roberta.",
            "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
            "cls.predictions.transform.": "lm_head.",
            "cls.predictions.": "lm_head.",
        },
        {"vocab_size": 50265, "pad_token_id": 1},
    ),
    # The first conversions of ERNIE have the names of a BERT.
    "ernie": Names("Ernie", ("ernie.", "bert."), {"bert.": "ernie."}, {"vocab_size": 30522}),
}


def tensor_name(name: str, model_type: str) -> str:
    """A tensor of BERT as the family ``model_type`` names it."""
    for start, other in NAMES[model_type].tensors.items():
        if name.startswith(start):
            return other + name.removeprefix(start)
    return name


def class_name(name: str, model_type: str) -> str:
    """A class of transformers, such as BertForMaskedLM, for the family ``model_type``."""
    return NAMES[model_type].classes + name.removeprefix("Bert")
