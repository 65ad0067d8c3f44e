"""Where the time goes: torch's profiler over one pass of ours and of transformers'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_latency, bench_training, stage
from benchmarks.stage import Place, Plan, Run
from minibert.speed.memory import keep_freed_memory
from minibert.tagging.tagger import Tagger

INFERENCE, TURNS, WARM_UP = False, 1, 1
ROOM = 2**30 - 2**20  # bytes; of blocks below 1 GB keep_freed_memory lets nothing go
# The first that is part of the operation's name.
KINDS = {
    "products": ("mm", "linear", "mkldnn"),
    "AdamW": ("adamw", "lerp_", "addcmul_", "addcdiv_", "sqrt"),
    "norm of the gradients": ("vector_norm",),
    "copies and casts": ("copy_", "aten::cat"),
    "filling with zeros": ("fill_", "zero_"),
    "dropout's random numbers": ("bernoulli_",),
    "LayerNorm": ("layer_norm",),
    "GELU": ("gelu",),
    "attention": ("attention", "softmax"),
}


def subjects(plan: Plan) -> Sequence[str]:
    return (
        "minibert, inference",
        "minibert, one sentence",
        "minibert, training",
        "transformers, training",
    )


def test_profile(found: dict) -> None:
    assert sum(found["shares"].values()) > 0.99


def build(subject: str, place: Place) -> Run:
    side, what = subject.split(", ")
    if what == "training":
        names = bench_training.subjects(place.plan)
        name = next(n for n in names if n.startswith(side) and (side == "minibert" or "fused" in n))
        once = bench_training.build(name, place)
    elif what == "one sentence":
        latency = bench_latency.build(f"minibert {stage.OURS}", place)
        with torch.inference_mode():
            latency()
        once = torch.inference_mode()(latency)
    else:
        model = stage.answering(place.plan_name, stage.OURS)
        examples = stage.test_examples(place.plan_name)
        batches = list(Tagger(model, stage.tokenizer())._batches(examples))
        once = lambda: [model(**batch.inputs) for batch in batches]  # noqa: E731

    def run() -> dict:
        # The profiler's notes are written into freed memory, and what no longer fits there would be
        # fetched from the system, page by page, and be taken for the time of whoever fills it.
        keep_freed_memory()
        torch.zeros(ROOM, dtype=torch.uint8)
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            once()
        spent: Counter[str] = Counter()
        for event in watched.key_averages():
            kinds = (k for k, parts in KINDS.items() if any(p in event.key for p in parts))
            spent[next(kinds, "the rest")] += event.self_cpu_time_total
        total = sum(spent.values())
        return {"shares": {kind: time / total for kind, time in spent.most_common()}}

    return run
