"""What can label words, and what it gives: the protocol of every system."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from minibert.text.metrics import lenient_entities


class Label(NamedTuple):
    """The label of one word."""

    name: str
    score: float  # probability


class WordTagger(Protocol):
    """Anything that labels words, such as ``Tagger`` or a system in ``baselines/``."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that it may give: "O", "B-TYPE" and "I-TYPE"."""

    def label(self, sentences: Iterable[Sequence[str]]) -> Iterator[list[Label]]:
        """One label for every word of every sentence, in order, as a stream."""


def score(labels: Sequence[Label]) -> float:
    """Of the entity that these labels make up: their mean probability."""
    return sum(label.score for label in labels) / len(labels)


def names(labels: Sequence[Label], min_score: float = 0.0) -> list[str]:
    """The labels' names, with O for entities whose score is below ``min_score``."""
    found = [label.name for label in labels]
    for _, first, stop in lenient_entities(found):
        if score(labels[first:stop]) < min_score:
            found[first:stop] = ["O"] * (stop - first)
    return found
