"""BERT from scratch in plain PyTorch: readable, bit-equal to transformers where it says so, fast.

A name is imported when it is first used, so that ``minibert --help`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from minibert.files import MinibertError
    from minibert.model.config import BertConfig
    from minibert.model.heads import BertForMaskedLM, BertForTokenClassification
    from minibert.model.layout import Packed
    from minibert.pretrained.tokenizer import Tokenizer
    from minibert.study.parity.compare import compare
    from minibert.study.trace import trace
    from minibert.tagging.evaluate import evaluate
    from minibert.tagging.tagger import Tagger
    from minibert.tagging.words import Entity, Label

_HOME = {
    "BertConfig": "model.config",
    "BertForMaskedLM": "model.heads",
    "BertForTokenClassification": "model.heads",
    "Entity": "tagging.words",
    "Label": "tagging.words",
    "MinibertError": "files",
    "Packed": "model.layout",
    "Tagger": "tagging.tagger",
    "Tokenizer": "pretrained.tokenizer",
    "compare": "study.parity.compare",
    "evaluate": "tagging.evaluate",
    "trace": "study.trace",
}
__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForTokenClassification",
    "Entity",
    "Label",
    "MinibertError",
    "Packed",
    "Tagger",
    "Tokenizer",
    "compare",
    "evaluate",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minibert' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"minibert.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
