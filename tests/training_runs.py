"""Real training runs of a tiny model, each in a process of its own that can be killed.

A process is forked from a server that has torch and train.py loaded already, so that starting one
takes milliseconds: it then is a process as any other, with its own memory, files and signals.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from minibert.files import write_text
from minibert.model.config import BertConfig
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


def write_bio(path: Path, sentences: list[Sentence]) -> Path:
    blocks = ["".join(f"{t}\t{w}\n" for w, t in zip(s.words, s.tags)) for s in sentences]
    write_text(path, "\n".join(blocks))
    return path


def tiny_model(
    folder: Path, sentences: list[Sentence], dropout: float = 0.1, size: int = 16
) -> Path:
    """A BERT of two layers, drawn at random, with a vocabulary of these sentences' words."""
    import torch

    from minibert import BertForTokenClassification

    words = sorted({word.lower() for sentence in sentences for word in sentence.words})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words[::2]]
    write_text(folder / "vocab.txt", "".join(f"{piece}\n" for piece in vocabulary))
    write_text(folder / "tokenizer_config.json", '{"do_lower_case": true}\n')
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        labels=labels_of(sentences),
    )
    torch.manual_seed(7)
    BertForTokenClassification(config).save_pretrained(folder)
    return folder


def demo_files(folder: Path, training: int = 60, test: int = 12) -> tuple[Path, Path]:
    """Two BIO files and, beside them, a tiny model that fits them."""
    train, held_out = demo.generate()
    tiny_model(folder / "model", train[:training] + held_out[:test])
    return (
        write_bio(folder / "train.bio", train[:training]),
        write_bio(folder / "test.bio", held_out[:test]),
    )


class Run:
    """A training process; what it prints goes to ``output.txt``.

    Args:
        arguments: of train.py.
        printed: file for its stdout and stderr, appended to.
        fatal: ("disk", n): it kills itself at the n-th call that changes the disk, whatever for;
            ("checkpoint", n): at the n-th step of writing checkpoints; None: at none.
        environment: variables set in it.
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
        """What it has printed so far."""
        return self.printed.read_bytes()[self.start :].decode()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120.0) -> int:
        """The exit status; the signal's number below zero where one killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.text()}")
        return self.process.exitcode

    def wait_until(self, condition, seconds: float = 60.0) -> None:
        """Until the condition holds; the process must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended early: {self.text()}"
            assert time.monotonic() < deadline, f"waited in vain: {self.text()}"
            time.sleep(0.001)


def run_team(size: int, arguments: list, folder: Path) -> list[Run]:
    """Several processes that train together, connected as torchrun connects them."""
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
    """In the new process: train.py with these arguments."""
    import threading

    import torch
    from tqdm import tqdm

    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed

    sys.path.insert(0, str(ROOT))
    import train

    handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    torch.set_num_threads(1)
    if fatal:
        die_at(*fatal)
    sys.exit(train.main(arguments))


def die_at(kind: str, call: int) -> None:
    """Have SIGKILL come at the ``call``-th of some calls: just before it or just after it."""
    from minibert.pretrained import weights
    from minibert.training import resume

    places = {
        "disk": [(os, name) for name in ("fsync", "replace", "mkdir", "rmdir", "unlink")],
        "checkpoint": [(weights, "write"), (resume, "described"), (resume, "sync")],
    }
    count = 0

    def deadly(function):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == call and call % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for module, name in places[kind]:
        setattr(module, name, deadly(getattr(module, name)))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every directory, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a directory"
        for path in sorted(folder.rglob("*"))
    }


def assert_same_tree(folder: Path, expected: Path) -> None:
    found, wanted = tree(folder), tree(expected)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if found[name] != wanted[name]]
    assert not different, f"other bytes in {', '.join(different)}"
