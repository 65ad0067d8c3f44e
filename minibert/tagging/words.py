"""Words of a text, the label of each, and the entities that they make."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from minibert.text.labelling import Label as Label
from minibert.text.labelling import score
from minibert.text.metrics import lenient_entities


class Entity(NamedTuple):
    """A stretch of a text and what it is."""

    text: str
    type: str
    start: int  # in characters: text[start:stop] is the entity
    stop: int
    score: float  # mean probability of its words' labels


class Entities(list[Entity]):
    """The entities of one text; a notebook shows them marked in it."""

    def __init__(self, text: str, found: Iterable[Entity] = ()):
        super().__init__(found)
        self.text = text

    def __reduce__(self) -> tuple:
        return Entities, (self.text, list(self))

    def _repr_html_(self) -> str:
        parts, end = [], 0
        for entity in self:
            type_ = f"<small><b>{escape(entity.type)}</b> {entity.score:.2f}</small>"
            parts.append(escape(self.text[end : entity.start]))
            parts.append(f"<mark>{escape(entity.text)} {type_}</mark>")
            end = entity.stop
        return f'<p dir="auto">{"".join([*parts, escape(self.text[end:])])}</p>'


class Words(NamedTuple):
    """The words of a text and where they are in it."""

    text: str
    words: list[str]
    spans: list[tuple[int, int]]  # in characters


def split(text: str) -> Words:
    """Split at white space; each punctuation character at the edge of a word is its own word."""
    spans = []
    for match in re.finditer(r"\S+", text):
        start, stop = match.span()
        core_start, core_stop = start, stop
        while core_start < core_stop and _is_punctuation(text[core_start]):
            core_start += 1
        while core_stop > core_start and _is_punctuation(text[core_stop - 1]):
            core_stop -= 1
        spans += [(i, i + 1) for i in range(start, core_start)]
        if core_start < core_stop:
            spans.append((core_start, core_stop))
        spans += [(i, i + 1) for i in range(core_stop, stop)]
    return Words(text, [text[start:stop] for start, stop in spans], spans)


def join(words: Sequence[str]) -> Words:
    """Words joined to a text by single spaces."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return Words(" ".join(words), list(words), spans)


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P"


def entities(words: Words, labels: Sequence[Label]) -> Entities:
    """The entities of labelled words, by conlleval's rule (text/metrics.py)."""
    found = Entities(words.text)
    for type_, first, stop in lenient_entities([label.name for label in labels]):
        start_char, stop_char = words.spans[first][0], words.spans[stop - 1][1]
        text = words.text[start_char:stop_char]
        if text.strip():  # a word given to tag_words may be empty
            entity_score = score(labels[first:stop])
            found.append(Entity(text, type_, start_char, stop_char, entity_score))
    return found
