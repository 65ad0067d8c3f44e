"""Several processes working on one job, as torchrun starts them.

    torchrun --nproc-per-node 2 train.py ...
    torchrun --nproc-per-node 4 -m minibert.cli tag DIR --file IN --output OUT

Rank 0 is the writer: it alone prints and writes files. In training each process reads its share of
every batch and ``DistributedDataParallel`` averages the gradients, so all of them hold the same
weights after every step. Without torchrun there is one process and nothing here costs anything.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minibert.files import MinibertError
from minibert.machine import choose_device

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # the other processes wait that long while the writer evaluates
MEETING = timedelta(minutes=5)  # at the start: how long a process waits for the others
NOTICE = timedelta(seconds=10)  # and after how long it says so


class Launched(NamedTuple):
    """What torchrun's environment says about this process; one process without it."""

    rank: int = 0
    size: int = 1  # number of processes
    local_rank: int = 0  # rank among the processes on this machine


def launched() -> Launched:
    """Read the environment that torchrun sets.

    Raises:
        MinibertError: a variable is missing or out of range.
    """
    size = _variable("WORLD_SIZE", 1, 10**6, 1)
    here = Launched(
        _variable("RANK", 0, size - 1, 0 if size == 1 else None),
        size,
        _variable("LOCAL_RANK", 0, 10**6, 0),
    )
    if size > 1:
        _variable("MASTER_PORT", 1, 65535, None)
        if not os.environ.get("MASTER_ADDR"):
            raise MinibertError("MASTER_ADDR is not set, but WORLD_SIZE is: start with torchrun")
    return here


def _variable(name: str, least: int, most: int, default: int | None) -> int:
    """A whole number from the environment; without a default it must be set."""
    given = os.environ.get(name)
    if given is None and default is not None:
        return default
    if given is None or not re.fullmatch("[0-9]{1,9}", given) or not least <= int(given) <= most:
        raise MinibertError(
            f"{name}={'(not set)' if given is None else given}: must be a number from {least} to "
            f"{most}: start several processes with torchrun, or unset WORLD_SIZE and RANK for one"
        )
    return int(given)


def own_device(name: str | None) -> torch.device:
    """This process's device: its own GPU if there are several, unless ``name`` has a number.

    Raises:
        MinibertError: as ``choose_device``.
    """
    device, here = choose_device(name), launched()
    if device.type == "cuda" and name in (None, "cuda") and here.size > 1:
        return torch.device("cuda", here.local_rank % torch.cuda.device_count())
    return device


class LostProcessError(MinibertError):
    """Another process of this run has ended.

    torch may wait at exit for answers that never come: end the process with ``os._exit``.
    """


@dataclass(frozen=True)
class Team:
    """The processes of one run, as seen from one of them.

    Args:
        rank: which process this is, from 0.
        size: number of processes.
        device: this process's device.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_writer(self) -> bool:
        """Whether this process evaluates, prints and writes files."""
        return self.rank == 0

    def seed(self, seed: int) -> None:
        """Give every process its own dropout masks; the writer keeps those it would draw alone."""
        if not self.is_writer:
            torch.manual_seed(((seed << 20) + self.rank) % 2**63)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch that every process knows; it may be empty."""
        return items[self.rank :: self.size]

    def total(self, x: Tensor) -> Tensor:
        """Sum ``x`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(...) from every process to (size, ...), on the CPU."""
        if self.size == 1:
            return x[None].cpu()
        parts = [torch.empty_like(x, device=self.device) for _ in range(self.size)]
        dist.all_gather(parts, x.to(self.device))
        return torch.stack(parts).cpu()

    def send(self, raw: bytes, rank: int) -> None:
        """Send bytes to another process; waits until they have been received."""
        dist.send(torch.tensor(len(raw)), rank)
        if raw:
            dist.send(torch.frombuffer(bytearray(raw), dtype=torch.uint8), rank)

    def receive(self, rank: int) -> bytes:
        """Wait for the bytes that another process sends."""
        size = torch.empty((), dtype=torch.int64)
        dist.recv(size, rank)
        raw = torch.empty(int(size), dtype=torch.uint8)
        if len(raw):
            dist.recv(raw, rank)
        return raw.numpy().tobytes()

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def writer_first(self) -> Iterator[None]:
        """The writer runs the block before the others, who find what it downloaded."""
        if not self.is_writer:
            self.wait()
        yield
        if self.is_writer:
            self.wait()

    def wrap(self, model: nn.Module, **inputs: object) -> nn.Module:
        """The model, with gradients averaged over the processes in each backward pass.

        Args:
            model: returns an output with a ``loss``.
            inputs: any batch, the same in every process; the weights do not change.
        """
        if self.size == 1:
            return model
        # After the first backward pass torch regroups the gradients by the order in which they
        # came. With three or more processes another grouping rounds differently, so without this
        # pass the first step after --resume would differ from the same step of the original run.
        shared = DistributedDataParallel(model)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            shared(**inputs).loss.backward()
        model.zero_grad()
        return shared

    def reduction(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around one of several accumulated batches: only the ``last`` exchanges gradients."""
        if not last and isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return nullcontext()


@contextmanager
def connected(device: torch.device, backend: str = "gloo") -> Iterator[Team]:
    """Connect the processes that torchrun started.

    Args:
        device: this process's, see ``own_device``.
        backend: "nccl" to exchange tensors on GPUs, "gloo" for tensors on the CPU.

    Raises:
        LostProcessError: another process has ended.
        MinibertError: the others do not come, or with nccl, two processes share a GPU.
    """
    here = launched()
    if here.size == 1:
        yield Team(0, 1, device)
        return
    if backend == "nccl" and device.index != here.local_rank:
        raise MinibertError(
            f"process {here.local_rank} of this machine cannot train on {device}: give --device "
            f"cuda without a number, and at most {torch.cuda.device_count()} processes"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _meet(here, backend)
    lost = False
    try:
        yield Team(here.rank, here.size, device)
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        if not lost:
            raise
        raise LostProcessError(
            "another process of this run has ended: its last line, or torchrun's, says why; "
            "fix that and repeat the command, in training with --resume"
        ) from None
    finally:
        if not lost:
            dist.destroy_process_group()


def _meet(here: Launched, backend: str) -> None:
    """Wait until every process has started, and connect them.

    Raises:
        MinibertError: they do not all come, or their address cannot be used.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    others = "RANK 0" if here.rank else f"RANK {', '.join(map(str, range(1, here.size)))}"
    mine = f"RANK {here.rank} of {here.size}, {host}:{port}"
    notice = threading.Timer(
        NOTICE.total_seconds(),
        lambda: print(f"{mine}: waiting for {others}, {MEETING} at most", file=sys.stderr),
    )
    notice.daemon = True
    notice.start()
    try:
        if here.rank:
            _reach(host, port)
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        store.set_timeout(TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise MinibertError(
            f"{mine}: cannot connect to {others} ({str(error).splitlines()[0]}): start every "
            "process, with the same MASTER_ADDR and a free MASTER_PORT"
        ) from None
    finally:
        notice.cancel()


def _reach(host: str, port: int) -> None:
    """Wait for rank 0. If torch did, it would print a stack trace at each attempt.

    Raises:
        OSError: it does not answer.
    """
    deadline = time.monotonic() + MEETING.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
