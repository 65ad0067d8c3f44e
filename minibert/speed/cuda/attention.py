"""What to launch for attention: the arguments of the kernels in ``attention.cu``.

Shape legend: see model/layout.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minibert.speed.cuda import launch

HEAD_SIZES = (32, 64)
SHORT = 64  # up to this length the one-warp kernels run: 16-row tiles waste less of a tile


def forward(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    seed: Tensor | None,
    max_length: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √K) v within each sentence.

    Args:
        q_NHK, k_NHK, v_NHK: (N, H, K) float16.
        starts: (B + 1,) int32; sentence b holds tokens starts[b]:starts[b + 1].
        seed: (1,) int64, selects the dropout mask; None without dropout.
        max_length: at least the length of the longest sentence.
        dropout_p: in [0, 1); rounded to a multiple of 1/65536.

    Returns:
        Context (N, H, K) float16 and log-sum-exp (H, N) float32.

    Raises:
        ValueError: a shape, dtype or probability that the kernels do not support.
    """
    _check(q_NHK, k_NHK, v_NHK, starts)
    N, H, _K = q_NHK.shape
    context_NHK = q_NHK.new_empty(q_NHK.shape)
    lse_HN = q_NHK.new_empty((H, N), dtype=torch.float32)
    _enqueue(
        ("forward",), q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed, max_length, dropout_p
    )
    return context_NHK, lse_HN


def backward(
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
    """Gradients of q, k and v side by side, (N, 3, H, K) float16: one allocation."""
    N, H, K = q_NHK.shape
    grad_N3HK = q_NHK.new_empty((N, 3, H, K))
    _enqueue(
        ("backward_q", "backward_kv"),  # in this order: the first writes delta, the second reads it
        q_NHK, k_NHK, v_NHK, launch.aligned(context_NHK), launch.aligned(lse_HN), starts, seed,
        max_length, dropout_p,
        launch.aligned(d_context_NHK), torch.empty_like(lse_HN), grad_N3HK.unbind(1),
    )  # fmt: skip
    return grad_N3HK


def _check(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, starts: Tensor) -> None:
    for name, x_NHK in (("q", q_NHK), ("k", k_NHK), ("v", v_NHK)):
        if x_NHK.dtype != torch.float16:
            raise ValueError(f"the kernels compute in float16, but {name} is {x_NHK.dtype}")
        if x_NHK.dim() != 3 or x_NHK.shape != q_NHK.shape:
            raise ValueError(
                f"q, k and v must have one shape (N, H, K), got {name} {tuple(x_NHK.shape)} "
                f"and q {tuple(q_NHK.shape)}"
            )
    if q_NHK.shape[2] not in HEAD_SIZES:
        raise ValueError(f"the head size must be one of {HEAD_SIZES}, got {q_NHK.shape[2]}")
    if starts.dtype != torch.int32 or starts.dim() != 1:
        raise ValueError(f"starts must be (B + 1,) int32, got {starts.dtype} {tuple(starts.shape)}")


def _rows(x_NHK: Tensor) -> Tensor:
    """x with a token's heads contiguous and every row on a 16-byte boundary.

    A slice of the packed (N, 3, H, K) product already is; anything else is copied.
    """
    fits = x_NHK.stride()[1:] == (x_NHK.shape[2], 1) and x_NHK.stride(0) % 8 == 0
    return x_NHK if fits and x_NHK.data_ptr() % 16 == 0 else launch.aligned(x_NHK)


def _enqueue(
    kernels: tuple[str, ...],
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    context_NHK: Tensor,
    lse_HN: Tensor,
    starts: Tensor,
    seed: Tensor | None,
    max_length: int,
    dropout_p: float,
    d_context_NHK: Tensor | None = None,
    delta_HN: Tensor | None = None,
    grads_NHK: tuple[Tensor | None, ...] = (None, None, None),
) -> None:
    """Launch these kernels in order; an empty batch launches nothing."""
    N, H, K = q_NHK.shape
    q_NHK, k_NHK, v_NHK = _rows(q_NHK), _rows(k_NHK), _rows(v_NHK)
    short = max_length <= SHORT
    rows, threads = (16, 32) if short else (64, 128)
    sentences, tiles = starts.shape[0] - 1, -(-max_length // rows)
    if sentences * tiles >= 2**31:
        raise ValueError(f"{sentences} sentences of {max_length} tokens exceed a CUDA grid: split")
    dropout = launch.dropout(dropout_p)
    dq_NHK, dk_NHK, dv_NHK = grads_NHK
    tensors = {
        "q": q_NHK,
        "k": k_NHK,
        "v": v_NHK,
        "context": context_NHK,
        "d_context": d_context_NHK,
        "lse": lse_HN,
        "delta": delta_HN,
        "dq": dq_NHK,
        "dk": dk_NHK,
        "dv": dv_NHK,
        "starts": launch.aligned(starts),
        "seed": seed,
    }
    numbers = {
        "tokens": N,
        "heads": H,
        "tiles": tiles,
        "q_stride": q_NHK.stride(0),
        "k_stride": k_NHK.stride(0),
        "v_stride": v_NHK.stride(0),
        "grad_stride": 3 * H * K,
        "scale": K**-0.5,
        **dropout,
    }
    defines = {"HEAD_SIZE": K, "DROPOUT": int(dropout["drop_below"] > 0)}
    if N and sentences and tiles:
        for kernel in kernels:
            name, grid = f"{kernel}_{'short' if short else 'long'}", (sentences * tiles, H)
            launch.enqueue(
                launch.Launch("attention.cu", name, defines, grid, threads, tensors, numbers)
            )
