"""The output directory of a run: one owner at a time, and models that are replaced as a whole.

The owner holds a lock on ``OUTPUT/train.lock``, which contains its process id. The system releases
the lock when the process ends, so a file that a killed run leaves behind blocks nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minibert.files import TEMPORARY, MinibertError, reason, sync
from minibert.processes import Team

LOCK = "train.lock"
METRICS, FINISHED = "metrics.jsonl", "finished.json"
RESULTS = ("best", "last", METRICS, "report.json", "loss.png", FINISHED)
# A saved model. Without config.json nothing opens it, so that file is removed first.
MODEL_FILES = (
    *("config.json", "model.safetensors"),
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json"),
)
# The temporary names that a run uses, and no others.
OWN = re.compile(
    rf"\.({'|'.join(map(re.escape, (*RESULTS, *MODEL_FILES)))}|step-\d+)"
    rf"(\.\w{{8}}|\.old|{re.escape(TEMPORARY)})*{re.escape(TEMPORARY)}"
)


@dataclass(frozen=True)
class Output:
    """The output directory of a run.

    Args:
        path: the directory.
        lock: file descriptor of its lock; None in processes that do not write.
    """

    path: Path
    lock: int | None

    def at(self, name: str) -> Path:
        """The path to write ``name`` to.

        Raises:
            MinibertError: the directory has been renamed or removed since the run started.
        """
        if self.lock is not None and not _is_at(self.path / LOCK, self.lock):
            raise MinibertError(
                f"{self.path / name}: cannot be written (No such file or directory): {self.path} "
                "was renamed or removed: move it back, then continue with --resume"
            )
        return self.path / name

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """An empty directory that replaces the directory ``name`` at the end.

        If the body fails, ``name`` is unchanged. Files that only the old directory has are kept.

        Raises:
            MinibertError: the directory cannot be written or the disk is full.
        """
        target = self.at(name).resolve()
        new, old = (target.with_name(f".{target.name}{end}") for end in (TEMPORARY, ".old"))
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            if target.exists():
                shutil.copymode(target, new)
                os.replace(target, old)
            os.replace(new, target)
            _settle(target)
            sync(target.parent)
        except OSError as error:
            raise cannot_write(target, error) from None
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def discard(self, *names: str) -> None:
        """Delete results of an earlier run: files, and the model's files in directories.

        Raises:
            MinibertError: they cannot be deleted.
        """
        for name in names:
            path = self.at(name)
            is_model = path.is_dir()
            try:
                for file in (path / f for f in MODEL_FILES) if is_model else (path,):
                    file.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from None
            if is_model:
                with suppress(OSError):  # the user's files stay
                    path.rmdir()

    def sweep(self) -> None:
        """Delete the temporary files of a killed run, and finish what it was replacing.

        Raises:
            OSError: they cannot be deleted.
        """
        for name in ("best", "last"):
            _settle(self.at(name).resolve())
        for folder in (self.path, self.path / "checkpoints"):
            for path in list(folder.glob(f".*{TEMPORARY}")):
                if OWN.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cannot_write(path: Path, error: OSError) -> MinibertError:
    """The error with the path and the remedy."""
    return MinibertError(
        f"{path}: cannot be written ({reason(error)}): free some space there or make it writable, "
        "then continue with --resume"
    )


@contextmanager
def owned(path: Path, team: Team) -> Iterator[Output]:
    """Own a directory within the block; it is made if necessary, and removed if it stays empty.

    Raises:
        MinibertError: another run owns it, or it cannot be written.
    """
    if not team.is_writer:
        yield Output(path, None)
        return
    made: list[Path] = []
    try:
        try:
            made += [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path / LOCK)
        except OSError as error:
            raise MinibertError(
                f"{path}: cannot be written ({reason(error)}): "
                "give --output a directory that can be written"
            ) from None
        try:
            yield Output(path, lock)
        finally:
            if _is_at(path / LOCK, lock):
                with suppress(OSError):
                    (path / LOCK).unlink()
            else:  # renamed: what is there now belongs to someone else
                made.clear()
            os.close(lock)
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _lock(path: Path, mode: int = os.O_RDONLY) -> int:
    """The descriptor of a locked file.

    Raises:
        MinibertError: another process holds the lock.
    """
    flags = mode | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        handle = os.open(path, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 300).decode(errors="replace").strip()
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise MinibertError(
                    f"{path.parent}: process {holder} is training into it: "
                    "wait until it ends, or give another --output"
                ) from None
            if error.errno != errno.EBADF or mode == os.O_RDWR:
                raise
            return _lock(path, os.O_RDWR)  # NFS locks only files that are open for writing
        if _is_at(path, handle):
            path.write_text(f"{os.getpid()} on {platform.node()}\n", encoding="utf-8")
            return handle
        os.close(handle)  # its owner has just removed it


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except OSError:
        return False


def _settle(target: Path) -> None:
    """Finish ``Output.replacing``: restore the old directory, or delete it if a new one is there.

    Raises:
        OSError: it cannot be done.
    """
    old = target.with_name(f".{target.name}.old")
    if not old.is_dir():
        return
    if not target.exists():
        os.replace(old, target)
        return
    for path in list(old.iterdir()):
        if not (target / path.name).exists() and not OWN.fullmatch(path.name):
            os.replace(path, target / path.name)
    shutil.rmtree(old)
