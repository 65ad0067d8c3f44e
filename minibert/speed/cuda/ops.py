"""The kernels as functions of torch: with gradients, and as operators for ``torch.compile``.

An operator, ``torch.ops.minibert.attention``, tells a compiler its shapes and that it has no hidden
state. Eager calls take the short way, ``autograd.Function`` or, without gradients, none: with small
batches a GPU waits for the host. The dropout mask is a function of ``seed``, a tensor, so a CUDA
graph that draws a new seed applies a new mask.

Shape legend: see model/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from minibert.files import MinibertError
from minibert.speed.cuda import attention, norm, seeds


def _operator(name: str, function: Callable, schema: str) -> CustomOpDef:
    return custom_op(name, mutates_args=(), device_types="cuda", schema=schema)(function)


def _differentiate_once() -> None:
    """Instead of torch's ``once_differentiable``, which takes 6 µs a call, 36 times in a step."""
    if torch.is_grad_enabled():
        raise MinibertError(
            "the CUDA kernels have no second derivatives: leave out create_graph, or use "
            "attn_implementation='sdpa'"
        )


# ---- attention ---------------------------------------------------------------------------------

attention_forward = _operator(
    "minibert::attention",
    attention.forward,
    "(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor? seed, int max_length, "
    "float dropout_p) -> (Tensor, Tensor)",
)
attention_backward = _operator(
    "minibert::attention_backward",
    attention.backward,
    "(Tensor d_context, Tensor q, Tensor k, Tensor v, Tensor context, Tensor lse, "
    "Tensor starts, Tensor? seed, int max_length, float dropout_p) -> Tensor",
)


@attention_forward.register_fake
def _(q_NHK, k_NHK, v_NHK, starts, seed, max_length, dropout_p):
    N, H, _K = q_NHK.shape
    return q_NHK.new_empty(q_NHK.shape), q_NHK.new_empty((H, N), dtype=torch.float32)


@attention_backward.register_fake
def _(d_context_NHK, q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed, max_length, dropout_p):
    N, H, K = q_NHK.shape
    return q_NHK.new_empty((N, 3, H, K))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_NHK, k_NHK, v_NHK, starts, seed, ctx.max_length, ctx.dropout_p = inputs
    ctx.save_for_backward(q_NHK, k_NHK, v_NHK, *output, starts, seed)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, d_context_NHK: Tensor, _d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_N3HK = torch.ops.minibert.attention_backward(
        d_context_NHK, *ctx.saved_tensors, ctx.max_length, ctx.dropout_p
    )
    return (*grad_N3HK.unbind(1), None, None, None, None)


attention_forward.register_autograd(_gradient, setup_context=_save)
torch.library.register_autocast("minibert::attention", "cuda", torch.float16)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q_NHK, k_NHK, v_NHK, starts, seed, ctx.max_length, ctx.dropout_p = inputs
        context_NHK, lse_HN = attention.forward(*inputs)
        ctx.save_for_backward(q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed)
        return context_NHK

    @staticmethod
    def backward(ctx: Any, d_context_NHK: Tensor) -> tuple[Tensor | None, ...]:
        _differentiate_once()
        q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed = ctx.saved_tensors
        grad_N3HK = attention.backward(
            d_context_NHK, q_NHK, k_NHK, v_NHK, context_NHK, lse_HN, starts, seed,
            ctx.max_length, ctx.dropout_p,
        )  # fmt: skip
        return (*grad_N3HK.unbind(1), None, None, None, None)


def attend(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float,
) -> Tensor:
    """Attention over packed sentences; arguments as for ``attend_packed``."""
    seed = seeds.draw(q_NHK.device) if dropout_p > 0 else None
    inputs = (q_NHK, k_NHK, v_NHK, starts, seed, max_length, dropout_p)
    if torch.compiler.is_compiling():
        return torch.ops.minibert.attention(*inputs)[0]
    return _Attention.apply(*inputs) if torch.is_grad_enabled() else attention.forward(*inputs)[0]


# ---- dropout, residual and LayerNorm -----------------------------------------------------------

add_norm_forward = _operator(
    "minibert::add_norm",
    norm.forward,
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float eps, "
    "float dropout_p) -> (Tensor, Tensor, Tensor)",
)
add_norm_backward = _operator(
    "minibert::add_norm_backward",
    norm.backward,
    "(Tensor dy, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor scale, "
    "Tensor? seed, float dropout_p) -> (Tensor, Tensor, Tensor)",
)


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
    dx_ND, d_residual_ND, sums_2D = torch.ops.minibert.add_norm_backward(
        dy_ND, *ctx.saved_tensors, ctx.dropout_p
    )
    dweight_D, dbias_D = sums_2D.to(ctx.saved_tensors[2].dtype).unbind(0)
    return dx_ND, d_residual_ND, dweight_D, dbias_D, None, None, None


add_norm_forward.register_autograd(_norm_gradient, setup_context=_save_norm)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x_ND, residual_ND, weight_D, _bias_D, seed, _eps, ctx.dropout_p = inputs
        y_ND, mean_N, scale_N = norm.forward(*inputs)
        ctx.save_for_backward(x_ND, residual_ND, weight_D, mean_N, scale_N, seed)
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        _differentiate_once()
        x_ND, residual_ND, weight_D, mean_N, scale_N, seed = ctx.saved_tensors
        dx_ND, d_residual_ND, sums_2D = norm.backward(
            dy_ND, x_ND, residual_ND, weight_D, mean_N, scale_N, seed, ctx.dropout_p
        )
        dweight_D, dbias_D = sums_2D.to(weight_D.dtype).unbind(0)
        return dx_ND, d_residual_ND, dweight_D, dbias_D, None, None, None


def add_norm(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """LayerNorm(dropout(x) + residual); arguments as for ``norm.forward``."""
    seed = seeds.draw(x_ND.device) if dropout_p > 0 else None
    inputs = (x_ND, residual_ND, weight_D, bias_D, seed, eps, dropout_p)
    if torch.compiler.is_compiling():
        return torch.ops.minibert.add_norm(*inputs)[0]
    return _AddNorm.apply(*inputs) if torch.is_grad_enabled() else norm.forward(*inputs)[0]
