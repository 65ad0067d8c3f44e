"""What the GPU benchmark runs, and the ceiling that it measures beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


def short_queries(count: int) -> list[int]:
    """Lengths in word-pieces like those of search queries: 3 to 40, about 12 on average."""
    generator = random.Random(0)
    return [min(40, max(3, round(generator.gammavariate(6, 2)))) for _ in range(count)]


class Plan(NamedTuple):
    """How much is run."""

    device: torch.device
    dtype: torch.dtype  # of inference, and of autocast in training
    attn: str  # minibert's attention
    corpus: str  # "mit_movie" or "demo"
    checkpoint: str | None  # used if it is on this machine
    shape: dict[str, int]  # how random weights differ from BERT-base
    test_sentences: int | None  # None: all
    steps: int  # training steps in a turn
    lengths: dict[str, list[int]]  # batches of random tokens
    attention: dict[str, list[int]]  # batches of attention alone
    rows: tuple[int, ...]  # tokens of dropout, residual and LayerNorm alone
    turns: int
    product: int  # side of the ceiling's matrices
    copied: int  # bytes of the ceiling's copy


def full() -> Plan:
    """Everything, on the GPU."""
    # FasterTransformer's shapes; with padding removed its lengths are half of 128 on average.
    fixed = {f"32 x {length}": [length] * 32 for length in (32, 128, 384)}
    fixed |= {"1 x 128": [128], "32 x up to 128": list(range(4, 132, 4))}
    return Plan(
        device=torch.device("cuda", torch.cuda.current_device()),
        dtype=torch.float16,
        attn="fused",
        corpus="mit_movie",
        checkpoint="bert-base-cased",
        shape={},
        test_sentences=None,
        steps=40,
        lengths={"256 x about 12": short_queries(256)} | fixed,
        attention={
            "about 12, mixed": short_queries(256),
            "32 x 128": [128] * 32,
            "8 x 512": [512] * 8,
        },
        rows=(400, 4096),
        turns=9,
        product=4096,
        copied=2**28,
    )


def tiny() -> Plan:
    """A rehearsal of the same code in float32 on a CPU."""
    shape = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64
    }  # fmt: skip
    return Plan(
        device=torch.device("cpu"),
        dtype=torch.float32,
        attn="sdpa",
        corpus="demo",
        checkpoint=None,
        shape=shape,
        test_sentences=40,
        steps=6,
        lengths={"8": [8] * 4},
        attention={"mixed": [3, 9, 5], "8": [8, 8]},
        rows=(8,),
        turns=2,
        product=64,
        copied=2**16,
    )


class Ceiling(NamedTuple):
    """What the device does at best, measured in the same race."""

    product_tflops: float
    copy_gb_s: float


def ceiling_steps(plan: Plan) -> dict[Any, Callable[[], None]]:
    """One large product and one large copy, as contenders."""
    a, b = torch.randn(2, plan.product, plan.product, device=plan.device).to(plan.dtype)
    source = torch.empty(plan.copied, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)

    def product() -> None:
        torch.matmul(a, b)

    def copy() -> None:
        target.copy_(source)

    return {"product": product, "copy": copy}


def ceiling_of(rows: dict[Any, dict[str, Any]], plan: Plan) -> Ceiling:
    """From the fastest turns: TFLOP/s of the product, GB/s read and written by the copy."""
    return Ceiling(
        product_tflops=2 * plan.product**3 / min(rows["product"]["seconds"]) / 1e12,
        copy_gb_s=2 * plan.copied / min(rows["copy"]["seconds"]) / 1e9,
    )


def clock() -> float:
    """The time in seconds once the GPU is idle: the timer of pytest-benchmark here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
