"""A stand-in for NVIDIA's driver, built on first use: the real cuda-core launches on it.

``pretend`` gives ``launch.enqueue`` a GPU: torch says that there is one, its tensors stay on the
CPU, and every launch goes through cuda-core to ``driver.c``.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from minibert.speed.cuda import build, launch

STREAM = 99
_BUILDS = TemporaryDirectory(prefix="minibert-fake-driver-")


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


Values = ctypes.POINTER(ctypes.c_void_p)
OnLaunch = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(Config), ctypes.c_void_p, Values
)


class Started(NamedTuple):
    """A launch as the driver got it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    stream: int | None
    device: int  # of the context that was current


@cache
def library() -> ctypes.CDLL:
    """The stand-in, loaded under the name by which NVIDIA's packages look for the driver."""
    path = Path(_BUILDS.name) / "libcuda.so.1"
    source = Path(__file__).parent / "driver.c"
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-O1", "-w", str(source)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-ldl", "-o", str(path)], check=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def pretend(
    run: Callable[[str, Sequence[int], int, Any], None] | None = None,
    device: int = 0,
    count_only: bool = False,
) -> Iterator[list[Started]]:
    """Give ``launch.enqueue`` a GPU of compute capability 7.5.

    Args:
        run: gets the kernel's name, grid, threads and the driver's array of pointers to values.
        device: the index of torch's current device.
        count_only: record nothing, for measuring time.
    """
    fake, started = library(), []
    fake.fake_reset()

    def on_launch(kernel: bytes, config: Any, context: int, values: Any) -> int:
        c = config.contents
        grid, block = (c.grid_x, c.grid_y, c.grid_z), (c.block_x, c.block_y, c.block_z)
        started.append(Started(kernel.decode(), grid, block, c.stream, context - 1))
        if run is not None:
            run(kernel.decode(), grid[:2], c.block_x, values)
        return 0

    kept = OnLaunch(on_launch)
    if not count_only:
        fake.fake_on_launch(kept)
    stream = SimpleNamespace(cuda_stream=STREAM)
    forget()
    with contextlib.ExitStack() as patches:
        for name, value in {
            "get_device_capability": lambda device=None: (7, 5),
            "current_device": lambda: device,
            "current_stream": lambda device=None: stream,
        }.items():
            patches.enter_context(patch.object(torch.cuda, name, value))
        patches.enter_context(patch.object(build, "cubin", lambda *_: b"code"))
        yield started
    fake.fake_reset()
    forget()


def current_device() -> int:
    """The device whose context is current in this thread."""
    device = ctypes.c_int()
    library().cuCtxGetDevice(ctypes.byref(device))
    return device.value


def forget() -> None:
    """Load kernels again when they are next launched."""
    launch._kernel.cache_clear()
    launch.architecture.cache_clear()
