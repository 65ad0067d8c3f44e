"""One kernel launch: what it is, how its arguments are packed, how it starts.

``attention.py``, ``norm.py`` and ``adamw.py`` say what to launch; ``enqueue`` starts it, with
NVIDIA's cuda-core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minibert.speed.cuda import build


@dataclass(eq=False)  # tensors have no single ==
class Launch:
    """One launch of one kernel.

    Attributes:
        file: source in this directory, for example "attention.cu".
        kernel: its name in that file.
        defines: preprocessor macros, which select the binary.
        grid: blocks in x and y.
        threads: per block.
        tensors: by name, in the order the kernel declares them, first a tensor; None for a null
            pointer.
        numbers: what the kernel declares after them: a float for ``float``, an int below 2^31 for
            ``int`` and ``u32``.
    """

    file: str
    kernel: str
    defines: dict[str, int]
    grid: tuple[int, int]
    threads: int
    tensors: dict[str, Tensor | None]
    numbers: dict[str, float]

    @property
    def parameters(self) -> dict[str, Tensor | float | None]:
        """All in the kernel's order."""
        return {**self.tensors, **self.numbers}


def aligned(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x as the kernels' vector loads need it: contiguous, from a multiple of 16 bytes on.

    A contiguous tensor may begin anywhere in its storage; ``contiguous`` would leave it there.

    Args:
        x: copied only if it is not so yet.
        dtype: None keeps that of x.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0 and dtype in (None, x.dtype):
        return x
    return x.to(dtype or x.dtype, memory_format=torch.contiguous_format, copy=True)


def pack(launch: Launch) -> tuple[Any, ...]:
    """Parameters for ``cuda.core.launch``: an address as int, a number as a 4-byte numpy scalar.

    cuda-core takes numpy's scalars in a fifth of the time that it needs for those of ctypes.
    """
    addresses = [0 if x is None else x.data_ptr() for x in launch.tensors.values()]
    return (*addresses, *_numbers(*launch.numbers.values()))


@lru_cache(maxsize=1024, typed=True)  # typed: 1 and 1.0 are equal
def _numbers(*values: float) -> tuple[Any, ...]:
    return tuple(np.float32(x) if isinstance(x, float) else np.int32(x) for x in values)


@lru_cache
def dropout(dropout_p: float) -> dict[str, float]:
    """The two parameters of a kernel with dropout.

    ``drop_below`` is compared with 16 random bits, so the actual probability is a multiple of
    1/65536; ``keep_scale`` is exactly its 1 / (1 - p).

    Raises:
        ValueError: p is not in [0, 1), or rounds to 1.
    """
    drop_below = round(dropout_p * 65536)
    if not 0 <= drop_below < 65536:
        raise ValueError(f"dropout probability must be in [0, 1), got {dropout_p}")
    return {"keep_scale": 65536 / (65536 - drop_below), "drop_below": drop_below}


@lru_cache
def architecture(device: torch.device) -> str:
    """NVRTC's name for the device's architecture, for example ``sm_75``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def load(file: str, arch: str, defines: dict[str, int]):
    """The binary of a source as cuda-core's ``ObjectCode``.

    Raises:
        BuildError: it is not cached and cannot be compiled, or cuda-core is missing.
    """
    code = build.cubin(file, arch, defines)
    try:
        from cuda.core import ObjectCode
    except ImportError as error:  # the cache outlives an uninstalled cuda-core
        raise build.BuildError(
            f"the CUDA kernels are launched with cuda-core, which cannot be imported ({error}): "
            f"{build.INSTALL}"
        ) from error
    return ObjectCode.from_cubin(code)


@lru_cache
def _kernel(file: str, name: str, arch: str, defines: tuple[tuple[str, int], ...]):
    # Per architecture, not per device: the driver loads it into the current context.
    return load(file, arch, dict(defines)).get_kernel(name)


@lru_cache
def _core():
    import cuda.core

    return cuda.core


@lru_cache
def _stream(handle: int):
    return _core().Stream.from_handle(handle)


@lru_cache
def _config(grid: tuple[int, int], threads: int):
    return _core().LaunchConfig(grid=grid, block=threads)


def enqueue(launch: Launch) -> None:
    """Put a launch on torch's current stream of its tensors' device; returns at once.

    The first call loads the kernel, so a CUDA graph can capture the second one.

    Raises:
        BuildError: the kernel is not cached and cannot be compiled.
    """
    first = next(iter(launch.tensors.values()))
    assert first is not None
    device = first.device
    defines = tuple(launch.defines.items())
    kernel = _kernel(launch.file, launch.kernel, architecture(device), defines)
    before = torch.cuda.current_device()
    here = before if device.index is None else device.index
    stream = _stream(torch.cuda.current_stream(here).cuda_stream)
    core = _core()
    # torch and cuda-core share the device's primary context, which may not be current yet in
    # autograd's threads.
    core.Device(here).set_current()
    try:
        config = _config(launch.grid, launch.threads)
        core.launch(stream, config, kernel, *pack(launch))
    finally:
        if before != here:
            core.Device(before).set_current()
