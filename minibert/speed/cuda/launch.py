"""Starts the kernels on a GPU, with NVIDIA's ``cuda-core``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from minibert.speed.cuda import attention, build, norm


class _Stream:
    """A torch stream as cuda-core takes it: anything that says ``(version, handle)``."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


def architecture(device: torch.device) -> str:
    """What NVRTC calls the device's architecture, for example ``sm_75``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def load(file: str, arch: str, defines: dict[str, int]):
    """A variant of a source as cuda-core's ``ObjectCode``.

    Raises:
        BuildError: it has to be compiled, and cannot be; or cuda-core is missing.
    """
    code = build.cubin(file, arch, defines)
    try:
        from cuda.core import ObjectCode
    except ImportError as error:  # compiled in better days
        raise build.BuildError(
            f"the CUDA kernels are launched by cuda-core, which cannot be imported ({error}): "
            "pip install 'minibert[cuda]'"
        ) from error
    return ObjectCode.from_cubin(code)


@lru_cache
def _kernel(file: str, name: str, arch: str, defines: tuple[tuple[str, int], ...]):
    # One per architecture, not per device: the driver loads it into whichever context is current.
    return load(file, arch, dict(defines)).get_kernel(name)


def launch(step: attention.Launch) -> None:
    """Start one of the attention kernels; see ``enqueue``."""
    parameters = attention.pack(step.problem._asdict())
    device = step.problem.q.device
    enqueue(device, "attention.cu", step.kernel, step.defines, step.grid, step.threads, parameters)


def launch_norm(step: norm.Launch) -> None:
    """Start one of the kernels of ``norm.cu``; see ``enqueue``."""
    device = next(x.device for x in step.parameters.values() if isinstance(x, torch.Tensor))
    enqueue(
        device, "norm.cu", step.kernel, step.defines, (step.blocks, 1), step.threads,
        attention.pack(step.parameters),
    )  # fmt: skip


def enqueue(
    device: torch.device,
    file: str,
    name: str,
    defines: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    parameters: list[Any],
) -> None:
    """Put a kernel on torch's current stream of the device; returns at once.

    Capturing a CUDA graph works after one call outside the capture, which loads the kernel.

    Raises:
        BuildError: the kernel has to be compiled first, and cannot be.
    """
    from cuda.core import Device, LaunchConfig
    from cuda.core import launch as start

    kernel = _kernel(file, name, architecture(device), tuple(sorted(defines.items())))
    with torch.cuda.device(device):
        # torch and cuda-core share the device's primary context; autograd's threads may not have
        # made it current yet.
        Device(device.index).set_current()
        stream = _Stream(torch.cuda.current_stream().cuda_stream)
        config = LaunchConfig(grid=grid, block=threads)
        start(stream, config, kernel, *parameters)
