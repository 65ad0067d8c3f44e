"""Tag or embed lines of text in order, in constant memory, in one process or several.

    minibert tag runs/movie/best --file queries.txt --output tagged.txt
    torchrun --nproc-per-node 4 -m minibert.cli tag runs/movie/best --file queries.txt

Lines are read in pools (stream.py). A pipe or terminal also ends a pool when nothing arrives for
``PAUSE_S``: a line that comes alone is answered at once, and fast lines still share batches.

With N processes, rank r tags the pools r, r + N, ... and sends the result to rank 0, the only one
that writes. A pool makes the same batches in any process, so the output is byte for byte that of
one process with the same number of threads (another number may sum in another order).
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from minibert.files import check_length, decoded, lines_of, reading, unreadable
from minibert.processes import Team
from minibert.tagging.stream import POOL, POOL_CHARACTERS, pools, read_ahead

PAUSE_S = 0.01  # without input, after which the lines that are there are tagged
Line = tuple[int, bytes]  # line number from 1, and content with its line feed
Found = TypeVar("Found", covariant=True)


class Reader(Protocol[Found]):
    """What finds something in texts: ``Tagger`` a list of entities, ``Embedder`` a vector."""

    @property
    def depth(self) -> int:
        """How many pools are started before one is read."""

    def start(self, texts: Sequence[str]) -> Callable[[], Sequence[Found]]:
        """Start on a pool of texts; the result, when called, gives what was found in each."""


def process_lines(
    team: Team,
    reader: Reader[Found],
    pooled: Iterable[list[Line]],
    source: str,
    show: Callable[[str, Found], bytes],
    write: Callable[[bytes], object],
) -> None:
    """Read every line; the writer writes what was found in each, in order.

    Args:
        team: the processes, connected.
        reader, pooled: the same in every process; see ``pools_of`` and ``arriving``.
        source: where the lines come from, for error messages.
        show: formats a text and what was found in it, for output.
        write: receives the output, one pool at a time.

    Raises:
        MinibertError: a line is not UTF-8.
    """

    def started() -> Iterator[Callable[[], bytes]]:
        for number, pool in enumerate(pooled):
            owner = number % team.size
            if not pool:  # see ``arriving``
                yield bytes
            elif owner == team.rank:
                texts = [text_of(line, source) for line in pool]
                yield partial(_shown, texts, reader.start(texts), show)
            elif team.is_writer:
                yield partial(team.receive, owner)

    for raw in read_ahead(started(), reader.depth):
        write(raw) if team.is_writer else team.send(raw, 0)
    team.wait()


def pools_of(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines that are all there, in pools that depend on nothing else."""
    return pools(lines, lambda line: len(line[1]))


def arriving(handle: int, source: str) -> Iterator[list[Line]]:
    """Lines of a pipe or terminal in pools, each ended by its size or by a pause.

    After a pause an empty pool follows, so that ``read_ahead`` gives the one before it.

    Args:
        handle: file descriptor.
        source: for messages.

    Raises:
        MinibertError: it cannot be read, or a line has more than ``LINE_BYTES``.
    """
    number, rest = 1, b""
    pool: list[Line] = []
    held = 0
    while True:
        if pool and not select.select([handle], [], [], PAUSE_S)[0]:
            yield pool
            yield []
            pool, held = [], 0
        try:
            chunk = os.read(handle, 1 << 16)
        except OSError as error:
            raise unreadable(source, error) from None
        *whole, rest = re.split(rb"(?<=\n)", rest + chunk)
        if not chunk and rest:
            whole, rest = [rest], b""
        for line in whole:
            check_length(line, number, source)
            pool.append((number, line))
            number += 1
            held += len(line)
            if len(pool) == POOL or held > POOL_CHARACTERS:
                yield pool
                pool, held = [], 0
        check_length(rest, number, source)
        if not chunk:
            break
    if pool:
        yield pool


def _shown(
    texts: list[str],
    read: Callable[[], Sequence[Found]],
    show: Callable[[str, Found], bytes],
) -> bytes:
    return b"".join(show(text, found) for text, found in zip(texts, read()))


def opened(path: Path) -> Iterator[Line]:
    """The lines of a file, read one at a time; see ``files.lines_of``.

    Raises:
        MinibertError: not a regular file, or it cannot be read.
    """
    with reading(path, "name a file with one sentence per line") as file:
        yield from lines_of(file, path)


def text_of(line: Line, source: str) -> str:
    """The text of a line without its line end (LF or CRLF).

    Raises:
        MinibertError: the line is not UTF-8.
    """
    number, raw = line
    return decoded(raw.removesuffix(b"\n").removesuffix(b"\r"), source, number)
