"""Training runs of a tiny model, each in its own process, which tests can kill.

The processes are forked from a server that has loaded torch and train.py, so one starts in
milliseconds. Memory, files and signals are the process's own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import builders
from builders import write_bio

from minibert.text import demo
from minibert.text.bio import Sentence, labels_of

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("train", "training_runs", "safetensors.torch", "tokenizers"),
        *("matplotlib.figure", "matplotlib.backends.backend_agg"),
    ]
)


def tiny_model(folder: Path, sentences: list[Sentence], dropout: float = 0.1) -> Path:
    """A saved model of 16 hidden units that knows the words of these sentences."""
    return builders.small_checkpoint(
        folder,
        words=sorted({word.lower() for sentence in sentences for word in sentence.words}),
        noise=0.0,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        labels=labels_of(sentences),
    )


def demo_files(folder: Path, training: int = 60, test: int = 12) -> tuple[Path, Path]:
    """Write two BIO files and, next to them, a tiny model for them."""
    train, held_out = demo.generate()
    tiny_model(folder / "model", train[:training] + held_out[:test])
    return (
        write_bio(folder / "train.bio", train[:training]),
        write_bio(folder / "test.bio", held_out[:test]),
    )


class Run:
    """A training process.

    Args:
        arguments: of train.py; after a first "pretrain" those of ``minibert pretrain``.
        printed: file that its stdout and stderr are appended to.
        fatal: (kind, n): it kills itself at the n-th call of that kind in ``KILL_POINTS``.
        environment: variables to set in it.
    """

    def __init__(
        self,
        arguments: list,
        printed: Path,
        fatal: tuple[str, int] | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.printed = printed
        printed.touch()
        self.start = printed.stat().st_size
        self.process: BaseProcess = SERVER.Process(
            target=train_here,
            args=([str(a) for a in arguments], str(printed), fatal, environment or {}),
        )
        self.process.start()

    def text(self) -> str:
        """Its output so far."""
        return self.printed.read_bytes()[self.start :].decode()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120.0) -> int:
        """The exit status; minus the signal's number if one killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.text()}")
        return self.process.exitcode

    def wait_until(self, condition, seconds: float = 60.0) -> None:
        """Wait for the condition; the process must not end before it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended early: {self.text()}"
            assert time.monotonic() < deadline, f"timeout: {self.text()}"
            time.sleep(0.001)


def run_team(size: int, arguments: list, folder: Path) -> list[Run]:
    """Start processes that train together, with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        Run(arguments, folder / f"rank{rank}.txt", None, shared | {"RANK": str(rank)})
        for rank in range(size)
    ]


def train_here(
    arguments: list[str],
    printed: str,
    fatal: tuple[str, int] | None,
    environment: dict[str, str],
) -> None:
    """Run train.py, in the new process."""
    import threading

    import torch
    from tqdm import tqdm

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # tqdm's default lock outlives a killed process

    sys.path.insert(0, str(ROOT))
    import train

    handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    torch.set_num_threads(1)
    if fatal:
        die_at(*fatal)
    if arguments[:1] == ["pretrain"]:
        from minibert.training import pretrain

        sys.exit(pretrain.main(arguments[1:]))
    sys.exit(train.main(arguments))


# Module and name of functions: any change to the disk; the steps of writing a checkpoint.
KILL_POINTS = {
    "disk": [("os", name) for name in ("fsync", "replace", "mkdir", "rmdir", "unlink")],
    "checkpoint": [
        ("minibert.pretrained.weights", "write"),
        ("minibert.training.resume", "manifest_of"),
        ("minibert.training.resume", "sync"),
    ],
}


def die_at(kind: str, call: int) -> None:
    """SIGKILL at the ``call``-th call of a kill point: before it if odd, after it if even."""
    count = 0

    def deadly(function):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == call and call % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **options)
            finally:  # also after a call that fails, such as unlinking what is not there
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for module, name in KILL_POINTS[kind]:
        home = importlib.import_module(module)
        setattr(home, name, deadly(getattr(home, name)))


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder by path, and every directory."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a directory"
        for path in sorted(folder.rglob("*"))
    }


def assert_same_tree(folder: Path, expected: Path) -> None:
    found, wanted = tree(folder), tree(expected)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if found[name] != wanted[name]]
    assert not different, f"different bytes in {', '.join(different)}"
