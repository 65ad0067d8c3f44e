"""BIO files: sentences, their tags, and the labels that a model needs for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from minibert.files import MinibertError, read_text, write_text
from minibert.model.labels import TAG, may_follow


@dataclass(frozen=True)
class Sentence:
    """Words and their tags; ``line`` is the line of the first word in its file, from 1."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int = 1


def read_bio(path: Path, orphans: str = "refuse") -> list[Sentence]:
    """Read a file with one word and its tag per line and a blank line between sentences.

    Columns are separated by tabs, or by spaces on lines without a tab; other white space, such as a
    no-break space, belongs to the word. The tag is the first column (MIT Movie) or the last
    (CoNLL), whichever holds a tag on every line. ``-DOCSTART-`` lines are accepted. Lines end with
    LF or CRLF, or in a file without an LF with CR.

    Args:
        path: the file.
        orphans: an I- tag that continues no entity is an error ("refuse") or becomes B- ("repair").

    Raises:
        MinibertError: the file cannot be read, has no sentences, or has a malformed line.
    """
    text = read_text(path, "name a BIO file")
    lines = text.split("\n" if "\n" in text else "\r")
    rows = [(number, _columns(path, number, line)) for number, line in enumerate(lines, start=1)]
    tag_column = _tag_column(path, rows)
    word_column = -1 if tag_column == 0 else 0

    sentences = []
    for is_sentence, group in groupby(rows, key=lambda row: bool(row[1])):
        if not is_sentence:
            continue
        sentence = list(group)
        tags: list[str] = []
        for number, columns in sentence:
            tag = columns[tag_column]
            previous = tags[-1] if tags else "O"
            if not may_follow(tag, previous):
                if orphans == "refuse":
                    raise MinibertError(
                        f"{path}:{number}: {tag} follows {previous}, so it continues no entity: "
                        "write B- or read with --orphans repair"
                    )
                tag = "B" + tag[1:]
            tags.append(tag)
        words = tuple(columns[word_column] for _, columns in sentence)
        sentences.append(Sentence(words, tuple(tags), sentence[0][0]))
    if not sentences:
        raise MinibertError(f"{path}: no sentence in it: write one word and its tag on each line")
    return sentences


def _columns(path: Path, number: int, line: str) -> list[str]:
    """The columns of a line, at least two; none if the line ends a sentence."""
    # Not str.split() and str.strip(): their white space includes no-break spaces and more.
    columns = [c.strip(" \r") for c in re.split("\t" if "\t" in line else " +", line.strip(" \r"))]
    if not any(columns) or columns[0] == "-DOCSTART-":
        return []
    if len(columns) < 2 or not columns[0] or not columns[-1]:
        raise MinibertError(
            f"{path}:{number}: {line.rstrip()[:60]!r} has one column: "
            "write a word and its tag, separated by a tab or a space"
        )
    return columns


def _tag_column(path: Path, rows: list[tuple[int, list[str]]]) -> int:
    """0 or -1: the column that holds a tag on every line."""
    wrong: dict[int, tuple[int, str]] = {}
    for number, columns in rows:
        for column in (0, -1):
            if columns and column not in wrong and not TAG.fullmatch(columns[column]):
                wrong[column] = (number, columns[column])
    for column in (0, -1):
        if column not in wrong:
            return column
    number, value = max(wrong.values())
    raise MinibertError(
        f"{path}:{number}: {value[:60]!r} is not a tag, and neither the first nor the last column "
        "has one on every line: write O, B-TYPE or I-TYPE"
    )


def write_bio(path: Path, sentences: Sequence[Sentence]) -> Path:
    """Write sentences in MIT Movie's form: tag, tab, word, and a blank line between sentences.

    Raises:
        MinibertError: the file cannot be written.
    """
    blocks = ("".join(f"{t}\t{w}\n" for w, t in zip(s.words, s.tags)) for s in sentences)
    write_text(path, "\n".join(blocks))
    return path


def labels_of(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    """The labels of these sentences: O, then B- and I- of each type in alphabetical order."""
    types = sorted({tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O"})
    return ("O", *(f"{prefix}-{type_}" for type_ in types for prefix in "BI"))


def label_ids(
    sentences: Sequence[Sentence], labels: Sequence[str], source: Path | str
) -> list[list[int]]:
    """The tags as indices into ``labels``.

    Raises:
        MinibertError: a tag is not among them; names ``source`` and the line.
    """
    index = {label: i for i, label in enumerate(labels)}
    for sentence in sentences:
        for line, tag in enumerate(sentence.tags, start=sentence.line):
            if tag not in index:
                raise MinibertError(
                    f"{source}:{line}: the model has no label {tag}: "
                    f"it knows {', '.join(labels[:8])}{' ...' if len(labels) > 8 else ''}"
                )
    return [[index[tag] for tag in sentence.tags] for sentence in sentences]
