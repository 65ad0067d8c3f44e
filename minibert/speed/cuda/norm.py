"""What to launch for dropout, residual and LayerNorm in one pass: the kernels in ``norm.cu``.

Shape legend: see model/layout.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minibert.speed.cuda import launch

STEP, MOST = 64, 768  # D must be a multiple of STEP up to MOST: a wider row would spill registers
ROWS = 4  # per block at a time, one per warp: WARPS in norm.cu
THREADS = 32 * ROWS
BLOCKS = 160  # at most in the backward pass: four for each multiprocessor of a T4


def fits(x_ND: Tensor, residual_ND: Tensor) -> bool:
    """Whether the kernels support these tensors: x float16, the residual float16 or float32."""
    D = x_ND.shape[-1]
    floats = residual_ND.dtype in (torch.float16, torch.float32)
    return x_ND.dtype == torch.float16 and floats and D % STEP == 0 and 0 < D <= MOST


def forward(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(dropout(x) + residual).

    Args:
        x_ND: float16.
        residual_ND: float16 or float32.
        weight_D, bias_D: of the LayerNorm; cast to the residual's dtype.
        seed: (1,) int64, selects the dropout mask; None without dropout.
        eps: of the LayerNorm.
        dropout_p: in [0, 1); rounded to a multiple of 1/65536.

    Returns:
        The result (N, D) in the residual's dtype; each row's mean and 1 / √(variance + eps), both
        (N,) float32, for the backward pass.

    Raises:
        ValueError: a shape, dtype or probability that the kernels do not support.
    """
    if not fits(x_ND, residual_ND) or x_ND.shape != residual_ND.shape or x_ND.dim() != 2:
        raise ValueError(
            f"the kernels need x (N, D) in float16, D a multiple of {STEP} up to {MOST}, and a "
            f"residual of that shape in float16 or float32; got {x_ND.dtype} {tuple(x_ND.shape)} "
            f"and {residual_ND.dtype} {tuple(residual_ND.shape)}"
        )
    N = x_ND.shape[0]
    residual_ND = launch.aligned(residual_ND)
    y_ND = torch.empty_like(residual_ND)
    mean_N = x_ND.new_empty(N, dtype=torch.float32)
    scale_N = torch.empty_like(mean_N)
    dropout = launch.dropout(dropout_p)
    tensors = {
        "x": launch.aligned(x_ND),
        "residual": residual_ND,
        "weight": launch.aligned(weight_D, residual_ND.dtype),
        "bias": launch.aligned(bias_D, residual_ND.dtype),
        "seed": seed,
        "y": y_ND,
        "mean": mean_N,
        "scale": scale_N,
    }
    if N:
        defines = _defines(x_ND, residual_ND, dropout["drop_below"] > 0)
        numbers = {"rows": N, "eps": eps, **dropout}
        _enqueue("add_norm", defines, -(-N // ROWS), tensors, numbers)
    return y_ND, mean_N, scale_N


def backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    mean_N: Tensor,
    scale_N: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (N, D) and the residual (N, D), and of weight and bias as (2, D) float32."""
    N, D = x_ND.shape
    x_ND, residual_ND = launch.aligned(x_ND), launch.aligned(residual_ND)
    dx_ND, d_residual_ND = torch.empty_like(x_ND), torch.empty_like(residual_ND)
    blocks = min(-(-N // ROWS), BLOCKS)
    partial = x_ND.new_empty((blocks, 2, D), dtype=torch.float32)
    new = x_ND.new_empty if N else x_ND.new_zeros
    sums_2D = new((2, D), dtype=torch.float32)
    dropout = launch.dropout(dropout_p)
    tensors = {
        "dy": launch.aligned(dy_ND, residual_ND.dtype),
        "x": x_ND,
        "residual": residual_ND,
        "weight": launch.aligned(weight_D, residual_ND.dtype),
        "seed": seed,
        "mean": mean_N,
        "scale": scale_N,
        "dx": dx_ND,
        "dresidual": d_residual_ND,
        "partial": partial,
    }
    if N:
        defines = _defines(x_ND, residual_ND, dropout["drop_below"] > 0)
        numbers = {"rows": N, "blocks": blocks, **dropout}
        _enqueue("add_norm_backward", defines, blocks, tensors, numbers)
        adding: dict[str, Tensor | None] = {"partial": partial, "sums": sums_2D}
        _enqueue("add_norm_sums", defines, -(-2 * D // THREADS), adding, {"blocks": blocks})
    return dx_ND, d_residual_ND, sums_2D


def _defines(x_ND: Tensor, residual_ND: Tensor, dropping: bool) -> dict[str, int]:
    wide = residual_ND.dtype == torch.float32
    return {"HIDDEN": x_ND.shape[1], "DROPOUT": int(dropping), "WIDE": int(wide)}


def _enqueue(
    kernel: str,
    defines: dict[str, int],
    blocks: int,
    tensors: dict[str, Tensor | None],
    numbers: dict[str, float],
) -> None:
    grid = (blocks, 1)
    launch.enqueue(launch.Launch("norm.cu", kernel, defines, grid, THREADS, tensors, numbers))
