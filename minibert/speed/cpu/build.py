"""From ``kernels.cpp`` to a library in this process: the system's g++, and a cache on disk."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minibert.files import MinibertError, home, replacing
from minibert.machine import cpu_flags

SOURCE = Path(__file__).parent / "kernels.cpp"
COMPILER = "g++"
# As /proc/cpuinfo calls them; g++ leaves the underscore out.
NEEDED = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512_vnni", "avx512_bf16")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fopenmp", "-fPIC", "-Wno-psabi")

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_PRODUCT = (_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _INT, _SIZE, _POINTER)
SIGNATURES: dict[str, Sequence[Any]] = {
    "multiply_fp32": _PRODUCT,
    "multiply_fp16": _PRODUCT,
    "multiply_int8": (*_PRODUCT, _POINTER, _POINTER),
    "attend": (_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _FLOAT, _POINTER),
    "add_norm": (*[_POINTER] * 4, _FLOAT, _SIZE, _SIZE, _POINTER),
}
AVX512_SIGNATURES: dict[str, Sequence[Any]] = {"multiply_bf16": (*_PRODUCT, _POINTER)}


class BuildError(RuntimeError):
    """The kernels cannot run here; the message says why."""


@cache
def obstacle() -> str | None:
    """Why the kernels cannot run in this process, or None. The first time they are compiled."""
    try:
        kernels()
    except BuildError as error:
        return str(error)
    return None


@cache
def kernels() -> dict[str, Callable[..., int]]:
    """The functions by their names, from a library under ``home()`` if they were compiled before.

    Each returns whether memory was short.

    Raises:
        BuildError: they cannot be compiled or loaded.
    """
    if not cpu_flags().issuperset(NEEDED):  # known on Linux alone
        raise BuildError(f"they are for Linux on a CPU with {', '.join(NEEDED)}")
    openmp = openmp_of_torch()
    key = "\n".join([SOURCE.read_text(), *FLAGS, *instructions(), openmp, torch.__version__])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        path = home() / "kernels" / f"cpu-{digest}.so"
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # missing, damaged, or compiled on a system that is too new for this one
            code = compile_source(SOURCE, openmp)
            with replacing(path) as temporary:
                temporary.write_bytes(code)
            library = ctypes.CDLL(str(path))
    except (MinibertError, OSError) as error:
        raise BuildError(str(error)) from error
    signatures = SIGNATURES | (AVX512_SIGNATURES if instructions() != NEEDED else {})
    functions = {name: library[name] for name in signatures}
    for name, function in functions.items():
        function.argtypes = signatures[name]
    return dict(functions)


def instructions() -> tuple[str, ...]:
    """What the kernels are compiled for: what they need, and ``AVX512`` where this CPU has it."""
    return (*NEEDED, *AVX512) if cpu_flags().issuperset(AVX512) else NEEDED


def openmp_of_torch() -> str:
    """The path of the OpenMP library that torch calls; other packages bring others along.

    With a second one, two pools of threads would compete, and ``torch.set_num_threads`` would set
    one of them.

    Raises:
        BuildError: torch calls none.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        raise BuildError("torch has no OpenMP library that g++ could link with") from None
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
        if first <= address < last:
            return line.split(maxsplit=5)[-1]
    raise BuildError("torch's OpenMP library is not a file")


def compile_source(source: Path, openmp: str) -> bytes:
    """Compile a source to a shared library.

    Args:
        source: C++.
        openmp: the OpenMP library to link with.

    Raises:
        BuildError: g++ is missing or rejects the source.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled, library = f"{folder}/kernels.o", Path(folder, "kernels.so")
        machine = [f"-m{name.replace('_', '')}" for name in instructions()]
        # Two calls: g++ links with its own OpenMP library where -fopenmp is a flag of the second.
        for command in (
            [COMPILER, *FLAGS, *machine, "-c", str(source), "-o", compiled],
            [COMPILER, "-shared", compiled, openmp, "-o", str(library)],
        ):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise BuildError(f"no {COMPILER} on this machine: install it") from None
            except subprocess.CalledProcessError as error:
                said = (error.stderr.strip() or f"status {error.returncode}").splitlines()[0]
                raise BuildError(f"{COMPILER} cannot compile them: {said}") from None
        return library.read_bytes()
