"""What can label words, and what it gives: the protocol of every system."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol


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
