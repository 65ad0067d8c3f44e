"""Several processes that train one model: who they are, and what they tell each other.

``torchrun --nproc-per-node N train.py ...`` starts N copies of the same program. Each takes its
share of every batch, torch's ``DistributedDataParallel`` adds up the gradients, and so all of them
hold the same weights after every step. One of them, the writer, evaluates and writes the files.
A program started without torchrun is a team of one, and nothing here costs it anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minibert.files import MinibertError

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # for the others while the writer evaluates


class AloneError(MinibertError):
    """Another process of the run has ended.

    What this one had sent it will never be answered, and torch may wait for that when the program
    ends: end it by ``os._exit``.
    """


@dataclass(frozen=True)
class Team:
    """The processes of one run.

    Args:
        rank: which of them this one is, from 0.
        size: how many there are.
        device: this one's own.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_writer(self) -> bool:
        """Whether this one evaluates, prints and writes the files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch, which all of them know whole; it may be empty."""
        return items[self.rank :: self.size]

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(...) of every process to (size, ...), on the CPU."""
        if self.size == 1:
            return x[None].cpu()
        parts = [torch.empty_like(x, device=self.device) for _ in range(self.size)]
        dist.all_gather(parts, x.to(self.device))
        return torch.stack(parts).cpu()

    @contextmanager
    def writer_first(self) -> Iterator[None]:
        """The writer runs the block before the others: what it downloads, they find."""
        if self.size > 1 and not self.is_writer:
            dist.barrier()
        yield
        if self.size > 1 and self.is_writer:
            dist.barrier()

    def wrap(self, model: nn.Module, **inputs: object) -> nn.Module:
        """The model, its gradients averaged over the processes after each backward pass.

        Args:
            model: gives an output with a ``loss``.
            inputs: some batch, the same in every process; nothing is learned of it.
        """
        if self.size == 1:
            return model
        # Its first backward pass teaches torch in which order the gradients come, and from the
        # next one on it arranges them so. Sums over three or more processes round by the
        # arrangement: without a pass ahead, the first step after a resumption would differ.
        shared = DistributedDataParallel(model)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            shared(**inputs).loss.backward()
        model.zero_grad()
        return shared

    def reduction(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around one batch of several: only the ``last`` one's backward pass averages them all."""
        if not last and isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return nullcontext()


@contextmanager
def team_on(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, connected by gloo on CPUs and nccl on GPUs.

    Args:
        device: where to train; of several GPUs every process takes its own.

    Raises:
        AloneError: another process has ended and left this one alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), size, device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise AloneError(
            "another process of the run has ended: its own last line, or torchrun's, says why: "
            "when that is mended, go on with --resume"
        ) from None
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
