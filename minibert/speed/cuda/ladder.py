"""The ladder of ``attn_implementation="fused"``: which kernels a device, dtype and head size get.

1. Compute capability 8.0 and later, float16 or bfloat16: torch's variable-length flash kernels.
2. 7.5 and later, float16, head size 32 or 64: the project's own kernels.
3. Everything else torch's variable-length memory-efficient kernels support: those.

Anything else is an error that names the reason and the alternatives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.files import MinibertError
from minibert.speed.cuda import obstacles

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


class Rung(NamedTuple):
    """What runs, and why."""

    name: str  # "own kernels", "torch efficient" or "torch flash"
    reason: str  # one sentence


class FusedUnavailableError(MinibertError):
    """No fused attention for this device and dtype; the message names the alternatives."""


@lru_cache
def choose(device: torch.device, dtype: torch.dtype, head_size: int) -> Rung:
    """The rung for this device, dtype and head size. Tries the own kernels if they may run.

    Raises:
        FusedUnavailableError: no rung can run.
    """
    instead = "use attn_implementation='sdpa' or 'eager'"
    if device.type != "cuda":
        raise FusedUnavailableError(f"fused attention needs a CUDA device, not {device}: {instead}")
    capability = torch.cuda.get_device_capability(device)
    version = f"{capability[0]}.{capability[1]}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        raise FusedUnavailableError(
            f"bfloat16 needs compute capability 8.0, {device} has {version}: "
            f"use float16, or {instead}"
        )
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise FusedUnavailableError(f"fused attention does not support {dtype}: {instead}")
    if head_size % 8 or head_size > 256:
        raise FusedUnavailableError(
            f"fused attention needs a head size that is a multiple of 8 up to 256, "
            f"not {head_size}: {instead}"
        )

    half = dtype in (torch.float16, torch.bfloat16)
    if half and capability >= (8, 0) and torch.backends.cuda.is_flash_attention_available():
        reason = f"compute capability {version} has cp.async, which torch's flash kernels use"
        return Rung("torch flash", reason)
    if obstacle := obstacles.attention(device, dtype, head_size):
        return Rung("torch efficient", f"the own kernels cannot run: {obstacle}")
    name = str(dtype).removeprefix("torch.")
    return Rung("own kernels", f"compute capability {version}, {name}, head size {head_size}")


def name_of_rung(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The chosen rung's name; a constant to ``torch.compile``."""
    return choose(device, dtype, head_size).name


def torch_efficient(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float,
) -> Tensor:
    """torch's memory-efficient kernels over packed sentences; nested tensors use them too."""
    context_1NHK = torch.ops.aten._efficient_attention_forward(
        q_NHK[None],
        k_NHK[None],
        v_NHK[None],
        None,  # bias
        starts,
        starts,
        max_length,
        max_length,
        dropout_p,
        0,  # no causal mask
        torch.is_grad_enabled(),  # keep the log-sum-exp for the backward pass
        scale=q_NHK.shape[-1] ** -0.5,
    )[0]
    return context_1NHK[0]


def torch_flash(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float,
) -> Tensor:
    """torch's flash kernels over packed sentences (compute capability 8.0 and later)."""
    return torch.ops.aten._flash_attention_forward(
        q_NHK,
        k_NHK,
        v_NHK,
        starts,
        starts,
        max_length,
        max_length,
        dropout_p,
        False,  # not causal
        False,  # no debug mask
        scale=q_NHK.shape[-1] ** -0.5,
    )[0]


def own_kernels(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float,
) -> Tensor:
    """The project's kernels over packed sentences."""
    from minibert.speed.cuda import ops

    return ops.attend(q_NHK, k_NHK, v_NHK, starts, max_length, dropout_p)


RUNGS: dict[str, Attend] = {
    "own kernels": own_kernels,
    "torch efficient": torch_efficient,
    "torch flash": torch_flash,
}
