"""What this machine can do, and what "auto" therefore means on it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from minibert.files import MinibertError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DtypeChoice(NamedTuple):
    """A number format and why it was taken."""

    dtype: torch.dtype
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


def choose_dtype(name: str, device: torch.device) -> DtypeChoice:
    """Settle "auto" for inference and autocast by what the hardware multiplies natively.

    Args:
        name: "fp32", "bf16", "fp16" or "auto".
        device: where the model runs.

    Raises:
        ValueError: no format has that name.
    """
    if name in DTYPES:
        return DtypeChoice(DTYPES[name], "asked for")
    if name != "auto":
        raise ValueError(f"dtype {name!r} is unknown: choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        # is_bf16_supported() says yes to emulation too, so ask for the capability instead.
        capability = torch.cuda.get_device_capability(device)
        version = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return DtypeChoice(torch.bfloat16, f"{version} has bf16 tensor cores")
        if capability >= (7, 0):
            return DtypeChoice(torch.float16, f"{version} has fp16 tensor cores, but none for bf16")
        return DtypeChoice(torch.float32, f"{version} has no tensor cores")
    flags = cpu_flags()
    for flag, what in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16")):
        if flag in flags:
            return DtypeChoice(torch.bfloat16, f"the CPU multiplies bf16 natively ({what})")
    return DtypeChoice(torch.float32, "the CPU does not multiply bf16 natively")


def name_of(dtype: torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def describe() -> str:
    """The page that ``minibert info`` prints."""
    from importlib.metadata import PackageNotFoundError, version

    from minibert import __version__, attention, hub

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "numpy", "tokenizers", "safetensors")
    device = choose_device()
    dtype = choose_dtype("auto", device)
    choice = attention.choose("auto", device)
    lines = [
        f"minibert     {__version__}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"packages     {', '.join(f'{package} {of(package)}' for package in packages)}",
        f"cpu          {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"cpu dtype    {_line(choose_dtype('auto', torch.device('cpu')))}",
        f"gpu          {_gpus()}",
        f"home         {hub.home()}",
        f"attention    {', '.join(attention.IMPLEMENTATIONS)}",
        f"auto device  {device}",
        f"auto dtype   {_line(dtype)}",
        f"auto attn    {choice.name}: {choice.reason}",
    ]
    return "\n".join(lines)


def _line(choice: DtypeChoice) -> str:
    return f"{name_of(choice.dtype)}: {choice.reason}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return "; ".join(found)
