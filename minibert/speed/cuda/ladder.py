"""Which fused attention a device gets: the ladder of ``attn_implementation="fused"``.

1. On compute capability 8.0 and later, float16 and bfloat16: torch's variable-length flash kernels.
2. On 7.5 and later, float16, head sizes 32 and 64: the project's own kernels.
3. Anything else that torch's variable-length memory-efficient kernels take: those.

Below that there is an error that says why and what else can be done, and never a slower path taken
in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.files import MinibertError
from minibert.speed.cuda import build

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


class Rung(NamedTuple):
    """What computes, and why."""

    name: str  # "own kernels", "torch efficient" or "torch flash"
    reason: str  # one sentence


class FusedUnavailableError(MinibertError):
    """No fused attention for this device and dtype; the message names the alternatives."""


@lru_cache
def choose(device: torch.device, dtype: torch.dtype, head_size: int) -> Rung:
    """The rung for this device, dtype and head size; compiles the own kernels if it is theirs.

    Raises:
        FusedUnavailableError: none can run.
    """
    instead = "use attn_implementation='sdpa' or 'eager'"
    if device.type != "cuda":
        raise FusedUnavailableError(f"fused attention needs a CUDA device, not {device}: {instead}")
    capability = torch.cuda.get_device_capability(device)
    at = f"compute capability {capability[0]}.{capability[1]}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        raise FusedUnavailableError(
            f"bfloat16 needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}: "
            f"use float16, or {instead}"
        )
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise FusedUnavailableError(f"fused attention does not compute in {dtype}: {instead}")
    if head_size % 8 or head_size > 256:
        raise FusedUnavailableError(
            f"fused attention needs a head size that is a multiple of 8 up to 256, "
            f"not {head_size}: {instead}"
        )

    half = dtype in (torch.float16, torch.bfloat16)
    if half and capability >= (8, 0) and torch.backends.cuda.is_flash_attention_available():
        return Rung("torch flash", f"{at} has cp.async, which torch's flash kernels use")
    obstacle = _obstacle_to_own_kernels(device, dtype, head_size, capability)
    if obstacle is None:
        return Rung("own kernels", f"{at}, {_short(dtype)}, head size {head_size}")
    return Rung("torch efficient", f"the own kernels cannot run: {obstacle}")


def _obstacle_to_own_kernels(
    device: torch.device, dtype: torch.dtype, head_size: int, capability: tuple[int, int]
) -> str | None:
    """Why the project's kernels cannot run here, or None."""
    from minibert.speed.cuda.attention import HEAD_SIZES
    from minibert.speed.cuda.launch import architecture, load

    if capability < (7, 5):
        return f"they need compute capability 7.5, this is {capability[0]}.{capability[1]}"
    if dtype != torch.float16:
        return f"they compute in float16, not {_short(dtype)}"
    if head_size not in HEAD_SIZES:
        return f"they have head sizes {HEAD_SIZES}, not {head_size}"
    try:
        # Loaded too: a binary in the cache is of no use where cuda-core has been uninstalled.
        load("attention.cu", architecture(device), {"HEAD_SIZE": head_size, "DROPOUT": 0})
    except build.BuildError as error:
        return str(error)
    return None


@lru_cache
def obstacle_to_norm(device: torch.device, hidden_size: int) -> str | None:
    """Why dropout, residual and LayerNorm take three passes here, or None; compiles the kernels."""
    from minibert.speed.cuda import norm
    from minibert.speed.cuda.launch import architecture, load

    if device.type != "cuda":
        return f"the one-pass kernels need a CUDA device, not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return f"they need compute capability 7.5, this is {capability[0]}.{capability[1]}"
    if hidden_size % norm.STEP or hidden_size > norm.MOST:
        return f"they have widths of {norm.STEP} to {norm.MOST}, not {hidden_size}"
    try:
        defines = {"HIDDEN": hidden_size, "DROPOUT": 0, "WIDE": 1}
        load("norm.cu", architecture(device), defines)
    except build.BuildError as error:
        return str(error)
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def torch_efficient(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    starts: Tensor,
    max_length: int,
    dropout_p: float,
) -> Tensor:
    """torch's memory-efficient kernels over packed sentences, which nested tensors use too."""
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
        torch.is_grad_enabled(),  # keep the log-sum-exp, which the backward pass needs
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
    """The project's kernels."""
    from minibert.speed.cuda import ops

    return ops.attend(q_NHK, k_NHK, v_NHK, starts, max_length, dropout_p)


RUNGS: dict[str, Attend] = {
    "own kernels": own_kernels,
    "torch efficient": torch_efficient,
    "torch flash": torch_flash,
}


def name_of_rung(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The chosen rung's name; to ``torch.compile`` a constant."""
    return choose(device, dtype, head_size).name


# The mark that torch.compiler.assume_constant_result sets. To set it that way imports the compiler,
# which takes as long as all the rest of torch.
for constant in (name_of_rung, obstacle_to_norm):
    vars(constant)["_dynamo_marked_constant"] = True
