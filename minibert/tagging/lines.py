"""Tag lines of text in order, in constant memory, in one process or several.

    minibert tag runs/movie/best --file queries.txt --output tagged.txt
    torchrun --nproc-per-node 4 -m minibert.cli tag runs/movie/best --file queries.txt

Lines are read in pools (tagger.py). With N processes, rank r tags the pools r, r + N, ... and sends
the result to rank 0, the only one that writes. A pool makes the same batches in any process, so the
output is byte for byte that of one process with the same number of threads (another number may sum
in another order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from minibert.files import decoded, lines_of, reading
from minibert.processes import Team
from minibert.tagging.saved import OnTexts
from minibert.tagging.stream import pools, read_ahead
from minibert.tagging.tagger import Tagger
from minibert.tagging.words import Entity

Line = tuple[int, bytes]  # line number from 1, and content with its line feed


def tag_lines(
    team: Team,
    tagger: Tagger | OnTexts,
    lines: Iterable[Line],
    source: str,
    show: Callable[[str, list[Entity]], str],
    write: Callable[[bytes], object],
) -> None:
    """Tag every line; the writer writes one line of output for each, in order.

    Args:
        team: the processes, connected.
        tagger, lines: the same in every process.
        source: where the lines come from, for error messages.
        show: formats a text and its entities, without a line feed.
        write: receives UTF-8, one pool at a time.

    Raises:
        MinibertError: a line is not UTF-8.
    """

    def started() -> Iterator[Callable[[], bytes]]:
        for number, pool in enumerate(pools(lines, lambda line: len(line[1]))):
            owner = number % team.size
            if owner == team.rank:
                texts = [text_of(line, source) for line in pool]
                yield partial(_shown, texts, tagger.start(texts), show)
            elif team.is_writer:
                yield partial(team.receive, owner)

    for raw in read_ahead(started(), tagger.depth):
        write(raw) if team.is_writer else team.send(raw, 0)
    team.wait()


def _shown(
    texts: list[str],
    read: Callable[[], list[list[Entity]]],
    show: Callable[[str, list[Entity]], str],
) -> bytes:
    return "".join(f"{show(text, found)}\n" for text, found in zip(texts, read())).encode()


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
