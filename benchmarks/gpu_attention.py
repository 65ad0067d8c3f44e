"""Attention alone: every path that runs here, against PyTorch's on padded batches."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import interleaved
from minibert.speed.cuda import ladder

HEADS, HEAD_SIZE = 12, 64  # BERT-base
CALLS = 20  # in one measurement: a single one is over before an event is recorded


def short_queries(count: int) -> list[int]:
    """Lengths in word pieces like those of a search query corpus: 3 to 40, about 12 on average."""
    generator = random.Random(0)
    return [min(40, max(3, round(generator.gammavariate(6, 2)))) for _ in range(count)]


BATCHES = {
    "about 12, mixed": short_queries(256),
    "128": [128] * 32,
    "512": [512] * 8,
}

Run = Callable[[bool, int], None]  # attention some times over, with the gradient if asked


def attention_alone(
    batches: dict[str, list[int]], device: torch.device, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    """Forward, and forward with backward: milliseconds and TFLOP/s of a call.

    Useful operations are counted: 4 K a score forward, 10 K more backward, nothing for padding.
    What launching costs the host is part of the time, as it is for whoever calls it.
    """
    rows = []
    for batch, lengths in batches.items():
        operations = 4 * HEADS * HEAD_SIZE * sum(n * n for n in lengths)
        for dropout_p in (0.0, 0.1):
            runs = _paths(lengths, dropout_p, device, dtype)
            obstacles = {name: _obstacle(run) for name, run in runs.items()}
            steps = {
                (name, gradient): partial(run, gradient, CALLS)
                for name, run in runs.items()
                if obstacles[name] is None
                for gradient in (False, True)
            }
            times = interleaved(steps, rounds, device)
            for name, obstacle in obstacles.items():
                row: dict[str, Any] = {"batch": batch, "path": name, "dropout": dropout_p}
                if obstacle is not None:
                    row["not_available"] = obstacle
                else:
                    row["forward_ms"] = median(times[name, False]) / CALLS
                    row["both_ms"] = median(times[name, True]) / CALLS
                    row["forward_tflops"] = operations / row["forward_ms"] / 1e9
                    row["both_tflops"] = 3.5 * operations / row["both_ms"] / 1e9
                rows.append(row)
                print(row, file=sys.stderr)
    return rows


def _obstacle(run: Run) -> str | None:
    """Why this path does not run here (no kernel for this device or this dtype), or None."""
    try:
        run(True, 1)
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return None


def _paths(
    lengths: list[int], dropout_p: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Run]:
    """By name; the ladder's on packed sentences, PyTorch's SDPA on padded ones."""
    tokens, longest = sum(lengths), max(lengths)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    qkv = torch.randn(tokens, 3, HEADS, HEAD_SIZE, **options).requires_grad_()
    d_context = torch.randn(tokens, HEADS, HEAD_SIZE, **options)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    shape = (3, len(lengths), HEADS, longest, HEAD_SIZE)
    padded = torch.randn(shape, **options).requires_grad_()
    d_padded = torch.randn(shape[1:], **options)
    mask = None
    if min(lengths) < longest:
        ends = torch.tensor(lengths, device=device)
        mask = (torch.arange(longest, device=device) < ends[:, None])[:, None, None, :]

    def packed(attend: ladder.Attend) -> Run:
        def run(gradient: bool, calls: int) -> None:
            with torch.set_grad_enabled(gradient):
                for _ in range(calls):
                    context = attend(*qkv.unbind(1), starts, longest, dropout_p)
                    if gradient:
                        torch.autograd.grad(context, qkv, d_context)

        return run

    def sdpa(backend: SDPBackend, mask: torch.Tensor | None) -> Run:
        def run(gradient: bool, calls: int) -> None:
            with torch.set_grad_enabled(gradient), sdpa_kernel(backend):
                for _ in range(calls):
                    context = F.scaled_dot_product_attention(*padded, mask, dropout_p)
                    if gradient:
                        torch.autograd.grad(context, padded, d_padded)

        return run

    paths = {name: packed(attend) for name, attend in ladder.RUNGS.items()}
    paths["sdpa efficient, padded"] = sdpa(SDPBackend.EFFICIENT_ATTENTION, mask)
    # Flash takes no mask: on a mixed batch it also attends to padding.
    paths["sdpa flash, padded"] = sdpa(SDPBackend.FLASH_ATTENTION, None)
    return paths
