"""AdamW with clipping, alone: one step over all parameters of BERT-base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import stage
from benchmarks.bench_training import DECAY, LR
from benchmarks.stage import Place, Plan, Run
from minibert.training.adamw import AdamW, FusedAdamW, Group

INFERENCE, TURNS, WARM_UP = False, 5, 1


def subjects(plan: Plan) -> Sequence[str]:
    return ("ceiling", "minibert plain", "minibert", "torch AdamW", "torch AdamW(fused=True)")


def test_adamw(found: dict) -> None:
    assert found["parameters"] > 0


def build(subject: str, place: Place) -> Run:
    parameters = list(stage.ours(place.plan_name).parameters())
    count = sum(p.numel() for p in parameters)
    if subject == "ceiling":
        # The norm reads the gradient; AdamW reads four numbers and writes three.
        run = stage.moved(32 * count)
        return lambda: run() or {"parameters": count}
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    bound = float(torch.nn.utils.get_total_norm(p.grad for p in parameters))
    if subject.startswith("minibert"):
        kind = AdamW if "plain" in subject else FusedAdamW
        ours = kind([Group(parameters, DECAY)])
        step = lambda: ours.clipped_step(LR, bound)  # noqa: E731
    else:
        theirs = torch.optim.AdamW(parameters, LR, weight_decay=DECAY, fused="fused" in subject)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, bound)
            theirs.step()

    def run_one() -> dict:
        nonlocal bound
        bound /= 2  # so that there is something to clip each time
        step()
        return {"parameters": count}

    return run_one
