"""A saved baseline, opened by what its config.json says, and used on texts like a ``Tagger``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from minibert.files import read_json
from minibert.tagging.words import Entities, entities, split
from minibert.text.labelling import Label, WordTagger

# model_type: module and class in minibert/baselines; imported only for such a directory.
BASELINES = {"hmm": "hmm.HMM", "crf": "crf.CRF", "bilstm-crf": "bilstm_crf.BiLSTMCRF"}


class OnTexts:
    """A ``WordTagger`` with the methods by which ``process_lines`` uses a ``Tagger``."""

    depth = 0  # nothing is computed ahead

    def __init__(self, tagger: WordTagger):
        self.tagger = tagger

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that it may give."""
        return self.tagger.labels

    def label(self, sentences: Iterable[Sequence[str]]) -> Iterator[list[Label]]:
        """One label for every word of every sentence, in order, as a stream."""
        return self.tagger.label(sentences)

    def start(self, texts: Iterable[str]) -> Callable[[], list[Entities]]:
        """The entities of each text; the result, when called, gives them."""
        pool = [split(text) for text in texts]
        labels = self.label([words.words for words in pool])
        found = [entities(words, of_words) for words, of_words in zip(pool, labels)]
        return lambda: found


def kind_of(directory: str | Path) -> str | None:
    """Which baseline a directory holds; None for anything else, such as a BERT.

    Raises:
        MinibertError: its config.json is damaged.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return None
    config = read_json(path, "name a model directory")
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) and kind in BASELINES else None


def baseline(kind: str) -> Any:
    """The class of a baseline."""
    module, name = BASELINES[kind].split(".")
    return getattr(import_module(f"minibert.baselines.{module}"), name)
