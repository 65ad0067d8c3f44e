"""From sentences to tensors: word-pieces, windows, padded or packed batches, and their order.

Suffixes of names: B sentences in a padded batch, S padded length, N word-pieces in a batch,
W words in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from minibert.model.labels import IGNORE
from minibert.model.layout import Packed
from minibert.pretrained.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """A sentence, or a window of a long one, as the model reads it.

    Args:
        ids: word-pieces, [CLS] and [SEP] included.
        firsts: index in ``ids`` of the first piece of each word that the example labels.
        sentence: index of the sentence.
        first_word: index in the sentence of the first word that the example labels.
        labels: one label id per entry of ``firsts``, or empty.
    """

    ids: tuple[int, ...]
    firsts: tuple[int, ...]
    sentence: int
    first_word: int
    labels: tuple[int, ...] = ()


def examples_of(
    sentences: Sequence[Sequence[str | None]],
    tokenizer: Tokenizer,
    max_length: int,
    labels: Sequence[Sequence[int]] | None = None,
    stride: int = 128,
    first_index: int = 0,
) -> list[Example]:
    """Tokenize sentences and cut those that do not fit the model into overlapping windows.

    Args:
        sentences: words, None for the mask; a sentence without words gives no example.
        tokenizer: the checkpoint's.
        max_length: positions of the model, [CLS] and [SEP] included; at least 3.
        labels: a label id for every word, or None.
        stride: word-pieces that neighbouring windows share, at most half a window.
        first_index: index of the first sentence.
    """
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3: [CLS], a piece, [SEP]; got {max_length}")
    limit = max_length - 2
    examples = []
    for i, pieces in enumerate(tokenizer.pieces(sentences)):
        if not pieces:
            continue
        sizes = [len(ids) for ids in pieces]
        for words, own in windows(sizes, limit, min(stride, limit // 2)):
            ids, firsts = [tokenizer.cls_id], []
            for word in words:
                if word in own:
                    firsts.append(len(ids))
                ids += pieces[word]
            # This truncates only a single word that is longer than the model; its label stays.
            ids = [*ids[: max_length - 1], tokenizer.sep_id]
            known = tuple(labels[i][own.start : own.stop]) if labels is not None else ()
            examples.append(Example(tuple(ids), tuple(firsts), first_index + i, own.start, known))
    return examples


def windows(sizes: Sequence[int], limit: int, stride: int) -> list[tuple[range, range]]:
    """Cut a sentence into overlapping windows.

    Args:
        sizes: word-pieces of each word, all at least 1; at least one word.
        limit: word-pieces that fit into a window, [CLS] and [SEP] not counted. A longer word gets a
            window to itself.
        stride: the most word-pieces that neighbouring windows share.

    Returns:
        For each window its words, and the ones it labels. Each word is labelled by one window: the
        one in which it is farther from the edge.
    """
    result: list[tuple[range, range]] = []
    start = own_start = 0
    while True:
        stop, used = start, 0
        while stop < len(sizes) and (used + sizes[stop] <= limit or stop == start):
            used += sizes[stop]
            stop += 1
        if stop == len(sizes):
            return [*result, (range(start, stop), range(own_start, stop))]
        # The next window must also have room for the word that did not fit into this one.
        next_start, shared = stop, 0
        most = min(stride, limit - sizes[stop])
        while next_start > start + 1 and shared + sizes[next_start - 1] <= most:
            next_start -= 1
            shared += sizes[next_start]
        own_stop = (next_start + stop + 1) // 2
        result.append((range(start, stop), range(own_start, own_stop)))
        start, own_start = next_start, own_stop


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as the model takes them: ``model(**batch.inputs)``.

    Args:
        examples: in their order in the tensors.
        inputs: arguments of the model's forward.
        first_W: index of the first piece of every labelled word in the flattened ids, int64.
    """

    examples: tuple[Example, ...]
    inputs: dict[str, Tensor | Packed]
    first_W: Tensor

    @property
    def tokens(self) -> int:
        """Number of word-pieces, padding not counted."""
        return sum(len(example.ids) for example in self.examples)


def padded(
    examples: Sequence[Example],
    pad_id: int,
    length: int | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """One row per example, padded to ``length`` or to the longest; labels (B, S) if there are any.

    Raises:
        ValueError: an example is longer than ``length``.
    """
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
    rows: int | None = None,
) -> Batch:
    """All examples end to end, without padding; labels (N,) if there are any.

    They are sorted by length, so that attention runs on few, large blocks.

    Args:
        examples: at least one.
        device: of the tensors.
        filler: the id of a word-piece. Sentences of this piece are appended until the batch has
            ``rows`` pieces. They belong to no example. None appends nothing.
        rows: at least the pieces of the examples; None: a ``rounded`` number.
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
    if filler is not None and (more := (rows or rounded(len(ids_N))) - len(ids_N)):
        ids_N += [filler] * more
        labels_N += [IGNORE] * more
        # As long as the longest example, for which the model has positions.
        rows, rest = divmod(more, lengths[-1])
        lengths += [lengths[-1]] * rows + [rest] * (rest > 0)
    inputs = {
        "input_ids": torch.tensor(ids_N),
        "labels": torch.tensor(labels_N),
        "layout": Packed.from_lengths(lengths, device),
    }
    return _batch(examples, inputs, firsts, device)


def rounded(tokens: int) -> int:
    """Round up, to one of 77 numbers up to 2048.

    oneDNN compiles a matrix product for every number of rows and keeps the code, so that memory
    would grow with the corpus. With few numbers of rows the cache is soon complete.
    """
    step = 3 << max(0, tokens.bit_length() - 6)
    return -(-tokens // step) * step


def _batch(
    examples: Sequence[Example], inputs: dict, firsts: list[int], device: torch.device | str
) -> Batch:
    if not any(example.labels for example in examples):
        del inputs["labels"]
    # non_blocking is safe here: CUDA stages pageable memory before the call returns.
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    return Batch(tuple(examples), moved, torch.tensor(firsts).to(device, non_blocking=True))


def epoch_batches(
    lengths: Sequence[int], size: int, seed: int, epoch: int, bucket: int = 1
) -> list[list[int]]:
    """The examples of each batch of an epoch, as indices; a pure function of its arguments.

    Args:
        lengths: word-pieces of each example.
        size: examples per batch; the last batch may have fewer.
        seed, epoch: each pair gives another order.
        bucket: shuffled examples are sorted by length within pools of this many batches, and the
            batches shuffled again. Batches then hold similar lengths: less padding, larger blocks
            of attention. 1 does not sort, as in the reference.
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
    """Lists of ``size`` consecutive items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
