"""Errors a user is meant to read, and files that are either whole or not there."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON_BYTES = 100 << 20  # of a file, at most; the largest there are hold a vocabulary of some 20 MB
LINE = 1000  # characters of an error, at most

TEMPORARY = ".unfinished"  # how the names of temporary files and directories end


class MinibertError(Exception):
    """A fault in what was given, not in the program.

    The message is one line: where (file, line), what, and what to do about it. The command line
    prints it without a traceback and exits with 2. What a file or a library put into it cannot
    break the line, nor make it endless: its two ends say where and what to do.
    """

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        if len(line) > LINE:
            line = f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
        super().__init__(line)


def home() -> Path:
    """Where downloads and compiled kernels live: ``$MINIBERT_HOME``, or ``~/.cache/minibert``."""
    return Path(os.environ.get("MINIBERT_HOME") or Path.home() / ".cache" / "minibert")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end it is synced and becomes ``path``.

    If the body fails, ``path`` is as it was and the temporary file is gone.

    Raises:
        MinibertError: the directory cannot be written or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        sync(temporary)
        os.replace(temporary, path)
        temporary = None
        sync(path.parent)
    except OSError as error:
        raise MinibertError(
            f"{path}: cannot be written ({error.strerror}): "
            "free some space or name a directory that can be written"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sweep(directory: Path) -> None:
    """Remove what a process that was killed while it wrote has left in and below a directory."""
    for path in list(directory.rglob(f".*{TEMPORARY}")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_text(path: Path, remedy: str) -> str:
    """Read a UTF-8 file.

    Raises:
        MinibertError: it cannot be read or is not UTF-8, with the line and the remedy.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MinibertError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise MinibertError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file; see ``parse_json``.

    Raises:
        MinibertError: it cannot be read, is too large, is not UTF-8, or is not JSON.
    """
    if path.is_file() and path.stat().st_size > JSON_BYTES:
        raise MinibertError(
            f"{path}: has {path.stat().st_size} bytes, and no such file has more than "
            f"{JSON_BYTES}: fetch the file again"
        )
    return parse_json(read_text(path, remedy), path)


def parse_json(text: str, source: Path | str) -> Any:
    """What a JSON text says, if it says one thing.

    Stricter than Python's own reader, which takes NaN for a number and the last of equal keys.

    Raises:
        MinibertError: not JSON, or nested deeper than Python can follow.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name, times = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {name!r} is there {times} times")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise MinibertError(f"{source}: not valid JSON ({error}): fetch the file again") from None


def sync(path: Path) -> None:
    """Have the kernel put a file or directory on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def give_back(address: int, size: int) -> None:
    """Give whole pages of memory that nobody will read again back to the system.

    Pages of a mapped file count as the process's memory from the first look at them until the file
    is closed. What they held is gone afterwards, or read from the file anew. Only on Linux.

    Args:
        address: of the first byte.
        size: in bytes.
    """
    if sys.platform != "linux":
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
        )
