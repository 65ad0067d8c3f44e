"""Where the time goes: torch's profiler over one pass of minibert and of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_latency, bench_training, workload
from benchmarks.workload import Workload
from minibert.speed.memory import keep_freed_memory

HELD = 2**30 - 2**20  # bytes; keep_freed_memory keeps blocks below 1 GB
# An operation belongs to the first kind that has a part of its name.
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


def test_profile(race: Callable, work: Workload) -> None:
    passes = {
        "minibert, inference": inference,
        "minibert, one sentence": one_sentence,
        "minibert, training": lambda work: bench_training.build(bench_training.OURS, work),
        "transformers, training": lambda work: bench_training.build(
            bench_training.THEIRS_FUSED, work
        ),
    }

    def build(name: str) -> Callable[[], dict]:
        once = passes[name](work)
        return lambda: {"shares": shares(once)}

    rows = race(passes, build, turns=1)
    assert all(sum(row["shares"].values()) > 0.99 for row in rows.values())


def inference(work: Workload) -> Callable[[], object]:
    tagger = work.tagger(workload.OURS)
    batches = work.packed(tagger)
    return torch.inference_mode()(lambda: [tagger.model(**batch.inputs) for batch in batches])


def one_sentence(work: Workload) -> Callable[[], object]:
    once = bench_latency.build(f"minibert {workload.OURS}", work)
    return torch.inference_mode()(once)


def shares(once: Callable[[], object]) -> dict[str, float]:
    """The share of each kind of operation in the time of one pass."""
    # The profiler writes its events into freed memory. Without enough of it, page faults of the
    # profiler would count as time of the operation that is running.
    keep_freed_memory()
    torch.zeros(HELD, dtype=torch.uint8)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        once()
    spent: Counter[str] = Counter()
    for event in watched.key_averages():
        kinds = (kind for kind, parts in KINDS.items() if any(p in event.key for p in parts))
        spent[next(kinds, "the rest")] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time / total for kind, time in spent.most_common()}
