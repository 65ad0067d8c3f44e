"""The attention kernels as operators of torch: ``torch.ops.minibert.attention``, with gradient.

Registered this way they are to autograd, autocast, ``torch.compile`` and CUDA graphs what torch's
own operators are: functions of tensors with known shapes and no hidden state. The dropout mask is a
function of ``seed``, a tensor; so a graph that draws the seed anew draws the mask anew.

Shape legend: see layout.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minibert.kernels import attention
from minibert.kernels.launch import launch


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
    seed = None
    if dropout_p > 0:
        # By torch's generator of the device: `torch.manual_seed` fixes it, and a captured CUDA
        # graph draws another at every replay.
        seed = torch.randint(2**63 - 1, (1,), device=q_NHK.device)
    return torch.ops.minibert.attention(
        q_NHK, k_NHK, v_NHK, starts, seed, max_length, dropout_p
    )[0]  # fmt: skip
