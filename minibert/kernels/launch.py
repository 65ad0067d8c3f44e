"""Starts the kernels on a GPU, with NVIDIA's ``cuda-core``."""

from __future__ import annotations

from functools import lru_cache

import torch

from minibert.kernels import attention, build


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


def load(arch: str, defines: dict[str, int]):
    """A variant of attention.cu as cuda-core's ``ObjectCode``."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(build.cubin("attention.cu", arch, defines))


@lru_cache
def _kernel(name: str, arch: str, defines: tuple[tuple[str, int], ...]):
    # One per architecture, not per device: the driver loads it into whichever context is current.
    return load(arch, dict(defines)).get_kernel(name)


def launch(step: attention.Launch) -> None:
    """Enqueue one kernel on torch's current stream of the tensors' device; returns at once.

    Capturing a CUDA graph works after one call outside the capture, which loads the kernel.

    Raises:
        BuildError: the kernel has to be compiled first, and cannot be.
    """
    from cuda.core import Device, LaunchConfig
    from cuda.core import launch as enqueue

    device = step.problem.q.device
    kernel = _kernel(step.kernel, architecture(device), tuple(sorted(step.defines.items())))
    with torch.cuda.device(device):
        # torch and cuda-core share the device's primary context; autograd's threads may not have
        # made it current yet.
        Device(device.index).set_current()
        stream = _Stream(torch.cuda.current_stream().cuda_stream)
        config = LaunchConfig(grid=step.grid, block=step.threads)
        enqueue(stream, config, kernel, *attention.pack(step.problem))
