"""BIO files: sentences, their tags, and the labels that a model needs for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from minibert.files import MinibertError, read_text, write_text
from minibert.model.labels import TAG, may_follow
from minibert.text.schemes import PREFIXED, scheme_of

# How tools name the columns of words and of tags in a header.
WORD_COLUMNS = {"word", "words", "token", "tokens"}
TAG_COLUMNS = {"tag", "tags", "ner", "ner_tag", "ner_tags", "label", "labels", "entity"}


@dataclass(frozen=True)
class Sentence:
    """Words and their tags; ``line`` is the line of the first word in its file, from 1."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int = 1


def read_bio(
    path: Path, orphans: str = "refuse", say: Callable[[str], object] | None = None
) -> list[Sentence]:
    """Read a file with one word and its tag per line and a blank line between sentences.

    Columns are separated by tabs, or by spaces on lines without a tab; other white space, such as a
    no-break space, belongs to the word. The tag is the first column (MIT Movie) or the last
    (CoNLL), whichever holds a tag on every line; the word is at the other end. A first column that
    numbers the words of every sentence is skipped, and with it lines that begin with ``#``.
    ``-DOCSTART-`` lines are accepted. Lines end with LF or CRLF, or in a file without an LF with
    CR.

    Args:
        path: the file.
        orphans: an I- tag that continues no entity is an error ("refuse") or becomes B- ("repair").
        say: is told which columns were taken, where there are more than two.

    Raises:
        MinibertError: the file cannot be read, has no sentences, has a malformed line, or is in
            another format; ``minibert convert`` reads the usual ones.
    """
    text = read_text(path, "name a BIO file")
    if foreign := format_of(text):
        raise MinibertError(f"{path}: {foreign}")
    groups = column_groups(text, path)
    tag_column = _tag_column(path, groups)
    word_column = -1 if tag_column == 0 else 0
    if say is not None and (most := max((len(row[1]) for g in groups for row in g), default=2)) > 2:
        taken = ["last" if column else "first" for column in (word_column, tag_column)]
        say(f"{path}: {most} columns: words from the {taken[0]}, tags from the {taken[1]}")

    sentences = []
    for group in groups:
        tags: list[str] = []
        for number, columns in group:
            tag = columns[tag_column]
            previous = tags[-1] if tags else "O"
            if not may_follow(tag, previous):
                if orphans == "refuse":
                    raise MinibertError(
                        f"{path}:{number}: {tag} follows {previous}, so it continues no entity: "
                        "write B- or read with --orphans repair, as for IOB1 and IO"
                    )
                tag = "B" + tag[1:]
            tags.append(tag)
        words = tuple(columns[word_column] for _, columns in group)
        sentences.append(Sentence(words, tuple(tags), group[0][0]))
    if not sentences:
        raise MinibertError(f"{path}: no sentence in it: write one word and its tag on each line")
    return sentences


def format_of(text: str) -> str | None:
    """What a text is that is not in columns, and what to do; None if it may be in columns."""
    start = text.lstrip()[:2000]
    if start.startswith(("[", "{")) and re.search(r'"(annotations|completions)"\s*:', start):
        return "this looks like Label Studio JSON: export it as CoNLL2003"
    if re.match(r'\{\s*["}]|\[\s*[\[{]\s*"|\["[^"]*", *\{', start):
        return "this looks like JSON: minibert convert FILE NEW.bio writes it as BIO"
    if start.startswith(("<?xml", "<!DOCTYPE")):
        return "this looks like XML: export it as CoNLL"
    names = {cell.strip(' "\r').lower() for cell in re.split("[,;]", start.partition("\n")[0])}
    if names & WORD_COLUMNS and names & TAG_COLUMNS:
        return "this looks like CSV: minibert convert FILE NEW.bio writes it as BIO"
    return None


Row = tuple[int, list[str]]  # line number from 1, and its columns


def column_groups(text: str, path: Path) -> list[list[Row]]:
    """The lines of every sentence, in columns; without a column that numbers the words.

    Raises:
        MinibertError: a line has one column.
    """
    lines = text.split("\n" if "\n" in text else "\r")
    numbered = [(number, _cells(line)) for number, line in enumerate(lines, start=1)]
    groups = _groups(numbered)
    bare = _groups([row for row in numbered if not row[1][0].startswith("#")])
    if bare and all(
        [columns[0] for _, columns in group] == [str(i + 1) for i in range(len(group))]
        and all(len(columns) > 2 for _, columns in group)
        for group in bare
    ):
        groups = [[(number, columns[1:]) for number, columns in group] for group in bare]
    for group in groups:
        for number, columns in group:
            if len(columns) < 2 or not columns[0] or not columns[-1]:
                line = " ".join(columns)[:60]
                raise MinibertError(
                    f"{path}:{number}: {line!r} has one column: "
                    "write a word and its tag, separated by a tab or a space"
                )
    return groups


def _cells(line: str) -> list[str]:
    # Not str.split() and str.strip(): their white space includes no-break spaces and more.
    return [c.strip(" \r") for c in re.split("\t" if "\t" in line else " +", line.strip(" \r"))]


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Runs of lines that belong to a sentence: not blank, and not ``-DOCSTART-``."""
    inside = groupby(rows, key=lambda row: any(row[1]) and row[1][0] != "-DOCSTART-")
    return [list(group) for is_sentence, group in inside if is_sentence]


def _tag_column(path: Path, groups: list[list[Row]]) -> int:
    """0 or -1: the column that holds a tag on every line."""
    wrong: dict[int, tuple[int, str]] = {}
    for number, columns in chain.from_iterable(groups):
        for column in (0, -1):
            if column not in wrong and not TAG.fullmatch(columns[column]):
                wrong[column] = (number, columns[column])
    for column in (0, -1):
        if column not in wrong:
            return column
    number, value = max(wrong.values())
    if PREFIXED.fullmatch(value):
        raise MinibertError(
            f"{path}:{number}: {value} is a tag of {scheme_of(['O', value], str(path))}, not BIO: "
            f"minibert convert {path} NEW.bio rewrites it"
        )
    raise MinibertError(
        f"{path}:{number}: {value[:60]!r} is not a tag, and neither the first nor the last column "
        "has one on every line: write O, B-TYPE or I-TYPE, or try minibert convert"
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
