"""Attention alone on the GPU: every path that runs here, against PyTorch's on padded batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_plan import Plan, ceiling_of, ceiling_steps
from minibert.speed.cuda import ladder

HEADS, HEAD_SIZE = 12, 64  # BERT-base
CALLS = 20  # in one measurement

Run = Callable[[bool, int], None]  # (with gradient, calls)


def test_attention(race: Callable, benchmark: Any, plan: Plan) -> None:
    """Forward, and forward with backward: milliseconds and TFLOP/s of a call.

    Only useful operations count: per score 4 K forward and 10 K backward, none for padding. The
    time includes the launches on the host.
    """
    steps = ceiling_steps(plan)
    obstacles: dict[tuple, str | None] = {}
    for batch, lengths in plan.attention.items():
        for dropout_p in (0.0, 0.1):
            for path, run in paths(lengths, dropout_p, plan.device, plan.dtype).items():
                case = (batch, path, dropout_p)
                obstacles[case] = obstacle(run)
                if obstacles[case] is None:
                    steps[(*case, False)] = partial(run, False, CALLS)
                    steps[(*case, True)] = partial(run, True, CALLS)
    times = race(steps, steps.__getitem__, plan.turns, warm_up=2)
    ceiling = ceiling_of(times, plan)
    rows = []
    for case, reason in obstacles.items():
        row = dict(zip(("batch", "path", "dropout"), case))
        if reason is not None:
            row["not_available"] = reason
        else:
            operations = 4 * HEADS * HEAD_SIZE * sum(n * n for n in plan.attention[case[0]])
            row["forward_ms"] = 1000 * times[(*case, False)]["median_s"] / CALLS
            row["both_ms"] = 1000 * times[(*case, True)]["median_s"] / CALLS
            row["forward_tflops"] = operations / row["forward_ms"] / 1e9
            row["both_tflops"] = 3.5 * operations / row["both_ms"] / 1e9
            row["share_of_ceiling"] = row["both_tflops"] / ceiling.product_tflops
        rows.append(row)
    benchmark.extra_info |= {"rows": rows, "ceiling": ceiling._asdict()}


def obstacle(run: Run) -> str | None:
    """Why a path does not run here (no kernel for this device or dtype), or None."""
    try:
        run(True, 1)
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return None


def paths(
    lengths: list[int], dropout_p: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Run]:
    """By name: those of the ladder on packed sentences, PyTorch's SDPA on padded ones."""
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

    found = {name: packed(attend) for name, attend in ladder.RUNGS.items()}
    found["sdpa efficient, padded"] = sdpa(SDPBackend.EFFICIENT_ATTENTION, mask)
    # Flash takes no mask: on a mixed batch it also attends to padding.
    found["sdpa flash, padded"] = sdpa(SDPBackend.FLASH_ATTENTION, None)
    return found
