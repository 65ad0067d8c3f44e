"""Tokens per second by sentence length and by batch size, in the default format."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import workload
from benchmarks.workload import Workload

LENGTH = 16  # of the sentences in the curve over batch sizes


@torch.inference_mode()
def test_curves(race: Callable, work: Workload) -> None:
    shapes = [f"length {n}" for n in work.plan.lengths]
    shapes += [f"batch {n}" for n in work.plan.batch_sizes]
    models = {
        "minibert": work.tagger(workload.OURS).model,
        "transformers": work.theirs(workload.NATIVE),
    }

    def build(name: str) -> Callable[[], dict]:
        side, shape = name.split(", ")
        kind, size = shape.split()[0], int(shape.split()[1])
        rows, length = size, LENGTH
        if kind == "length":
            rows, length = max(1, work.plan.tokens // size), size
        ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))

        def run() -> dict:
            models[side](ids)
            return {"tokens": ids.numel()}

        return run

    race([f"{side}, {shape}" for shape in shapes for side in models], build, turns=2)
