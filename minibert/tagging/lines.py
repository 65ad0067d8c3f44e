"""Tag or embed lines of text in order, in constant memory, in one process or several.

    minibert tag runs/movie/best --file queries.txt --output tagged.txt
    torchrun --nproc-per-node 4 -m minibert.cli tag runs/movie/best --file queries.txt

Lines are read in pools (tagger.py). With N processes, rank r tags the pools r, r + N, ... and sends
the result to rank 0, the only one that writes. A pool makes the same batches in any process, so the
output is byte for byte that of one process with the same number of threads (another number may sum
in another order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from minibert.files import decoded, lines_of, reading
from minibert.processes import Team
from minibert.tagging.stream import pools, read_ahead

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
    lines: Iterable[Line],
    source: str,
    show: Callable[[str, Found], bytes],
    write: Callable[[bytes], object],
) -> None:
    """Read every line; the writer writes what was found in each, in order.

    Args:
        team: the processes, connected.
        reader, lines: the same in every process.
        source: where the lines come from, for error messages.
        show: formats a text and what was found in it, for output.
        write: receives the output, one pool at a time.

    Raises:
        MinibertError: a line is not UTF-8.
    """

    def started() -> Iterator[Callable[[], bytes]]:
        for number, pool in enumerate(pools(lines, lambda line: len(line[1]))):
            owner = number % team.size
            if owner == team.rank:
                texts = [text_of(line, source) for line in pool]
                yield partial(_shown, texts, reader.start(texts), show)
            elif team.is_writer:
                yield partial(team.receive, owner)

    for raw in read_ahead(started(), reader.depth):
        write(raw) if team.is_writer else team.send(raw, 0)
    team.wait()


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
