"""Which word-pieces are hidden in masked-LM training: a pure function of seed, epoch and example.

BERT hides 15 % of the pieces: of these, 80 % become [MASK], 10 % a random piece, and 10 % stay as
they are (Devlin et al. 2019, section 3.1). Three models differ in which pieces are
hidden together, and in how often the choice changes:

static   one mask for each sentence, the same in every epoch (BERT)
dynamic  another mask in every epoch (RoBERTa: Liu et al. 2019, arXiv:1907.11692, section 4.1)
whole    as dynamic, but all pieces of an entity or phrase are hidden together (ERNIE: Sun et al.
         2019, arXiv:1904.09223, section 3.2); pieces of other words are hidden separately

Each piece, entity or phrase is drawn with probability 15 %, as in transformers' collator. Where a
sentence has drawn none, one is taken, as Google's code always takes at least one; its pass would
otherwise teach nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random

from minibert.text.batches import Example
from minibert.text.metrics import lenient_entities

STRATEGIES = ("static", "dynamic", "whole")
SHARE = 0.15  # of the pieces are hidden
AS_MASK, AS_RANDOM = 0.8, 0.1  # of those; the rest stay

Unit = tuple[int, ...]  # indices in ``ids`` that are hidden together


def units_of(example: Example, never: Collection[int], tags: Sequence[str] | None) -> list[Unit]:
    """What can be hidden in an example.

    Args:
        example: every word is in ``firsts``.
        never: ids that are not hidden: the special pieces.
        tags: BIO tags of the sentence's words, whose entities are hidden as wholes; None: every
            piece on its own.
    """
    starts = [*example.firsts, len(example.ids) - 1]
    own = [] if tags is None else tags[example.first_word : example.first_word + len(starts) - 1]
    whole = [range(starts[a], starts[b]) for _, a, b in lenient_entities(own)]
    inside = {i for unit in whole for i in unit}
    single = [range(i, i + 1) for i in range(1, len(example.ids) - 1) if i not in inside]
    units = (
        tuple(i for i in unit if example.ids[i] not in never)
        for unit in sorted([*whole, *single], key=lambda unit: unit.start)
    )
    return [unit for unit in units if unit]


def mask(
    example: Example, units: Sequence[Unit], mask_id: int, vocab_size: int, *key: int
) -> Example:
    """The example with some units hidden.

    Args:
        example: of unmasked ids.
        units: from ``units_of``; at least one.
        mask_id: id of [MASK].
        vocab_size: random pieces have ids below it.
        key: seed, epoch and number of the example; the same key hides the same.

    Returns:
        An example whose ``firsts`` are the hidden pieces and whose ``labels`` are what they were.
    """
    draw = Random(" ".join(map(str, key)))
    chosen = [unit for unit in units if draw.random() < SHARE] or [draw.choice(units)]
    hidden = [i for unit in chosen for i in unit]
    ids = list(example.ids)
    for i in hidden:
        fate = draw.random()
        if fate < AS_MASK:
            ids[i] = mask_id
        elif fate < AS_MASK + AS_RANDOM:
            ids[i] = draw.randrange(vocab_size)
    labels = tuple(example.ids[i] for i in hidden)
    return replace(example, ids=tuple(ids), firsts=tuple(hidden), labels=labels)


def tags_of(words: Sequence[str], phrases: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """BIO tags of the phrases found in a sentence: from the left, the longest first.

    Args:
        words: of the sentence, in any case.
        phrases: each a tuple of lower-case words.
    """
    lowered = [word.lower() for word in words]
    longest = max(map(len, phrases), default=0)
    tags = ["O"] * len(words)
    i = 0
    while i < len(words):
        sizes = range(min(longest, len(words) - i), 0, -1)
        size = next((n for n in sizes if tuple(lowered[i : i + n]) in phrases), 0)
        if size:
            tags[i : i + size] = ["B-PHRASE", *["I-PHRASE"] * (size - 1)]
        i += size or 1
    return tuple(tags)
