"""Streams of any length, processed in pools that fit into memory."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
POOL = 1024  # sentences that are sorted by length together, and held in memory
POOL_CHARACTERS = 1 << 20  # at most, in one pool, unless a single sentence has more


def pools(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive items in lists of at most ``POOL`` items and ``POOL_CHARACTERS`` characters."""
    pool: list[T] = []
    held = 0
    for item in items:
        size = characters(item)
        if pool and held + size > POOL_CHARACTERS:
            yield pool
            pool, held = [], 0
        pool.append(item)
        held += size
        if len(pool) == POOL:
            yield pool
            pool, held = [], 0
    if pool:
        yield pool


def progress(items: Iterable[T] | None, what: str, total: int | None = None) -> tqdm[T]:
    """The items with a progress bar, where a terminal shows it and more than three seconds pass."""
    hidden = True if sys.stderr is None else None  # None: hidden unless it is a terminal
    return tqdm(items, total=total, unit=f" {what}", delay=3, leave=False, disable=hidden)


def read_ahead(started: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """The results of started computations, in order, with up to ``depth`` more under way."""
    waiting: deque[Callable[[], T]] = deque()
    for read in started:
        waiting.append(read)
        if len(waiting) > depth:
            yield waiting.popleft()()
    for read in waiting:
        yield read()
