"""Times of several things by turns, on a GPU or a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Step = Callable[[], Any]
Name = TypeVar("Name")


def milliseconds(step: Step, device: torch.device) -> float:
    """One call; the device is waited for before and after it, never within."""
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - started)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def interleaved(
    steps: Mapping[Name, Step], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[Name, list[float]]:
    """Milliseconds of every step in every round, after some that do not count.

    By turns (a b c, a b c, ...), so that clocks that sink as the device grows warm sink for all.
    """
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for turn in range(-warm_up, rounds):
        for name, step in steps.items():
            elapsed = milliseconds(step, device)
            if turn >= 0:
                times[name].append(elapsed)
    return times
