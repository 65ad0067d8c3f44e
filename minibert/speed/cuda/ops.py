"""The kernels as operators of torch: ``torch.ops.minibert.attention`` and ``add_norm``.

Registered this way they are to autograd, autocast, ``torch.compile`` and CUDA graphs what torch's
own operators are: functions of tensors with known shapes and no hidden state. The dropout mask is a
function of ``seed``, a tensor; so a graph that draws the seed anew draws the mask anew.

Shape legend: see layout.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minibert.speed.cuda import attention, norm
from minibert.speed.cuda.launch import launch, launch_norm


@torch.library.custom_op(
    "minibert::attention",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor? seed, int max_length, "
    "float dropout_p) -> (Tensor, Tensor)",
)
def forward(q_NHK, k_NHK, v_NHK, starts, seed, max_length, dropout_p):
    """Context (N, H, K) and log-sum-exp (H, N); see ``attention.forward``."""
    return attention.forward(launch, q_NHK, k_NHK, v_NHK, starts, seed, max_length, dropout_p)


@torch.library.custom_op(
    "minibert::attention_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor d_context, Tensor q, Tensor k, Tensor v, Tensor context, Tensor lse, "
    "Tensor starts, Tensor? seed, int max_length, float dropout_p) -> Tensor",
)
def backward(
    d_context_NHK, q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed, max_length, dropout_p
):
    """Gradients of q, k and v as (N, 3, H, K); see ``attention.backward``."""
    return attention.backward(
        launch, d_context_NHK, q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed, max_length,
        dropout_p,
    )  # fmt: skip


@forward.register_fake
def _(q_NHK, k_NHK, v_NHK, starts, seed, max_length, dropout_p):
    N, H, _K = q_NHK.shape
    return q_NHK.new_empty(q_NHK.shape), q_NHK.new_empty((H, N), dtype=torch.float32)


@backward.register_fake
def _(d_context_NHK, q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed, max_length, dropout_p):
    N, H, K = q_NHK.shape
    return q_NHK.new_empty((N, 3, H, K))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_NHK, k_NHK, v_NHK, starts, seed, ctx.max_length, ctx.dropout_p = inputs
    ctx.save_for_backward(q_NHK, k_NHK, v_NHK, *output, starts, seed)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, d_context_NHK: Tensor, _d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed = ctx.saved_tensors
    grad_N3HK = torch.ops.minibert.attention_backward(
        d_context_NHK, q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed, ctx.max_length,
        ctx.dropout_p,
    )  # fmt: skip
    return (*grad_N3HK.unbind(1), None, None, None, None)


forward.register_autograd(_gradient, setup_context=_save)
torch.library.register_autocast("minibert::attention", "cuda", torch.float16)


def attend(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float,
) -> Tensor:
    """Attention of packed sentences by the project's kernels; arguments as ``attend_packed``."""
    seed = _seed(q_NHK, dropout_p)
    return torch.ops.minibert.attention(
        q_NHK, k_NHK, v_NHK, starts, seed, max_length, dropout_p
    )[0]  # fmt: skip


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Which dropout mask: (1,) int64 on the device of x; None without dropout.

    By torch's generator of the device: ``torch.manual_seed`` fixes it, and a captured CUDA graph
    draws another at every replay.
    """
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None


# ---- dropout, residual and LayerNorm -----------------------------------------------------------


@torch.library.custom_op(
    "minibert::add_norm",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float eps, "
    "float dropout_p) -> (Tensor, Tensor, Tensor)",
)
def add_norm_forward(x_ND, residual_ND, weight_D, bias_D, seed, eps, dropout_p):
    """The sum normalised, each row's mean and 1 / √(variance + eps); see ``norm.forward``."""
    return norm.forward(
        launch_norm, x_ND, residual_ND, weight_D, bias_D, seed, eps, dropout_p
    )  # fmt: skip


@torch.library.custom_op(
    "minibert::add_norm_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor dy, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor scale, "
    "Tensor? seed, float dropout_p) -> (Tensor, Tensor, Tensor)",
)
def add_norm_backward(dy_ND, x_ND, residual_ND, weight_D, mean_N, scale_N, seed, dropout_p):
    """Gradients of x, of the residual, and (2, D) of weight and bias; see ``norm.backward``."""
    return norm.backward(
        launch_norm, dy_ND, x_ND, residual_ND, weight_D, mean_N, scale_N, seed, dropout_p
    )  # fmt: skip


@add_norm_forward.register_fake
def _(x_ND, residual_ND, weight_D, bias_D, seed, eps, dropout_p):
    mean_N, scale_N = (x_ND.new_empty(x_ND.shape[0], dtype=torch.float32) for _ in range(2))
    return residual_ND.new_empty(residual_ND.shape), mean_N, scale_N


@add_norm_backward.register_fake
def _(dy_ND, x_ND, residual_ND, weight_D, mean_N, scale_N, seed, dropout_p):
    sums_2D = x_ND.new_empty((2, x_ND.shape[1]), dtype=torch.float32)
    return x_ND.new_empty(x_ND.shape), residual_ND.new_empty(residual_ND.shape), sums_2D


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_ND, residual_ND, weight_D, _bias_D, seed, _eps, ctx.dropout_p = inputs
    _y_ND, mean_N, scale_N = output
    ctx.save_for_backward(x_ND, residual_ND, weight_D, mean_N, scale_N, seed)
    ctx.mark_non_differentiable(mean_N, scale_N)


def _norm_gradient(ctx: Any, dy_ND: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, residual_ND, weight_D, mean_N, scale_N, seed = ctx.saved_tensors
    dx_ND, d_residual_ND, sums_2D = torch.ops.minibert.add_norm_backward(
        dy_ND, x_ND, residual_ND, weight_D, mean_N, scale_N, seed, ctx.dropout_p
    )
    dweight_D, dbias_D = sums_2D.to(weight_D.dtype).unbind(0)
    return dx_ND, d_residual_ND, dweight_D, dbias_D, None, None, None


add_norm_forward.register_autograd(_norm_gradient, setup_context=_save_norm)


def add_norm(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """LayerNorm(dropout(x) + residual) by the project's kernels; arguments as ``norm.forward``."""
    seed = _seed(x_ND, dropout_p)
    return torch.ops.minibert.add_norm(
        x_ND, residual_ND, weight_D, bias_D, seed, eps, dropout_p
    )[0]  # fmt: skip
