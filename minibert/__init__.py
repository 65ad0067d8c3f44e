"""BERT from scratch in plain PyTorch: readable, bit-equal to transformers where it says so, fast.

    Tagger, Entity, Label            entities of a text, from a trained model
    Embedder                         vectors of texts
    BertForTokenClassification,
    BertForMaskedLM, BertConfig      the models, with the argument names of transformers
    Tokenizer, Packed                word-pieces; the layout of a batch without padding
    trace                            read and replace what a model computes
    evaluate                         scores on labelled sentences
    compare, compare_code            parity of minibert, or of other code, with transformers
    MinibertError                    what is raised for a fault in the input

A name is imported when it is first used, so that ``minibert --help`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from minibert.files import MinibertError as MinibertError
    from minibert.model.config import BertConfig as BertConfig
    from minibert.model.heads import (
        BertForMaskedLM as BertForMaskedLM,
    )
    from minibert.model.heads import (
        BertForTokenClassification as BertForTokenClassification,
    )
    from minibert.model.layout import Packed as Packed
    from minibert.pretrained.tokenizer import Tokenizer as Tokenizer
    from minibert.study.parity.code import compare_code as compare_code
    from minibert.study.parity.compare import compare as compare
    from minibert.study.trace import trace as trace
    from minibert.tagging.embedder import Embedder as Embedder
    from minibert.tagging.evaluate import evaluate as evaluate
    from minibert.tagging.tagger import Tagger as Tagger
    from minibert.tagging.words import Entity as Entity
    from minibert.text.labelling import Label as Label

_HOME = {
    "BertConfig": "model.config",
    "BertForMaskedLM": "model.heads",
    "BertForTokenClassification": "model.heads",
    "Embedder": "tagging.embedder",
    "Entity": "tagging.words",
    "Label": "text.labelling",
    "MinibertError": "files",
    "Packed": "model.layout",
    "Tagger": "tagging.tagger",
    "Tokenizer": "pretrained.tokenizer",
    "compare": "study.parity.compare",
    "compare_code": "study.parity.code",
    "evaluate": "tagging.evaluate",
    "trace": "study.trace",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minibert' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"minibert.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
