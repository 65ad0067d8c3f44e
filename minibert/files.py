"""Errors a user is meant to read, and files that are either whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".unfinished"  # how the names of temporary files and directories end


class MinibertError(Exception):
    """A fault in what was given, not in the program.

    The message is one line: where (file, line), what, and what to do about it. The command line
    prints it without a traceback and exits with 2.
    """


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
