"""Runs the CUDA kernels on the CPU: compiles their source against ``emulator.h`` with g++."""

from __future__ import annotations

import ctypes
import hashlib
import random
import subprocess
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from cuda.core._kernel_arg_handler import ParamHolder
from torch import Tensor

from minibert.speed.cuda import attention, build, norm

_BUILDS = TemporaryDirectory(prefix="minibert-emulator-")
_ORDERS = random.Random(0)  # not torch's generator, which tests look at
_WRITES = {
    "forward": ("context", "lse"),
    "backward_q": ("dq", "delta"),
    "backward_kv": ("dk", "dv"),
}


# _FORTIFY_SOURCE forbids longjmp between stacks, which is how fibers switch.
_OPTIONS = ("-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE")


_BUILDING = Lock()


@lru_cache
def _header(optimize: str) -> Path:
    """``emulator.h`` compiled ahead: it takes longer than the kernels behind it."""
    header = Path(_BUILDS.name) / f"emulator{optimize}.h"
    header.write_text((Path(__file__).parent / "emulator.h").read_text())
    compiled = header.with_suffix(".h.gch")
    options = [*_OPTIONS, optimize, "-w", "-x", "c++-header", str(header), "-o", str(compiled)]
    subprocess.run(["g++", *options], check=True)
    return header


class EmulationError(AssertionError):
    """The emulator saw a kernel do something forbidden."""


class Emulator:
    """The kernels of one source text.

    Args:
        text: C++ source, without ``primitives.cuh``: ``emulator.h`` stands for it.
        defines: preprocessor macros.
        optimize: "-O2" where it runs long, "-Og" where compiling takes longer than running.
    """

    def __init__(self, text: str, defines: dict[str, int], optimize: str = "-O2") -> None:
        macros = [f"-D{name}={value}" for name, value in defines.items()]
        digest = hashlib.sha256("".join([text, *macros]).encode()).hexdigest()[:16]
        library = Path(_BUILDS.name) / f"{digest}.so"
        if not library.exists():
            with _BUILDING:
                header = _header(optimize)
            options = [*_OPTIONS, optimize, *macros, "-include", str(header)]
            options += ["-shared", "-x", "c++", "-", "-o", str(library)]
            subprocess.run(["g++", *options], input=text.encode(), check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_launch.restype = ctypes.c_char_p
        self.library.emulator_bank_conflicts.restype = ctypes.c_uint64
        self.bank_conflicts = 0

    def run(self, launch: attention.Launch, seed: int = 0) -> None:
        """Run one launch; ``seed`` is the order of the threads.

        Raises:
            EmulationError: a forbidden access, a race, a deadlock, or an output left unwritten.
        """
        self.watch(launch)
        parameters = attention.pack(launch.problem._asdict())
        # ParamHolder is what cuda.core.launch makes of them for the driver.
        holder = ParamHolder(parameters)
        self.run_packed(launch.kernel, launch.grid, launch.threads, holder, len(parameters), seed)

    def watch(self, launch: attention.Launch) -> None:
        """Name the tensors the next launch may touch, and fill those it must write with NaN."""
        self.library.emulator_clear_views()
        writes = _WRITES[launch.kernel.rsplit("_", 1)[0]]
        for name, value in launch.problem._asdict().items():
            if isinstance(value, Tensor):
                self.view(name, value, name in writes)

    def run_packed(
        self,
        kernel: str,
        grid: tuple[int, ...],
        threads: int,
        parameters: ParamHolder,
        count: int,
        seed: int = 0,
    ) -> None:
        """Run a kernel on the parameters as cuLaunchKernel takes them."""
        pointer = ctypes.c_void_p(parameters.ptr)
        message = self.library.emulator_launch(
            kernel.encode(), *grid, threads, pointer, count, seed
        )
        self.bank_conflicts += self.library.emulator_bank_conflicts()
        if message:
            raise EmulationError(message.decode())

    def view(self, name: str, x: Tensor, role: int) -> None:
        """Tell the emulator which bytes this tensor owns: rows along its first dimension.

        ``role``: 0 an input, 1 an output, 2 updated in place.
        """
        rows, size = x.shape[0], x.element_size()
        row_bytes = x[0].numel() * size if rows else 0
        assert x[:1].contiguous().stride()[1:] == x.stride()[1:], f"{name}: rows with holes"
        if role == 1:
            x.fill_(float("nan") if x.is_floating_point() else -1)
        self.library.emulator_add_view(
            name.encode(),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(rows),
            ctypes.c_int64(row_bytes),
            ctypes.c_int64(max(x.stride(0) * size, 1)),
            int(role),
        )


def source(file: str = "attention.cu") -> str:
    """Kernels as the emulator compiles them."""
    return build.source(file, primitives=False)


@lru_cache
def emulator(head_size: int, dropout: int) -> Emulator:
    return Emulator(source(), {"HEAD_SIZE": head_size, "DROPOUT": dropout})


def launch(step: attention.Launch) -> None:
    """A launcher for ``attention.forward`` and ``backward``: the unchanged source."""
    machine = emulator(step.defines["HEAD_SIZE"], step.defines["DROPOUT"])
    machine.run(step, seed=_ORDERS.getrandbits(32))


@lru_cache
def norm_emulator(text: str, defines: tuple[tuple[str, int], ...]) -> Emulator:
    return Emulator(text, dict(defines), "-Og")


def launch_norm(step: norm.Launch) -> None:
    """A launcher for ``norm.forward`` and ``backward``."""
    machine = norm_emulator(source("norm.cu"), tuple(step.defines.items()))
    machine.library.emulator_clear_views()
    for name, value in step.parameters.items():
        if isinstance(value, Tensor):  # of one dimension: one row, read two numbers at a time
            x = value[None] if value.dim() == 1 else value
            machine.view(name, x, int(name in step.writes))
    holder = ParamHolder(attention.pack(step.parameters))
    order = _ORDERS.getrandbits(32)
    count = len(step.parameters)
    machine.run_packed(step.kernel, (step.blocks, 1), step.threads, holder, count, order)
