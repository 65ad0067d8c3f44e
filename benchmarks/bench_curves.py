"""Tokens a second against the sentences' length and the batch's size, by the fastest formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import stage
from benchmarks.stage import Place, Plan, Run

INFERENCE, TURNS, WARM_UP = True, 2, 1
SIDES = ("minibert", "transformers")
LENGTH = 16  # of the sentences of the curve over batch sizes


def subjects(plan: Plan) -> Sequence[str]:
    shapes = [f"length {n}" for n in plan.lengths] + [f"batch {n}" for n in plan.batch_sizes]
    return [f"{side}, {shape}" for shape in shapes for side in SIDES]


def test_curves(found: dict) -> None:
    assert found["tokens"] > 0


def build(subject: str, place: Place) -> Run:
    side, shape = subject.split(", ")
    kind, number = shape.split()
    size = int(number)
    rows, length = (max(1, place.plan.tokens // size), size) if kind == "length" else (size, LENGTH)
    name = place.plan_name
    if side == "minibert":
        model: nn.Module = stage.answering(name, stage.OURS)
    else:
        model = stage.in_dtype(stage.theirs, name, stage.NATIVE)
    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))

    def run() -> dict:
        model(ids)
        return {"tokens": ids.numel(), "curve": kind, "x": size, "side": side}

    return run
