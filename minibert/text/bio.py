"""From a BIO file to batches: reading, labels, word-pieces, windows, padding or packing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from minibert.files import MinibertError, read_text
from minibert.model.layout import Packed
from minibert.pretrained.tokenizer import Tokenizer, windows

IGNORE = -100  # the label of a piece that does not count in the loss
TAG = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class Sentence:
    """Words and their tags; ``line`` is that of the first word in its file, from 1."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int = 1


def read_bio(path: Path, orphans: str = "refuse") -> list[Sentence]:
    """Read a file with one word and its tag on a line and a blank line between sentences.

    Columns are separated by tabs, or where a line has none by spaces. The tag is the first column
    (MIT Movie) or the last (CoNLL): whichever holds a tag on every line. ``-DOCSTART-`` lines and
    CRLF are understood.

    Args:
        path: the file.
        orphans: an I- tag that continues nothing is an error ("refuse") or becomes B- ("repair").

    Raises:
        MinibertError: file and line of what is wrong.
    """
    rows: list[tuple[int, list[str]]] = []  # an empty list of columns ends a sentence
    for number, line in enumerate(read_text(path, "name a BIO file").split("\n"), start=1):
        line = line.rstrip("\r")
        columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            columns = []
        elif len(columns) < 2 or not all((columns[0], columns[-1])):
            raise MinibertError(
                f"{path}:{number}: {line[:60]!r} has one column: "
                "write a word and its tag, separated by a tab or a space"
            )
        rows.append((number, columns))
    tag_column = _tag_column(path, rows)
    word_column = -1 if tag_column == 0 else 0

    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    first_line = 0
    for number, columns in [*rows, (0, [])]:
        if not columns:
            if words:
                sentences.append(Sentence(tuple(words), tuple(tags), first_line))
                words, tags = [], []
            continue
        tag = columns[tag_column]
        previous = tags[-1] if tags else "O"
        if tag[0] == "I" and previous[1:] != tag[1:]:
            if orphans == "refuse":
                raise MinibertError(
                    f"{path}:{number}: {tag} follows {previous}, so it continues no entity: "
                    "write B- or read with --orphans repair"
                )
            tag = "B" + tag[1:]
        if not words:
            first_line = number
        words.append(columns[word_column])
        tags.append(tag)
    if not sentences:
        raise MinibertError(f"{path}: no sentence in it: write one word and its tag on each line")
    return sentences


def _tag_column(path: Path, rows: list[tuple[int, list[str]]]) -> int:
    """0 or -1: the column that holds a tag on every line."""
    wrong: dict[int, tuple[int, str]] = {}
    for number, columns in rows:
        for column in (0, -1):
            if columns and column not in wrong and not TAG.fullmatch(columns[column]):
                wrong[column] = (number, columns[column])
    if 0 not in wrong:
        return 0
    if -1 not in wrong:
        return -1
    number, value = max(wrong.values())
    raise MinibertError(
        f"{path}:{number}: {value[:60]!r} is no tag, and neither the first nor the last column "
        "has one on every line: write O, B-TYPE or I-TYPE"
    )


