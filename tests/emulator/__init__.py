"""Runs the CUDA kernels on the CPU: their source, compiled against ``emulator.h``.

Importing this package gives the kernels a CPU side: ``launch.enqueue`` runs launches on CPU tensors
in the emulator, and torch's operators accept CPU tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor

from minibert.speed.cuda import attention, build, launch, norm, ops
from minibert.speed.cuda.launch import Launch

INPUT, OUTPUT, UPDATED = range(3)  # a tensor's role in a launch; the last one is changed in place
OUTPUTS = {
    "forward": ("context", "lse"),
    "backward_q": ("dq", "delta"),
    "backward_kv": ("dk", "dv"),
    "add_norm": ("y", "mean", "scale"),
    "add_norm_backward": ("dx", "dresidual", "partial"),
    "add_norm_sums": ("sums",),
    "squares": ("squares",),
    "adamw": (),
}
_BUILDS = TemporaryDirectory(prefix="minibert-emulator-")
_BUILDING = Lock()
_ORDERS = random.Random(0)  # not torch's generator, whose state the tests look at
# -Og: these kernels take longer to compile than to run. _FORTIFY_SOURCE forbids longjmp between
# stacks, which is how fibers switch.
_COMPILER = (os.environ.get("CXX", "g++"), "-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", "-Og")


class EmulationError(AssertionError):
    """A kernel did something forbidden."""


class View(NamedTuple):
    """The bytes of a tensor that a launch may touch."""

    name: str
    address: int
    rows: int
    row_bytes: int
    stride: int  # bytes from one row to the next
    role: int


def views(work: Launch, outputs: Sequence[str] | None = None) -> list[View]:
    """All bytes that a launch may touch; ``outputs`` are ``OUTPUTS`` by default."""
    if outputs is None:
        outputs = OUTPUTS[work.kernel.removesuffix("_long").removesuffix("_short")]
    found = [
        _view(name, x, OUTPUT if name in outputs else INPUT)
        for name, x in work.parameters.items()
        if isinstance(x, Tensor)
    ]
    return found + (_updated(**work.parameters) if work.file == "adamw.cu" else [])


def _view(name: str, x: Tensor, role: int) -> View:
    """Rows along a tensor's first dimension; a vector is one row."""
    if x.dim() == 1:
        x = x[None]
    rows, size = x.shape[0], x.element_size()
    row_bytes = x[0].numel() * size if rows else 0
    assert x[:1].contiguous().stride()[1:] == x.stride()[1:], f"{name}: rows with holes"
    return View(name, x.data_ptr(), rows, row_bytes, max(x.stride(0) * size, 1), role)


def _updated(tensors: Tensor, sizes: Tensor, scalars: Tensor | None = None, **_: Any) -> list[View]:
    """The tensors that AdamW's table of addresses points to; no scalars, no update."""
    found = []
    names = ("parameter", "gradient", "first", "second")
    for i, (addresses, size) in enumerate(zip(tensors.tolist(), sizes.tolist())):
        updated = addresses[1] and scalars is not None and scalars[3]
        for name, address in zip(names, addresses):
            role = UPDATED if updated and name != "gradient" else INPUT
            if address:
                found.append(View(f"{name} {i}", address, 1, 4 * size, 4 * size, role))
    return found


