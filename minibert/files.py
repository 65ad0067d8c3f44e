"""Errors that a user reads, and files that are either complete or absent."""

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

JSON_BYTES = 100 << 20  # most in a JSON file; the largest known ones hold a vocabulary of 20 MB
LINE = 1000  # most characters in an error message

TEMPORARY = ".unfinished"  # suffix of temporary files and directories


class MinibertError(Exception):
    """A fault in the input, not in the program.

    The message is one line: where (file, line), what is wrong, and what to do. The command line
    prints it without a traceback and exits with status 2. Text from files and libraries cannot
    break the line; a long message keeps its two ends, which say where and what to do.
    """

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        if len(line) > LINE:
            line = f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
        super().__init__(line)


def home() -> Path:
    """Where downloads and compiled kernels go: ``$MINIBERT_HOME`` or ``~/.cache/minibert``."""
    return Path(os.environ.get("MINIBERT_HOME") or Path.home() / ".cache" / "minibert")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is synced and renamed to ``path`` at the end.

    If the body fails, ``path`` is unchanged and the temporary file is removed.

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
    """Write a text file atomically; see ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sweep(directory: Path) -> None:
    """Remove the temporary files and directories that a killed process left below ``directory``."""
    for path in list(directory.rglob(f".*{TEMPORARY}")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_text(path: Path, remedy: str) -> str:
    """Read a UTF-8 file.

    Raises:
        MinibertError: it cannot be read, or is not UTF-8.
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
            f"{path}: has {path.stat().st_size} bytes, more than the limit of {JSON_BYTES}: "
            "fetch the file again"
        )
    return parse_json(read_text(path, remedy), path)


def parse_json(text: str, source: Path | str) -> Any:
    """Parse JSON; unlike Python's ``json``, refuse NaN and repeated keys.

    Raises:
        MinibertError: not JSON, or nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name, times = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {name!r} occurs {times} times")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise MinibertError(f"{source}: not valid JSON ({error}): fetch the file again") from None


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
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
    """Return the whole pages in a range of memory to the system; on Linux only.

    Pages of a mapped file count as the process's memory from the first access until the file is
    closed. After this call they are read from the file again; other pages lose their contents.

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
