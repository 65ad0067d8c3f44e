"""Attention by the kernels of ``attention.cu``: arguments and launches.

``forward`` and ``backward`` are given the function that starts a kernel. On a GPU that is
``launch.launch``; the tests start the same kernels, with the same arguments, in an emulator on the
CPU. ``ops.py`` makes them operators of torch.

Shape legend: see layout.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEAD_SIZES = (32, 64)
SHORT = 64  # up to this length the one-warp kernels: 16-row tiles leave less of a tile empty


class Problem(NamedTuple):
    """The parameters of every kernel: ``PROBLEM_PARAMETERS`` of problem.cuh, name by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    context: Tensor
    d_context: Tensor | None
    lse: Tensor
    delta: Tensor | None
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    starts: Tensor
    seed: Tensor | None
    tokens: int
    heads: int
    tiles: int
    q_stride: int
    k_stride: int
    v_stride: int
    grad_stride: int
    scale: float
    keep_scale: float
    drop_below: int


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: str
    defines: dict[str, int]  # which binary of attention.cu: HEAD_SIZE and DROPOUT
    grid: tuple[int, int]  # (sentences * tiles, heads)
    threads: int  # in a block
    problem: Problem


Launcher = Callable[[Launch], None]


def pack(parameters: Mapping[str, Any]) -> list[Any]:
    """A kernel's parameters as ``cuda.core.launch`` wants them: addresses as int, else ctypes."""
    packed: list[Any] = []
    for name, value in parameters.items():
        if value is None:
            packed.append(0)
        elif isinstance(value, Tensor):
            packed.append(value.data_ptr())
        elif isinstance(value, float):
            packed.append(ctypes.c_float(value))
        elif name == "drop_below":
            packed.append(ctypes.c_uint32(value))
        else:
            packed.append(ctypes.c_int32(value))
    return packed


def drop_below(dropout_p: float) -> int:
    """The threshold on 16 random bits; the true probability is this / 65536, within 2^-17 of p.

    Raises:
        ValueError: p is not in [0, 1), or rounds to 1.
    """
    threshold = round(dropout_p * 65536)
    if not 0 <= threshold < 65536:
        raise ValueError(f"dropout probability must be in [0, 1), got {dropout_p}")
    return threshold


def _rows(x_NHK: Tensor) -> Tensor:
    """x with the heads of a token side by side and every row on a 16-byte boundary.

    A slice of the packed (N, 3, H, K) product is that already; anything else is copied.
    """
    fits = x_NHK.stride()[1:] == (x_NHK.shape[2], 1) and x_NHK.stride(0) % 8 == 0
    return x_NHK if fits and x_NHK.data_ptr() % 16 == 0 else x_NHK.contiguous()


def _check(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, starts: Tensor) -> None:
    for name, x_NHK in (("q", q_NHK), ("k", k_NHK), ("v", v_NHK)):
        if x_NHK.dtype != torch.float16:
            raise ValueError(f"the kernels compute in float16, but {name} is {x_NHK.dtype}")
        if x_NHK.dim() != 3 or x_NHK.shape != q_NHK.shape:
            raise ValueError(
                f"q, k and v must be (N, H, K) alike, got {name} {tuple(x_NHK.shape)} "
                f"and q {tuple(q_NHK.shape)}"
            )
    if q_NHK.shape[2] not in HEAD_SIZES:
        raise ValueError(f"the kernels have head sizes {HEAD_SIZES}, got {q_NHK.shape[2]}")
    if starts.dtype != torch.int32 or starts.dim() != 1:
        raise ValueError(f"starts must be (B + 1,) int32, got {starts.dtype} {tuple(starts.shape)}")


def _launches(problem: Problem, kinds: tuple[str, ...], max_length: int) -> list[Launch]:
    """The launches of these kernels, in order; none for an empty batch."""
    short = max_length <= SHORT
    rows, threads = (16, 32) if short else (64, 128)
    tiles = -(-max_length // rows)
    sentences = problem.starts.shape[0] - 1
    if sentences * tiles >= 2**31:
        raise ValueError(f"{sentences} sentences of {max_length} tokens exceed a CUDA grid: split")
    if not sentences or not tiles or not problem.tokens:
        return []
    suffix = "_short" if short else "_long"
    problem = problem._replace(tiles=tiles)
    grid = (sentences * tiles, problem.heads)
    defines = {"HEAD_SIZE": problem.q.shape[2], "DROPOUT": int(problem.drop_below > 0)}
    return [Launch(kind + suffix, defines, grid, threads, problem) for kind in kinds]


def forward(
    launch: Launcher,
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    seed: Tensor | None,
    max_length: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Context (N, H, K) float16 and log-sum-exp (H, N) float32. Arguments as ``attend``."""
    _check(q_NHK, k_NHK, v_NHK, starts)
    q_NHK, k_NHK, v_NHK = _rows(q_NHK), _rows(k_NHK), _rows(v_NHK)
    N, H, K = q_NHK.shape
    context_NHK = torch.empty((N, H, K), dtype=q_NHK.dtype, device=q_NHK.device)
    lse_HN = torch.empty((H, N), dtype=torch.float32, device=q_NHK.device)
    threshold = drop_below(dropout_p)
    problem = Problem(
        q=q_NHK, k=k_NHK, v=v_NHK, context=context_NHK, d_context=None, lse=lse_HN, delta=None,
        dq=None, dk=None, dv=None, starts=starts, seed=seed,
        tokens=N, heads=H, tiles=0,
        q_stride=q_NHK.stride(0), k_stride=k_NHK.stride(0), v_stride=v_NHK.stride(0), grad_stride=0,
        scale=K**-0.5, keep_scale=65536 / (65536 - threshold), drop_below=threshold,
    )  # fmt: skip
    for step in _launches(problem, ("forward",), max_length):
        launch(step)
    return context_NHK, lse_HN


def backward(
    launch: Launcher,
    d_context_NHK: Tensor,
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    context_NHK: Tensor,
    lse_HN: Tensor,
    starts: Tensor,
    seed: Tensor | None,
    max_length: int,
    dropout_p: float,
) -> Tensor:
    """Gradients of q, k and v side by side: (N, 3, H, K) float16, one allocation."""
    q_NHK, k_NHK, v_NHK = _rows(q_NHK), _rows(k_NHK), _rows(v_NHK)
    N, H, K = q_NHK.shape
    grad_N3HK = torch.empty((N, 3, H, K), dtype=q_NHK.dtype, device=q_NHK.device)
    dq_NHK, dk_NHK, dv_NHK = grad_N3HK.unbind(1)
    threshold = drop_below(dropout_p)
    problem = Problem(
        q=q_NHK, k=k_NHK, v=v_NHK, context=context_NHK, d_context=d_context_NHK.contiguous(),
        lse=lse_HN, delta=torch.empty_like(lse_HN),
        dq=dq_NHK, dk=dk_NHK, dv=dv_NHK, starts=starts, seed=seed,
        tokens=N, heads=H, tiles=0,
        q_stride=q_NHK.stride(0), k_stride=k_NHK.stride(0), v_stride=v_NHK.stride(0),
        grad_stride=3 * H * K,
        scale=K**-0.5, keep_scale=65536 / (65536 - threshold), drop_below=threshold,
    )  # fmt: skip
    # In this order: backward_q writes delta, backward_kv reads it.
    for step in _launches(problem, ("backward_q", "backward_kv"), max_length):
        launch(step)
    return grad_N3HK
