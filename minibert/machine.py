"""Choose device and dtype, and say why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Generic, TypeVar

import torch

from minibert.files import MinibertError

# OpenMP's threads are not in a child that is forked; it would wait for them for ever.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """What was chosen and why."""

    value: T
    reason: str


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Batches and decoding name no device: here new tensors are on the CPU.

    A program may have called ``torch.set_default_device``. Without it this does nothing, for a
    device context costs every torch function a call in Python.
    """
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


def choose_device(name: str | None = None) -> torch.device:
    """The device with that name; None takes a GPU if there is one.

    Raises:
        MinibertError: torch does not know the device, or this machine does not have it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds shapes, not numbers")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MinibertError(
            f"device {name!r}: {reason}: run minibert info to see what this machine has"
        ) from None


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> Chosen[torch.dtype]:
    """Resolve "auto" to the fastest dtype that the hardware multiplies natively.

    Args:
        dtype: "fp32", "bf16", "fp16", "auto" or a floating-point torch.dtype.
        device: where the model runs.

    Raises:
        ValueError: the dtype is none of these.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return Chosen(dtype, "as requested")
    if dtype in DTYPES:
        return Chosen(DTYPES[str(dtype)], "as requested")
    if dtype != "auto":
        raise ValueError(f"dtype {dtype!r} is unknown: choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        # is_bf16_supported() is also true where bf16 is emulated.
        capability = torch.cuda.get_device_capability(device)
        version = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return Chosen(torch.bfloat16, f"{version} has bf16 tensor cores")
        if capability >= (7, 0):
            return Chosen(torch.float16, f"{version} has fp16 tensor cores but no bf16 ones")
        return Chosen(torch.float32, f"{version} has no tensor cores")
    if instructions := native_bf16():
        return Chosen(torch.bfloat16, f"the CPU multiplies bf16 natively ({instructions})")
    return Chosen(torch.float32, "the CPU does not multiply bf16 natively")


def name_of(dtype: torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16"; for any other dtype its name in torch."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def native_bf16() -> str | None:
    """The CPU's instructions for bf16 products, or None."""
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
    return next((name for flag, name in known.items() if flag in cpu_flags()), None)


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags from /proc/cpuinfo; empty on other systems than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(flags.split(":", 1)[1].split())