@cache
def _header() -> Path:
    """``emulator.h`` precompiled: it takes longer than the kernels."""
    header = Path(_BUILDS.name) / "emulator.h"
    header.write_text((Path(__file__).parent / "emulator.h").read_text())
    command = [*_COMPILER, "-w", "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    subprocess.run(command, check=True)
    return header


class Emulator:
    """The kernels of one source.

    Args:
        text: C++ source without ``primitives.cuh``, which ``emulator.h`` replaces.
        defines: preprocessor macros.
    """

    def __init__(self, text: str, defines: dict[str, int]) -> None:
        macros = [f"-D{name}={value}" for name, value in defines.items()]
        digest = hashlib.sha256("".join([text, *macros]).encode()).hexdigest()[:16]
        library = Path(_BUILDS.name) / f"{digest}.so"
        with _BUILDING:
            header = _header()
        command = [
            *_COMPILER,
            *macros,
            "-include",
            header,
            "-shared",
            "-x",
            "c++",
            "-",
            "-o",
            library,
        ]
        subprocess.run(command, input=text.encode(), check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_launch.restype = ctypes.c_char_p
        self.library.emulator_bank_conflicts.restype = ctypes.c_uint64
        self.bank_conflicts = 0

    def run(
        self, work: Launch, outputs: Sequence[str] | None = None, order: int | None = None
    ) -> None:
        """Run one launch.

        Args:
            work: on CPU tensors.
            outputs: parameters that the kernel must write completely; ``OUTPUTS`` by default.
            order: seed for the order of the threads; random by default.

        Raises:
            EmulationError: a forbidden access, a race, a deadlock, or an incomplete output.
        """
        self.watch(work, outputs)
        self.start(work.kernel, work.grid, work.threads, launch.pack(work), order)

    def watch(self, work: Launch, outputs: Sequence[str] | None = None) -> None:
        """Declare the tensors that the next start may touch; fill its outputs with NaN."""
        self.library.emulator_clear_views()
        for view in views(work, outputs):
            x = work.parameters.get(view.name)
            if view.role == OUTPUT and isinstance(x, Tensor):
                x.fill_(float("nan") if x.is_floating_point() else -1)
            self.library.emulator_add_view(
                view.name.encode(),
                ctypes.c_void_p(view.address),
                *map(ctypes.c_int64, (view.rows, view.row_bytes, view.stride)),
                view.role,
            )

    def start(
        self,
        kernel: str,
        grid: tuple[int, ...],
        threads: int,
        parameters: Sequence[Any],
        order: int | None = None,
    ) -> None:
        """Start a kernel on parameters as ``launch.pack`` gives them."""
        values = [np.array(x) for x in parameters]  # an address becomes 8 bytes
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        self.call(kernel, grid, threads, pointers, order, len(values))

    def call(
        self,
        kernel: str,
        grid: tuple[int, ...],
        threads: int,
        values: Any,
        order: int | None = None,
        count: int = -1,
    ) -> None:
        """Start a kernel on an array of pointers to its arguments, as the driver gets it.

        Args:
            kernel, grid, threads, order: as above.
            values: the array.
            count: its length; -1: not known.
        """
        order = _ORDERS.getrandbits(32) if order is None else order
        message = self.library.emulator_launch(
            kernel.encode(), *grid, threads, values, count, order
        )
        self.bank_conflicts += self.library.emulator_bank_conflicts()
        if message:
            raise EmulationError(message.decode())


def source(file: str) -> str:
    """A source as the emulator compiles it; tests that change a kernel replace this function."""
    return build.source(file, primitives=False)


@cache
def _compiled(text: str, defines: tuple[tuple[str, int], ...]) -> Emulator:
    return Emulator(text, dict(defines))


def machine(file: str, defines: dict[str, int]) -> Emulator:
    """The emulator of a source, compiled on first use."""
    return _compiled(source(file), tuple(sorted(defines.items())))


enqueue_on_gpu = launch.enqueue


def enqueue(work: Launch) -> None:
    """``launch.enqueue`` for the GPU and the CPU."""
    if any(isinstance(x, Tensor) and x.is_cuda for x in work.parameters.values()):
        enqueue_on_gpu(work)
    else:
        machine(work.file, work.defines).run(work)


launch.enqueue = enqueue
ops.attention_forward.register_kernel("cpu")(attention.forward)
ops.attention_backward.register_kernel("cpu")(attention.backward)
ops.add_norm_forward.register_kernel("cpu")(norm.forward)
ops.add_norm_backward.register_kernel("cpu")(norm.backward)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, on either device."""
    launches: list[Launch] = []

    original = launch.enqueue

    def record(work: Launch) -> None:
        launches.append(work)
        original(work)

    with patch.object(launch, "enqueue", record):
        yield launches
