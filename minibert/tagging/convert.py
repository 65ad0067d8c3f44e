"""Files of other tools as sentences in BIO: ``minibert convert IN OUT.bio``.

    columns     a word and its tag per line, in any scheme of text/schemes.py
    JSON lines  {"tokens": [...], "ner_tags": [...]}, as `datasets` writes them
                {"text": ..., "spans": [{"start", "end", "label"}]}, as spaCy and Prodigy do
    JSON        a list of such objects
    CSV         a word and its tag per line, under a header

From Python, rows of a ``datasets.Dataset`` are such objects too:

    names = dataset.features["ner_tags"].feature.names
    write_bio(Path("train.bio"), sentences_of(dataset, "conll2003", names))
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

from minibert.files import MinibertError, parse_json, read_text
from minibert.tagging.words import split
from minibert.text.bio import (
    TAG_COLUMNS,
    WORD_COLUMNS,
    Row,
    Sentence,
    column_groups,
    format_of,
)
from minibert.text.schemes import PREFIXED, scheme_of, to_bio

# The names of the same thing in different tools.
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "ner", "labels")
SPANS = ("spans", "entities", "label", "labels")
SENTENCE_COLUMNS = {"sentence #", "sentence", "sentence_id", "sentence_idx", "sent_id"}


def read_any(path: Path, names: Sequence[str] | None = None) -> tuple[list[Sentence], str]:
    """Read a file in one of the formats above.

    Args:
        path: the file.
        names: of the tags, where the file holds their numbers.

    Returns:
        The sentences in BIO, and what the file was: format and scheme.

    Raises:
        MinibertError: the file cannot be read, or is in none of these formats.
    """
    text = read_text(path, "name a file with labelled sentences")
    foreign = format_of(text)
    if foreign is None:
        groups = column_groups(text, path)
        found, what = _from_columns(groups, path), "columns"
    elif "JSON:" in foreign and "Label Studio" not in foreign:
        return _translated(_tagged(_objects(text, path), names), str(path), "JSON")
    elif "CSV" in foreign:
        found, what = _from_csv(text, path), "CSV"
    else:
        raise MinibertError(f"{path}: {foreign}")
    return _translated(found, str(path), what)


def sentences_of(
    rows: Iterable[Mapping[str, Any]], source: str, names: Sequence[str] | None = None
) -> list[Sentence]:
    """Rows with tokens and tags, or with a text and its spans, as sentences in BIO.

    Args:
        rows: such as a ``datasets.Dataset`` or a list of dictionaries.
        source: where they are from, for messages.
        names: of the tags, where rows hold their numbers.

    Raises:
        MinibertError: a row holds neither, or what it holds does not fit together.
    """
    numbered = ((f"{source}, row {i}", i, row) for i, row in enumerate(rows, start=1))
    return _translated(_tagged(numbered, names), source, "")[0]


Tagged = tuple[int, list[str], list[str]]  # line number, words, and their tags in any scheme
Objects = Iterable[tuple[str, int, Any]]  # where it is, for messages; line number; the object


def _translated(found: Iterable[Tagged], source: str, what: str) -> tuple[list[Sentence], str]:
    kept = [tagged for tagged in found if tagged[1] and tagged[1] != ["-DOCSTART-"]]
    if not kept:
        raise MinibertError(f"{source}: no sentence in it: give a file with labelled sentences")
    scheme = scheme_of({tag: None for _, _, tags in kept for tag in tags}, source)
    sentences = []
    for line, words, tags in kept:
        for word in words:
            if not word.strip(" \r") or "\t" in word or "\n" in word:
                raise MinibertError(
                    f"{source}:{line}: {word!r} is empty or holds a tab or line feed, so it cannot "
                    "be a word of a BIO file: remove it"
                )
        sentences.append(Sentence(tuple(words), tuple(to_bio(tags)), line))
    return sentences, f"{what}, {scheme}"


def _from_columns(groups: list[list[Row]], path: Path) -> Iterator[Tagged]:
    """The tags are in the first or last column: where all are prefixed, or the O is."""
    rows = [columns for _, columns in chain.from_iterable(groups)]
    if rows and _named(rows[0], WORD_COLUMNS) is not None:  # a header
        rows, groups = rows[1:], [groups[0][1:], *groups[1:]]
    values = {column: {columns[column] for columns in rows} for column in (0, -1)}
    for column in (0, -1):
        if all(value == "O" or PREFIXED.fullmatch(value) for value in values[column]):
            break
    else:
        column = min((0, -1), key=lambda column: ("O" not in values[column], len(values[column])))
    for group in groups:
        words = [columns[-1 if column == 0 else 0] for _, columns in group]
        yield group[0][0] if group else 0, words, [columns[column] for _, columns in group]


def _from_csv(text: str, path: Path) -> Iterator[Tagged]:
    header = text.lstrip().partition("\n")[0]
    reader = csv.reader(text.splitlines(), delimiter=max(",;", key=header.count))
    try:
        rows = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise MinibertError(f"{path}:{reader.line_num}: {error}: export it again") from None
    word, tag = (_named(rows[0][1], names) for names in (WORD_COLUMNS, TAG_COLUMNS))
    sentence = _named(rows[0][1], SENTENCE_COLUMNS)
    assert word is not None  # by these it was recognised
    assert tag is not None
    number, numbered = "", []
    for line, cells in rows[1:]:
        if any(cells) and len(cells) <= max(word, tag):
            raise MinibertError(f"{path}:{line}: {len(cells)} columns: give it a word and a tag")
        # Some files name the sentence in its first row only.
        number = (cells[sentence] or number) if sentence is not None and any(cells) else number
        numbered.append((line, cells, (number, any(cells))))
    for (_, there), group in groupby(numbered, key=lambda row: row[2]):
        own = list(group)
        if there:
            yield own[0][0], [c[word] for _, c, _ in own], [c[tag] for _, c, _ in own]


def _named(header: Sequence[str], names: Collection[str]) -> int | None:
    found = [i for i, cell in enumerate(header) if cell.strip().lower() in names]
    return found[0] if found else None


def _objects(text: str, path: Path) -> Objects:
    if re.match(r"\[\s*[\[{]", text.lstrip()):  # one list; else an object in every line
        for i, row in enumerate(parse_json(text, path), start=1):
            yield f"{path}, entry {i}", i, row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", number, parse_json(line, f"{path}:{number}")


def _tagged(rows: Objects, names: Sequence[str] | None) -> Iterator[Tagged]:
    for where, line, row in rows:
        if isinstance(row, list) and len(row) == 2 and isinstance(row[1], dict):
            row = {"text": row[0], **row[1]}  # spaCy's training tuples
        if not isinstance(row, Mapping):
            raise MinibertError(f"{where}: {type(row).__name__}, not an object: {_WANTED}")
        if row.get("answer", "accept") != "accept":  # refused in Prodigy
            continue
        tokens, tags = (next((k for k in keys if k in row), None) for keys in (TOKENS, TAGS))
        spans = next((k for k in SPANS if k in row), None)
        if isinstance(row.get("text"), str) and spans is not None:
            yield line, *_from_spans(row["text"], row[spans], where)
        elif tokens is None or tags is None:
            keys = ", ".join(map(str, row))[:100]
            raise MinibertError(f"{where}: an object with {keys}: {_WANTED}")
        else:
            words = row[tokens]
            if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
                raise MinibertError(f"{where}: {tokens} is not a list of words: {_WANTED}")
            if not isinstance(row[tags], list) or len(row[tags]) != len(words):
                raise MinibertError(f"{where}: {tags} is not a list with a tag for every word")
            yield line, words, [_tag_name(tag, names, where) for tag in row[tags]]


_WANTED = "give tokens and ner_tags, or text and spans"


def _tag_name(tag: object, names: Sequence[str] | None, where: str) -> str:
    if isinstance(tag, str):
        return tag
    if names is None:
        raise MinibertError(f"{where}: {tag!r} is the number of a tag: give --labels O,B-X,I-X,...")
    if not isinstance(tag, int) or not 0 <= tag < len(names):
        raise MinibertError(f"{where}: tag {tag!r}, but --labels names {len(names)}: name them all")
    return names[tag]


def _from_spans(text: str, spans: object, where: str) -> tuple[list[str], list[str]]:
    """Words of a text, cut where an entity begins or ends, and their tags."""
    found = sorted(_span(span, text, where) for span in (spans if isinstance(spans, list) else [0]))
    for (_, stop, one), (start, _, other) in pairwise(found):
        if start < stop:
            raise MinibertError(f"{where}: {one} and {other} overlap at {start}: keep one of them")
    cuts = {at for start, stop, _ in found for at in (start, stop)}
    words, tags = [], []
    for start, stop in split(text).spans:
        edges = [start, *sorted(at for at in cuts if start < at < stop), stop]
        for first, last in pairwise(edges):
            inside = next((s for s in found if s[0] <= first and last <= s[1]), None)
            begins = inside is not None and not text[inside[0] : first].strip()
            words.append(text[first:last])
            tags.append("O" if inside is None else f"{'B' if begins else 'I'}-{inside[2]}")
    return words, tags


def _span(span: object, text: str, where: str) -> tuple[int, int, str]:
    if isinstance(span, Mapping):
        span = [span.get("start"), span.get("end"), span.get("label")]
    start, stop, type_ = span if isinstance(span, list | tuple) and len(span) == 3 else (0, 0, 0)
    if not (isinstance(start, int) and isinstance(stop, int) and isinstance(type_, str)):
        raise MinibertError(f"{where}: {span!r} is not a span: give start, end and label")
    if not 0 <= start < stop <= len(text):
        raise MinibertError(f"{where}: {type_} from {start} to {stop}: the text has {len(text)}")
    return start, stop, "_".join(type_.split())
