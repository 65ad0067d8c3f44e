"""One sentence of 12 pieces, by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import bench_inference, stage
from benchmarks.stage import Padded, Place, Plan, Run
from minibert.machine import DTYPES

INFERENCE, TURNS, WARM_UP = True, 5, 3
PIECES, REPEATS = 12, 8


def subjects(plan: Plan) -> Sequence[str]:
    return (
        "ceiling fp32",
        "ceiling bf16",
        "minibert fp32",
        "minibert bf16",
        "transformers sdpa fp32",
        "transformers sdpa bf16",
        "onnxruntime fp32",
        "onnxruntime int8",
        "OpenVINO fp32",
        "OpenVINO bf16",
    )


def test_latency(found: dict) -> None:
    assert found["repeats"] == REPEATS


def build(subject: str, place: Place) -> Run:
    name = place.plan_name
    kind, dtype = subject.split()[0], subject.split()[-1]
    ids = torch.randint(5, 1000, (1, PIECES), generator=torch.Generator().manual_seed(0))
    batch = Padded(ids, torch.ones_like(ids))
    if kind == "ceiling":
        once = stage.prepacked_products(name, DTYPES[dtype], PIECES)
    elif kind == "minibert":
        model = stage.answering(name, DTYPES[dtype])
        once = lambda: model(*batch)  # noqa: E731
    else:
        bf16 = dtype == "bf16" and kind != "OpenVINO"
        model = stage.in_bf16(stage.theirs, name) if bf16 else stage.theirs(name)
        predict = bench_inference.predictor(subject, model, place)
        once = lambda: predict(batch)  # noqa: E731

    def run() -> dict:
        for _ in range(REPEATS):
            once()
        return {"repeats": REPEATS, "tokens": REPEATS * PIECES}

    return run
