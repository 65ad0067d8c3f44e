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
    make = stage.ours if subject.startswith(("minibert", "ceiling")) else stage.theirs
    bf16 = subject.endswith("bf16") and not subject.startswith("OpenVINO")
    model = stage.in_bf16(make, name) if bf16 else make(name)
    ids = torch.randint(5, 1000, (1, PIECES), generator=torch.Generator().manual_seed(0))
    batch = Padded(ids, torch.ones_like(ids))
    if subject.startswith("ceiling"):
        # The weights of the linear layers are read once.
        weights = [layer.weight for layer in stage.linears(model)]
        once = stage.moved(sum(w.nbytes for w in weights))
    elif subject.startswith("minibert"):
        once = lambda: model(*batch)  # noqa: E731
    else:
        predict = bench_inference.predictor(subject, model, place)
        once = lambda: predict(batch)  # noqa: E731

    def run() -> dict:
        for _ in range(REPEATS):
            once()
        return {"repeats": REPEATS, "tokens": REPEATS * PIECES}

    return run
