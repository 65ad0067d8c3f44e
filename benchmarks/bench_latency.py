"""One sentence of 12 pieces, by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import bench_inference, stage
from benchmarks.stage import Padded, Place, Plan, Run

INFERENCE, TURNS, WARM_UP = True, 5, 3
PIECES, REPEATS = 12, 8


def subjects(plan: Plan) -> Sequence[str]:
    return (
        "ceiling fp32",
        "ceiling bf16",
        "ceiling fp16w",
        "minibert fp32",
        "minibert bf16",
        "minibert fp16w",
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
    if kind == "ceiling":  # the products of as many pieces at once: the weights are read once
        products = stage.prepacked_products(name, dtype, REPEATS * PIECES)
        return lambda: products() or {"repeats": REPEATS, "tokens": REPEATS * PIECES}
    if kind == "minibert":
        model = stage.answering(name, dtype)
        once = lambda: model(*batch)  # noqa: E731
    else:
        bf16 = dtype == "bf16" and kind != "OpenVINO"
        model = stage.in_dtype(stage.theirs, name, "bf16" if bf16 else "fp32")
        predict = bench_inference.predictor(subject, model, place)
        once = lambda: predict(batch)  # noqa: E731

    def run() -> dict:
        for _ in range(REPEATS):
            once()
        return {"repeats": REPEATS, "tokens": REPEATS * PIECES}

    return run