def labels_of(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    """Every label these sentences need: O, then B- and I- of each type in alphabetical order."""
    types = sorted({tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O"})
    return ("O", *(f"{prefix}-{type_}" for type_ in types for prefix in "BI"))


def label_ids(
    sentences: Sequence[Sentence], labels: Sequence[str], source: Path | str
) -> list[list[int]]:
    """The tags as indices into ``labels``.

    Raises:
        MinibertError: file and line of a tag that is not among them.
    """
    index = {label: i for i, label in enumerate(labels)}
    for sentence in sentences:
        for offset, tag in enumerate(sentence.tags):
            if tag not in index:
                raise MinibertError(
                    f"{source}:{sentence.line + offset}: the model has no label {tag}: "
                    f"it knows {', '.join(labels[:8])}{' ...' if len(labels) > 8 else ''}"
                )
    return [[index[tag] for tag in sentence.tags] for sentence in sentences]


@dataclass(frozen=True)
class Example:
    """A sentence, or a window of a long one, as the model reads it.

    Args:
        ids: word-pieces with [CLS] and [SEP].
        firsts: where in ``ids`` each of its own words begins.
        sentence: index of the sentence.
        first_word: index in the sentence of the first of its own words.
        labels: one a word of its own, empty where none are known.
    """

    ids: tuple[int, ...]
    firsts: tuple[int, ...]
    sentence: int
    first_word: int
    labels: tuple[int, ...] = ()


def examples_of(
    sentences: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_length: int,
    labels: Sequence[Sequence[int]] | None = None,
    stride: int = 128,
    first_index: int = 0,
) -> list[Example]:
    """Word-pieces of every sentence, windowed where it does not fit; empty sentences give none.

    Args:
        sentences: words.
        tokenizer: of the checkpoint.
        max_length: positions of the model, [CLS] and [SEP] included; at least 3.
        labels: a label id for every word, or None.
        stride: pieces that neighbouring windows share; at most half a window is used.
        first_index: the index of the first sentence.
    """
    if max_length < 3:
        raise ValueError(f"max_length must leave room for a piece and its frame, got {max_length}")
    limit = max_length - 2
    examples = []
    for i, pieces in enumerate(tokenizer.pieces(sentences)):
        if not pieces:
            continue
        sizes = [len(ids) for ids in pieces]
        for window in windows(sizes, limit, min(stride, limit // 2)):
            ids, firsts = [tokenizer.cls_id], []
            for word in range(window.start, window.stop):
                if window.own_start <= word < window.own_stop:
                    firsts.append(len(ids))
                ids += pieces[word]
            # Only a single word of more pieces than fit is cut here; its label sits on the first.
            ids = [*ids[: max_length - 1], tokenizer.sep_id]
            own = labels[i][window.own_start : window.own_stop] if labels is not None else ()
            examples.append(
                Example(tuple(ids), tuple(firsts), first_index + i, window.own_start, tuple(own))
            )
    return examples


@dataclass(frozen=True)
class Batch:
    """Examples as the model takes them: ``model(**batch.inputs)``."""

    examples: tuple[Example, ...]  # in the order in which they lie in the tensors
    inputs: dict[str, Tensor | Packed]
    first_W: Tensor  # flat index of the first piece of every word, over all examples

    @property
    def tokens(self) -> int:
        """Word-pieces in it, padding not counted."""
        return sum(len(example.ids) for example in self.examples)


def padded(
    examples: Sequence[Example],
    pad_id: int,
    length: int | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """One row an example, filled up to ``length`` or to the longest. Labels if there are any."""
    length = max(len(e.ids) for e in examples) if length is None else length
    shape = (len(examples), length)
    ids_BS = torch.full(shape, pad_id)
    mask_BS = torch.zeros(shape, dtype=torch.long)
    labels_BS = torch.full(shape, IGNORE)
    firsts = []
    for row, example in enumerate(examples):
        if len(example.ids) > length:
            raise ValueError(f"an example of {len(example.ids)} pieces, but length is {length}")
        ids_BS[row, : len(example.ids)] = torch.tensor(example.ids)
        mask_BS[row, : len(example.ids)] = 1
        if example.labels:
            labels_BS[row, list(example.firsts)] = torch.tensor(example.labels)
        firsts += [row * length + first for first in example.firsts]
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
    return _batch(examples, inputs, firsts, device)


def packed(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    filler: int | None = None,
) -> Batch:
    """All examples end to end, sorted by length so that attention sees few, large blocks.

    Args:
        examples: at least one.
        device: where the tensors go.
        filler: a piece to fill the batch up to ``rounded`` with, in sentences of their own at its
            end, which belong to no example; None fills nothing up.
    """
    examples = sorted(examples, key=lambda example: len(example.ids))
    labels_N: list[int] = []
    firsts: list[int] = []
    for example in examples:
        start = len(labels_N)
        labels_N += [IGNORE] * len(example.ids)
        for first, label in zip(example.firsts, example.labels):
            labels_N[start + first] = label
        firsts += [start + first for first in example.firsts]
    ids_N = [piece for example in examples for piece in example.ids]
    lengths = [len(example.ids) for example in examples]
    if filler is not None and (more := rounded(len(ids_N)) - len(ids_N)):
        ids_N += [filler] * more
        labels_N += [IGNORE] * more
        # None is longer than the longest example: the model has positions for these too.
        rows, rest = divmod(more, lengths[-1])
        lengths += [lengths[-1]] * rows + [rest] * (rest > 0)
    inputs = {
        "input_ids": torch.tensor(ids_N),
        "labels": torch.tensor(labels_N),
        "layout": Packed.from_lengths(lengths, device),
    }
    return _batch(examples, inputs, firsts, device)


def rounded(tokens: int) -> int:
    """The next of a few numbers, eight from one power of two to the next.

    oneDNN compiles its products anew for every number of rows, and keeps the code: memory would
    grow with the corpus. With few numbers of rows it soon has them all.
    """
    step = 1 << max(0, tokens.bit_length() - 4)
    return -(-tokens // step) * step


def _batch(
    examples: Sequence[Example], inputs: dict, firsts: list[int], device: torch.device | str
) -> Batch:
    if not any(example.labels for example in examples):
        del inputs["labels"]
    # Not waited for: CUDA puts what lies in ordinary memory aside before it returns.
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    return Batch(tuple(examples), moved, torch.tensor(firsts).to(device, non_blocking=True))


def epoch_batches(
    lengths: Sequence[int], size: int, seed: int, epoch: int, bucket: int = 1
) -> list[list[int]]:
    """Which examples go into which batch of an epoch: a pure function of its arguments.

    Args:
        lengths: pieces of each example.
        size: examples in a batch; the last one may have fewer.
        seed, epoch: another order for each.
        bucket: sort by length within pools of this many batches, then shuffle the batches: fewer
            lengths in a batch, hence less padding or larger blocks of attention. 1 sorts nothing
            but the batch itself and leaves its members to chance, as the reference does.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if bucket == 1:
        return list(chunks(order, size))
    batches = [
        batch
        for pool in chunks(order, size * bucket)
        for batch in chunks(sorted(pool, key=lambda i: lengths[i]), size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of ``size`` items, the last one perhaps shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
