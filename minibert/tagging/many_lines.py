"""Lines of any number tagged in order, by one process or by several, in memory that does not grow.

    minibert tag runs/movie/best --file queries.txt --output tagged.txt
    torchrun --nproc-per-node 4 -m minibert.cli tag runs/movie/best --file queries.txt

Lines are taken in pools (tagger.py). Of N processes the one of rank r tags the pools r, r + N, ...
and sends what it made of them to rank 0, which alone writes. Whoever tags a pool sees the same
sentences in the same batches, so the output is that of one process, byte for byte, as long as a
process has the same number of threads: with another, torch may add up in another order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from minibert.files import MinibertError
from minibert.machine import choose_device
from minibert.tagging.stream import pools, read_ahead
from minibert.tagging.tagger import Tagger
from minibert.tagging.words import Entity

PATIENCE = timedelta(hours=1)  # for a pool that another process tags
Line = tuple[int, bytes]  # its number, from 1, and what it holds, the line's end included


def tag_lines(
    tagger: Tagger,
    lines: Iterable[Line],
    source: str,
    show: Callable[[str, list[Entity]], str],
    write: Callable[[bytes], object],
) -> None:
    """Tag every line; rank 0 writes one line for each, in their order.

    Args:
        tagger: in every process the same.
        lines: in every process the same.
        source: where they are from, for messages.
        show: what to write of a text and its entities, without a line's end.
        write: gets UTF-8, a pool at a time.

    Raises:
        MinibertError: a line that is not UTF-8, or another process that has ended.
    """
    rank, size = rank_and_size()

    def asked() -> Iterator[Callable[[], bytes]]:
        for number, pool in enumerate(pools(lines, lambda line: len(line[1]))):
            owner = number % size
            if owner == rank:
                texts = [decoded(line, source) for line in pool]
                yield partial(_shown, texts, tagger.start(texts), show)
            elif rank == 0:
                yield partial(_receive, owner)

    for raw in read_ahead(asked(), tagger.depth):
        write(raw) if rank == 0 else _send(raw)


def _shown(
    texts: list[str],
    read: Callable[[], list[list[Entity]]],
    show: Callable[[str, list[Entity]], str],
) -> bytes:
    return "".join(f"{show(text, found)}\n" for text, found in zip(texts, read())).encode()


def rank_and_size() -> tuple[int, int]:
    """Which of the processes that torchrun started this one is, and how many; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def connected() -> Iterator[None]:
    """The processes that torchrun started can send to each other; one alone needs nothing."""
    if rank_and_size()[1] == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)  # what is sent lies on the CPU
    try:
        yield
        with _others():
            dist.barrier()  # nobody hangs up before all has arrived
    finally:
        dist.destroy_process_group()


def own_device(name: str | None) -> str | None:
    """Of several GPUs every process takes its own, unless one is named by number."""
    device = choose_device(name)
    if device.type == "cuda" and name in (None, "cuda") and rank_and_size()[1] > 1:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return name


def numbered(file: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a file opened in binary. Only a line feed ends one, whatever else it holds."""
    return enumerate(file, start=1)


def opened(path: Path) -> Iterator[Line]:
    """The lines of a file, read as they are asked for.

    Raises:
        MinibertError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from numbered(file)
    except OSError as error:
        raise MinibertError(
            f"{path}: cannot be read ({error.strerror}): name a file with one sentence a line"
        ) from None


def decoded(line: Line, source: str) -> str:
    """The text of a line without its end.

    Raises:
        MinibertError: it is not UTF-8.
    """
    number, raw = line
    try:
        return raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise MinibertError(
            f"{source}:{number}: byte 0x{raw[error.start]:02x} is not UTF-8: convert it first"
        ) from None


def _send(raw: bytes) -> None:
    with _others():
        dist.send(torch.tensor(len(raw)), 0)
        if raw:
            dist.send(torch.frombuffer(bytearray(raw), dtype=torch.uint8), 0)


def _receive(rank: int) -> bytes:
    with _others():
        size = torch.empty((), dtype=torch.int64)
        dist.recv(size, rank)
        raw = torch.empty(int(size), dtype=torch.uint8)
        if len(raw):
            dist.recv(raw, rank)
    return raw.numpy().tobytes()


@contextmanager
def _others() -> Iterator[None]:
    """torch's RuntimeError over a broken connection becomes one line."""
    try:
        yield
    except RuntimeError as error:
        raise MinibertError(
            f"another process has ended ({error}): see what it or the system said of it, "
            "and repeat the command"
        ) from None
