"""Latency of one sentence of 12 word-pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import bench_inference, workload
from benchmarks.workload import Workload

PIECES, REPEATS = 12, 8
NAMES = (
    "ceiling fp32",
    "ceiling bf16",
    "ceiling fp16w",
    "ceiling int8",
    "minibert fp32",
    "minibert bf16",
    "minibert fp16w",
    "minibert int8",
    "transformers sdpa fp32",
    "transformers sdpa bf16",
    "onnxruntime fp32",
    "onnxruntime int8",
    "OpenVINO fp32",
    "OpenVINO bf16",
    "OpenVINO int8",
)


@torch.inference_mode()
def test_latency(race: Callable, work: Workload) -> None:
    names = filter(workload.runs_here, NAMES)
    race(
        names,
        lambda name: build(name, work),
        work.plan.turns,
        warm_up=3,
        pause=bench_inference.PAUSE,
    )


def build(name: str, work: Workload) -> Callable[[], dict]:
    kind, dtype = name.split()[0], name.split()[-1]
    ids = torch.randint(5, 1000, (1, PIECES), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = {"repeats": REPEATS, "tokens": REPEATS * PIECES}
    if kind == "ceiling":  # all pieces in one product: the weights are read once
        products = workload.prepacked_products(work.tagger(dtype).model, REPEATS * PIECES)
        return lambda: products() or found
    if kind == "minibert":
        model = work.tagger(dtype).model
        once = lambda: model(**inputs)  # noqa: E731
    else:
        predict = bench_inference.predictor(name, work)
        once = lambda: predict(inputs)  # noqa: E731

    def run() -> dict:
        for _ in range(REPEATS):
            once()
        return found

    return run
