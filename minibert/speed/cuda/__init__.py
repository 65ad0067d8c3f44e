"""The project's CUDA kernels: fused attention; dropout, residual and LayerNorm; AdamW.

Reading order: ``docs/fused-attention.md``; ``primitives.cuh``, ``tiles.cuh``, ``problem.cuh`` and
``attention.cu`` (the kernels); ``attention.py`` (their arguments), ``build.py`` (compiling),
``launch.py`` (starting), ``seeds.py`` (of dropout), ``ops.py`` (operators of torch);
``obstacles.py`` and ``ladder.py`` (what runs here); then ``norm.cu`` and ``norm.py``, ``adamw.cu``
and ``adamw.py``. Importing this package compiles nothing and needs no CUDA.

Shape legend: see model/layout.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.speed.cuda import norm, obstacles
from minibert.speed.cuda.ladder import RUNGS, FusedUnavailableError, Rung, choose, name_of_rung

__all__ = [
    "FusedUnavailableError",
    "Rung",
    "add_norm",
    "attend_packed",
    "attend_padded",
    "choose",
]

# The mark that torch.compiler.assume_constant_result sets. Calling it would import the compiler,
# which takes as long as the rest of torch.
for _constant in (name_of_rung, obstacles.norm):
    vars(_constant)["_dynamo_marked_constant"] = True


def attend_packed(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ / √K) v within each sentence (Vaswani et al. 2017, equation 1).

    Args:
        q_NHK, k_NHK, v_NHK: (N, H, K) on a CUDA device, float16, bfloat16 or float32; slices of one
            (N, 3, H, K) product are read in place. ``torch.autocast`` casts them to its dtype.
        starts: (B + 1,) int32 on the same device; sentence b holds tokens starts[b]:starts[b + 1]
            and may be empty.
        max_length: at least the length of the longest sentence. Not checked, because that would
            wait for the GPU: if it is too low, the tokens beyond it are undefined.
        dropout_p: probability of dropping an attention weight; the mask depends on torch's
            generator of the device.

    Returns:
        Context (N, H, K), in the dtype of the computation.

    Raises:
        FusedUnavailableError: no fused kernel runs on this device in this dtype.
        ValueError: a shape or dtype that the kernels do not support.
    """
    device = q_NHK.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        q_NHK, k_NHK, v_NHK = (x_NHK.to(dtype) for x_NHK in (q_NHK, k_NHK, v_NHK))
    attend = RUNGS[name_of_rung(device, q_NHK.dtype, q_NHK.shape[2])]
    return attend(q_NHK, k_NHK, v_NHK, starts, max_length, dropout_p)


def attend_padded(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    tokens: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """``attend_packed`` for a padded batch: padding neither attends nor is attended to.

    Args:
        q_NHK, k_NHK, v_NHK: (N, H, K), padding included; N = B * S.
        tokens: (number of real tokens,) int64, their ascending indices on the N axis:
            ``mask.flatten().nonzero()[:, 0]``.
        starts: (B + 1,) int32, over the real tokens; a row of padding alone is empty:
            ``F.pad(mask.sum(1).cumsum(0), (1, 0)).int()``.
        max_length, dropout_p: as for ``attend_packed``; S is a valid max_length.

    Returns:
        Context (N, H, K), zero at padding; so a fully masked row is finite.
    """
    # Not q_NHK[tokens], whose gradient sorts the indices.
    shape = q_NHK.shape
    q_NHK, k_NHK, v_NHK = (x_NHK.index_select(0, tokens) for x_NHK in (q_NHK, k_NHK, v_NHK))
    context = attend_packed(q_NHK, k_NHK, v_NHK, starts, max_length, dropout_p)
    return context.new_zeros(shape).index_copy(0, tokens, context)


def add_norm(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """LayerNorm(dropout(x) + residual), in one pass if the kernels can run, else in three.

    The kernels run if x is float16 and ``obstacles.norm`` finds no obstacle.

    Args:
        x_ND: (N, D), floating point.
        residual_ND: (N, D), floating point; float32 under autocast.
        weight_D, bias_D: (D,), of the LayerNorm.
        eps: of the LayerNorm.
        dropout_p: the mask depends on torch's generator of the device.

    Returns:
        (N, D); from the kernels in the residual's dtype.
    """
    place = (x_ND.device, x_ND.shape[1], residual_ND.dtype)
    if norm.fits(x_ND, residual_ND) and obstacles.norm(*place) is None:
        from minibert.speed.cuda import ops

        return ops.add_norm(x_ND, residual_ND, weight_D, bias_D, eps, dropout_p)
    h_ND = F.dropout(x_ND, dropout_p) + residual_ND
    return F.layer_norm(h_ND, h_ND.shape[1:], weight_D, bias_D, eps)
