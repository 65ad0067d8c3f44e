"""Which device and which number format "auto" takes here, and why."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

import torch

from minibert.files import MinibertError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


T = TypeVar("T")


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """What was chosen, and why."""

    value: T
    reason: str


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(flags.split(":", 1)[1].split())


def native_bf16() -> str | None:
    """The instructions by which the CPU multiplies bf16, or None: it has none."""
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
    return next((what for flag, what in known.items() if flag in cpu_flags()), None)


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name; None takes a GPU where there is one.

    Raises:
        MinibertError: torch knows no such device, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MinibertError(
            f"device {name!r}: {reason}: see minibert info for what there is"
        ) from None


def choose_dtype(name: str | torch.dtype, device: torch.device) -> Chosen[torch.dtype]:
    """Settle "auto" for inference and autocast by what the hardware multiplies natively.

    Args:
        name: "fp32", "bf16", "fp16", "auto", or a dtype.
        device: where the model runs.

    Raises:
        ValueError: no format has that name.
    """
    if isinstance(name, torch.dtype):
        return Chosen(name, "requested")
    if name in DTYPES:
        return Chosen(DTYPES[name], "requested")
    if name != "auto":
        raise ValueError(f"dtype {name!r} is unknown: choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        # is_bf16_supported() says yes to emulation too, so ask for the capability instead.
        capability = torch.cuda.get_device_capability(device)
        version = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return Chosen(torch.bfloat16, f"{version} has bf16 tensor cores")
        if capability >= (7, 0):
            return Chosen(torch.float16, f"{version} has fp16 tensor cores, but none for bf16")
        return Chosen(torch.float32, f"{version} has no tensor cores")
    if what := native_bf16():
        return Chosen(torch.bfloat16, f"the CPU multiplies bf16 natively ({what})")
    return Chosen(torch.float32, "the CPU does not multiply bf16 natively")


def ask_for_huge_pages() -> None:
    """Let torch ask Linux for pages of 2 MB for its large tensors, from its first large one on."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that are freed, for whoever needs such a one next.

    Else it hands them back to the system, and every training step fetches its gradients and
    activations again, a page fault for every 4 kB. Blocks up to 1 GB; 2 GB of them at most.

    Returns:
        Whether that is so from here on: not where the C library is another.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    kept = libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, (1 << 31) - 1)
    return bool(kept)


def name_of(dtype: torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16"."""
    return next(name for name, known in DTYPES.items() if known == dtype)
