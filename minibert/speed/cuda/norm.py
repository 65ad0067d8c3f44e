"""Dropout, residual and LayerNorm in one pass: arguments and launches of ``norm.cu``.

As in ``attention.py`` the functions are given what starts a kernel: a GPU, or the tests' emulator.

Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minibert.speed.cuda.attention import drop_below

STEP, MOST = 64, 768  # D is a multiple of the one, up to the other: more would spill registers
ROWS = 4  # a block does at a time: WARPS of norm.cu
BLOCKS = 160  # of the backward pass at most: four for each multiprocessor of a T4


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: str
    defines: dict[str, int]  # which binary of norm.cu: HIDDEN, DROPOUT and WIDE
    blocks: int
    threads: int  # in a block
    parameters: dict[str, Any]  # in the kernel's order
    writes: tuple[str, ...]  # which of them are its outputs


Launcher = Callable[[Launch], None]


def fits(x_ND: Tensor, residual_ND: Tensor) -> bool:
    """Whether the kernels take such tensors: x float16, the residual float16 or float32."""
    D = x_ND.shape[-1]
    wide = residual_ND.dtype in (torch.float16, torch.float32)
    return x_ND.dtype == torch.float16 and wide and D % STEP == 0 and 0 < D <= MOST


def _defines(x_ND: Tensor, residual_ND: Tensor, dropout_p: float) -> dict[str, int]:
    wide = int(residual_ND.dtype == torch.float32)
    return {"HIDDEN": x_ND.shape[1], "DROPOUT": int(drop_below(dropout_p) > 0), "WIDE": wide}


def _scalars(dropout_p: float) -> dict[str, Any]:
    threshold = drop_below(dropout_p)
    return {"keep_scale": 65536 / (65536 - threshold), "drop_below": threshold}


def forward(
    launch: Launcher,
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(dropout(x) + residual) (N, D) like the residual, and what the backward pass needs.

    Args:
        launch: starts a kernel.
        x_ND: float16.
        residual_ND: float32 or float16.
        weight_D, bias_D: of the LayerNorm; taken in the residual's dtype.
        seed: (1,) int64, which dropout mask; None without dropout.
        eps: of the LayerNorm.
        dropout_p: in [0, 1); rounded to a multiple of 1 / 65536.

    Returns:
        The result; each row's mean and 1 / √(variance + eps), both (N,) float32.

    Raises:
        ValueError: a dtype or a width that the kernels do not have.
    """
    if not fits(x_ND, residual_ND) or x_ND.shape != residual_ND.shape or x_ND.dim() != 2:
        raise ValueError(
            f"the kernels take x (N, D) in float16 with D a multiple of {STEP} up to {MOST}, and a "
            f"residual like it in float16 or float32; got {x_ND.dtype} {tuple(x_ND.shape)} and "
            f"{residual_ND.dtype} {tuple(residual_ND.shape)}"
        )
    N = x_ND.shape[0]
    residual_ND = residual_ND.contiguous()
    y_ND = torch.empty_like(residual_ND)
    mean_N, scale_N = (x_ND.new_empty(N, dtype=torch.float32) for _ in range(2))
    parameters = {
        "x": x_ND.contiguous(),
        "residual": residual_ND,
        "weight": weight_D.to(residual_ND.dtype),
        "bias": bias_D.to(residual_ND.dtype),
        "seed": seed,
        "y": y_ND,
        "mean": mean_N,
        "scale": scale_N,
        "rows": N,
        "eps": eps,
        **_scalars(dropout_p),
    }
    defines = _defines(x_ND, residual_ND, dropout_p)
    if N:
        blocks = -(-N // ROWS)
        launch(Launch("add_norm", defines, blocks, 128, parameters, ("y", "mean", "scale")))
    return y_ND, mean_N, scale_N


def backward(
    launch: Launcher,
    dy_ND: Tensor,
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    mean_N: Tensor,
    scale_N: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (N, D), of the residual (N, D), and (2, D) float32: of weight and of bias."""
    N, D = x_ND.shape
    x_ND, residual_ND = x_ND.contiguous(), residual_ND.contiguous()
    dx_ND, d_residual_ND = torch.empty_like(x_ND), torch.empty_like(residual_ND)
    blocks = min(-(-N // ROWS), BLOCKS)
    partial = x_ND.new_empty((blocks, 2, D), dtype=torch.float32)
    sums_2D = x_ND.new_zeros((2, D), dtype=torch.float32)
    defines = _defines(x_ND, residual_ND, dropout_p)
    parameters = {
        "dy": dy_ND.to(residual_ND.dtype).contiguous(),
        "x": x_ND,
        "residual": residual_ND,
        "weight": weight_D.to(residual_ND.dtype),
        "seed": seed,
        "mean": mean_N,
        "scale": scale_N,
        "dx": dx_ND,
        "dresidual": d_residual_ND,
        "partial": partial,
        "rows": N,
        "blocks": blocks,
        **_scalars(dropout_p),
    }
    if N:
        written = ("dx", "dresidual", "partial")
        launch(Launch("add_norm_backward", defines, blocks, 128, parameters, written))
        adding = {"partial": partial, "sums": sums_2D, "blocks": blocks}
        launch(Launch("add_norm_sums", defines, -(-2 * D // 128), 128, adding, ("sums",)))
    return dx_ND, d_residual_ND, sums_2D
