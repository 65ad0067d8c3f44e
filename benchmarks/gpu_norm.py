"""Dropout, residual and LayerNorm on the GPU: the own kernels against torch's three operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_attention import CALLS, obstacle
from benchmarks.gpu_plan import Plan, ceiling_of, ceiling_steps
from minibert.speed.cuda import ops

WIDTH, EPS = 768, 1e-12  # BERT-base
AddNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def three_operations(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float):
    return F.layer_norm(F.dropout(x, p) + before, (WIDTH,), weight, bias, eps)


PATHS: dict[str, AddNorm] = {
    "own kernels": ops.add_norm,
    "three of torch": three_operations,
}


def test_norm(race: Callable, benchmark: Any, plan: Plan) -> None:
    """Milliseconds of a call forward, and forward with backward, as in training under autocast."""
    steps = ceiling_steps(plan)
    rows: list[dict[str, Any]] = []
    for tokens in plan.rows:
        for name, add_norm in PATHS.items():
            run = runner(add_norm, tokens, plan)
            row: dict[str, Any] = {"tokens": tokens, "path": name}
            rows.append(row)
            if reason := obstacle(run):
                row["not_available"] = reason
                continue
            for gradient in (False, True):
                steps[tokens, name, gradient] = partial(run, gradient, CALLS)
    times = race(steps, steps.__getitem__, plan.turns, warm_up=2)
    for row in rows:
        for gradient, what in ((False, "forward_ms"), (True, "both_ms")):
            if found := times.get((row["tokens"], row["path"], gradient)):
                row[what] = 1000 * found["median_s"] / CALLS
    benchmark.extra_info |= {"rows": rows, "ceiling": ceiling_of(times, plan)._asdict()}


def runner(add_norm: AddNorm, tokens: int, plan: Plan) -> Callable[[bool, int], None]:
    x, dy = torch.randn(2, tokens, WIDTH, device=plan.device)
    before = torch.randn(tokens, WIDTH, device=plan.device, requires_grad=True)
    weight, bias = (torch.randn(WIDTH, device=plan.device, requires_grad=True) for _ in range(2))
    operands = (x.to(plan.dtype).requires_grad_(), before, weight, bias)

    def run(gradient: bool, calls: int) -> None:
        with torch.set_grad_enabled(gradient):
            for _ in range(calls):
                y = add_norm(*operands, EPS, 0.1)
                if gradient:
                    torch.autograd.grad(y, operands, dy)

    return run
