"""Errors that a user reads, input that is limited, and output that is either complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import secrets
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

TEXT_BYTES = 100 << 20  # most in a file that is read whole; a vocabulary has up to 20 MB
LINE_BYTES = 8 << 20  # most in a line, and in a text from standard input
LINE = 1000  # most characters in an error message
LEAST_MEMORY = 700 * 10**6  # bytes of address space, without which OpenBLAS aborts the process

TEMPORARY = ".unfinished"  # suffix of temporary files and directories


# Controls other than tab and line feed, C1 included; bidirectional controls; separators of lines
# and paragraphs; surrogates, which UTF-8 cannot encode.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Text for a terminal: what could control it is shown as an escape, ``\x1b`` or ``\u202e``."""

    def escape(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return UNSAFE.sub(escape, text)


class MinibertError(Exception):
    """A fault in the input, not in the program.

    The message is one line: where (file, line), what is wrong, and what to do. The command line
    prints it without a traceback and exits with status 2. Text from files and libraries cannot
    break the line or control the terminal; a long message keeps its two ends, which say where and
    what to do.
    """

    def __init__(self, message: str):
        line = visible(" ".join(message.splitlines()))
        if len(line) > LINE:
            line = f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
        super().__init__(line)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """For messages: ``, did you mean NAME``, or nothing where no known name is close."""
    close = get_close_matches(word, list(known), 1)
    return f", did you mean {close[0]}" if close else ""


def reason(error: OSError) -> str:
    """What the system says, or the library that raised the error."""
    return error.strerror or str(error) or type(error).__name__


def fill_closed_streams() -> None:
    """Open /dev/null where a standard stream is closed.

    Else the next file that is opened would get its number, and with it what libraries print.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free number
        pass
    os.close(handle)


@contextmanager
def machine_faults() -> Iterator[None]:
    """Turn what the machine refuses, memory or a file, into a ``MinibertError``.

    For the outermost level of a command. A closed pipe stays a ``BrokenPipeError``.
    """
    try:
        with memory_faults():
            yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        )
        raise MinibertError(
            f"{where}{reason(error)}: check the path, its permissions and the limits of the system"
        ) from None


@contextmanager
def memory_faults() -> Iterator[None]:
    """Turn a lack of memory or threads into a ``MinibertError``."""
    try:
        yield
    except Exception as error:
        if lack := out_of_memory(error):
            raise lack from None
        raise


def out_of_memory(error: Exception) -> MinibertError | None:
    """The error to raise in place of one that says that memory or threads are short; or None."""
    said = str(error)
    # torch: "can't allocate memory", "out of memory"; the loader: "failed to map segment";
    # safetensors: "Cannot allocate memory".
    short = r"(?i)allocate memory|out of memory|failed to map segment|can't start new thread"
    if isinstance(error, MinibertError) or not (
        isinstance(error, MemoryError) or re.search(short, said)
    ):
        return None
    return MinibertError(
        f"out of memory ({said[:200] or type(error).__name__}): free some, raise the limit "
        "(ulimit -v) or give a smaller input"
    )


def check_memory_limit() -> None:
    """Refuse a limit on memory (``ulimit -v``) under which importing torch aborts the process.

    Raises:
        MinibertError: the limit is below ``LEAST_MEMORY``.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_MEMORY:
        raise MinibertError(
            f"the limit on memory is {limit // 10**6} MB (ulimit -v): importing torch needs "
            f"{LEAST_MEMORY // 10**6}, a model more: raise it"
        )


def stop_if_memory_is_short(program: str) -> None:
    """``check_memory_limit`` for a program that imports torch at its top: print the error and exit.

    Args:
        program: its name in the error.
    """
    try:
        check_memory_limit()
    except MinibertError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


def home() -> Path:
    """Where downloads and compiled kernels go: ``$MINIBERT_HOME`` or ``~/.cache/minibert``.

    Raises:
        MinibertError: this user has no home directory.
    """
    if given := os.environ.get("MINIBERT_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "minibert"
    except RuntimeError:
        raise MinibertError(
            "this user has no home directory: set MINIBERT_HOME to a writable directory"
        ) from None


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[BinaryIO]:
    """Open an input file; only a regular file, or a link to one.

    FIFOs and devices could block forever or never end.

    Raises:
        MinibertError: it is not a regular file, or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise MinibertError(f"{path}: is {_kind(mode)}, not a regular file: {remedy}")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise MinibertError(f"{path}: cannot be read ({reason(error)}): {remedy}") from None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is synced and renamed to ``path`` at the end.

    If the body fails, ``path`` is unchanged and the temporary file is removed. A link stays and its
    target is replaced. The mode is that of the file before, or what the umask leaves. A device or
    FIFO cannot be replaced: the body writes into it.

    Raises:
        MinibertError: ``path`` is a directory, it cannot be written or the disk is full.
    """
    temporary = None
    try:
        try:
            before = os.stat(path).st_mode
        except FileNotFoundError:
            before = None
        if before is not None and stat.S_ISDIR(before):
            raise MinibertError(f"{path}: is a directory: name a file to write")
        if before is not None and not stat.S_ISREG(before):
            yield path
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Eight characters, by which the sweep of an output directory knows it (training/output.py).
        new = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}{TEMPORARY}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        os.close(os.open(new, flags, 0o666 if before is None else 0o600))
        temporary = new
        yield temporary
        if before is not None:
            temporary.chmod(stat.S_IMODE(before))
        sync(temporary)
        os.replace(temporary, target)
        temporary = None
        sync(target.parent)
    except OSError as error:
        raise MinibertError(
            f"{path}: cannot be written ({reason(error)}): "
            "free some space or name a directory that can be written"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; see ``replacing``.

    Surrogates, as in file names that are not UTF-8, become escapes.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: Path, remedy: str) -> str:
    """Read a UTF-8 file of at most ``TEXT_BYTES``.

    Raises:
        MinibertError: it cannot be read, is too large, or is not UTF-8.
    """
    with reading(path, remedy) as file:
        raw = file.read(TEXT_BYTES + 1)
    if len(raw) > TEXT_BYTES:
        raise MinibertError(f"{path}: more than the limit of {TEXT_BYTES} bytes: {remedy}")
    return decoded(raw, path).removeprefix("\ufeff")


def decoded(raw: bytes, source: Path | str, line: int = 1) -> str:
    """Decode UTF-8.

    Args:
        raw: the bytes.
        source: where they come from, for the message.
        line: number of the first line.

    Raises:
        MinibertError: it is not UTF-8; names the line.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise MinibertError(
            f"{source}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8: convert it first"
        ) from None


def lines_of(file: BinaryIO, source: Path | str) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and content of each line, its line feed included, in constant memory.

    Only a line feed ends a line.

    Raises:
        MinibertError: it cannot be read, or a line has more than ``LINE_BYTES``.
    """
    number = 1
    try:
        while line := file.readline(LINE_BYTES + 1):
            check_length(line, number, source)
            yield number, line
            number += 1
    except OSError as error:
        raise unreadable(source, error) from None


def check_length(line: bytes, number: int, source: Path | str) -> None:
    """Refuse a line of more than ``LINE_BYTES``.

    Raises:
        MinibertError: it has more.
    """
    if len(line) > LINE_BYTES:
        raise MinibertError(
            f"{source}:{number}: the line has more than {LINE_BYTES} bytes: "
            "write one sentence per line"
        )


def unreadable(source: Path | str, error: OSError) -> MinibertError:
    """The error for a stream of lines."""
    return MinibertError(
        f"{source}: cannot be read ({reason(error)}): give text, one sentence per line"
    )


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file; see ``parse_json``.

    Raises:
        MinibertError: it cannot be read, is too large, is not UTF-8, or is not JSON.
    """
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
