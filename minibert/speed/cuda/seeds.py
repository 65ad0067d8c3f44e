"""The seeds of dropout masks, numbers in the device's memory from torch's generator of the device.

``torch.manual_seed`` fixes them, and a captured CUDA graph draws new ones at every replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

AT_ONCE = 64  # BERT-base needs 36 in a pass
_drawn: ContextVar[dict[torch.device, list[Tensor]] | None] = ContextVar("_drawn", default=None)


@contextmanager
def one_draw() -> Iterator[None]:
    """Inside, one draw gives the seeds of many masks: a launch less for each of them.

    The generator fixes the masks as it does outside, but they are not the same ones. What is left
    of a draw is not used outside.
    """
    token = _drawn.set({})
    try:
        yield
    finally:
        _drawn.reset(token)


def draw(device: torch.device) -> Tensor:
    """A seed on that device, (1,) int64."""
    drawn = None if torch.compiler.is_compiling() else _drawn.get()  # which it cannot read
    if drawn is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if not (seeds := drawn.setdefault(device, [])):
        seeds.extend(torch.randint(2**63 - 1, (AT_ONCE, 1), device=device).unbind())
    return seeds.pop()
