"""BERT from scratch in plain PyTorch: readable, bit-equal to transformers, and fast.

Nothing is imported before it is asked for, so that ``minibert --help`` answers at once.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BertConfig": "model.config",
    "BertForMaskedLM": "model.encoder",
    "BertForTokenClassification": "model.encoder",
    "MinibertError": "files",
    "Packed": "model.layout",
    "Tagger": "tagging.tagger",
    "Tokenizer": "pretrained.tokenizer",
    # The module is not called trace: once imported it would stand here in place of the function.
    "trace": "study.trace",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minibert' has no attribute {name!r}")
    return getattr(import_module(f"minibert.{_HOME[name]}"), name)
