"""Clipping and AdamW alone: one step over all parameters of BERT-base."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import workload
from benchmarks.steps import DECAY, LR
from benchmarks.workload import Workload
from minibert.training.adamw import AdamW, FusedAdamW, Group

NAMES = ("ceiling", "minibert plain", "minibert", "torch AdamW", "torch AdamW(fused=True)")


def test_adamw(race: Callable, work: Workload) -> None:
    race(NAMES, lambda name: build(name, work), work.plan.turns)


def build(name: str, work: Workload) -> Callable[[], dict | None]:
    parameters = list(work.ours.parameters())
    if name == "ceiling":
        # The norm reads the gradient; AdamW reads four numbers and writes three.
        return workload.moved(32 * sum(p.numel() for p in parameters))
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    bound = float(torch.nn.utils.get_total_norm(p.grad for p in parameters))
    if name.startswith("minibert"):
        kind = AdamW if "plain" in name else FusedAdamW
        ours = kind([Group(parameters, DECAY)])
        step = lambda: ours.clipped_step(LR, bound)  # noqa: E731
    else:
        theirs = torch.optim.AdamW(parameters, LR, weight_decay=DECAY, fused="fused" in name)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, bound)
            theirs.step()

    def run() -> None:
        nonlocal bound
        bound /= 2  # so that every step clips
        step()

    return run
