"""From CUDA source to a binary for the present GPU: NVRTC, and a cache on disk.

NVRTC is NVIDIA's compiler as a library. torch's CUDA wheels install it, so no CUDA toolkit and no
host compiler is needed. The sources include no header from outside this directory.

A binary is compiled for one architecture (``sm_75``), not as PTX: a driver refuses PTX from a newer
NVRTC, and would have to compile it again.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache
from io import StringIO
from pathlib import Path

from minibert.files import MinibertError, home, replacing

HERE = Path(__file__).parent
STANDARD = "c++17"
INSTALL = "pip install '.[cuda]' in the checkout of minibert"


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


def source(file: str, primitives: bool = True) -> str:
    """A source with its includes inlined: one self-contained text.

    Args:
        file: a source in this directory.
        primitives: whether to inline ``primitives.cuh``; the emulator substitutes its own.
    """
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate((HERE / file).read_text().splitlines(), start=1):
        if line.startswith('#include "'):
            included = line.split('"')[1]
            if primitives or included != "primitives.cuh":
                lines.append(source(included, primitives))
            lines.append(f'#line {number + 1} "{file}"')
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines) + "\n"


@cache
def compiler() -> tuple[int, int]:
    """NVRTC's version, for example (12, 8).

    Raises:
        BuildError: NVRTC or its Python package is missing.
    """
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildError(
            f"the CUDA kernels are compiled with NVRTC, which cannot be loaded ({error}): {INSTALL}"
        ) from error
    return major, minor


def compile_source(text: str, arch: str, defines: dict[str, int], kind: str = "cubin"):
    """Compile with NVRTC; needs neither a GPU nor a driver.

    Args:
        text: CUDA C++ without includes.
        arch: ``sm_75`` for a binary, ``compute_75`` for PTX.
        defines: preprocessor macros.
        kind: "cubin" or "ptx".

    Returns:
        The code (bytes) and the assembler's log: each kernel's registers, spills and shared memory.

    Raises:
        BuildError: NVRTC is missing or rejects the source.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise BuildError(
            f"the CUDA kernels are compiled with cuda-core, which cannot be imported ({error}): "
            + INSTALL
        ) from error
    log = StringIO()
    options = ProgramOptions(
        arch=arch,
        std=STANDARD,
        define_macro=[(name, str(value)) for name, value in defines.items()],
        ptxas_options=["-v"] if kind == "cubin" else None,
    )
    try:
        code = Program(text, "c++", options).compile(kind, logs=log).code
    except Exception as error:  # cuda-core's types or NVRTC's, depending on the version
        raise BuildError(
            f"NVRTC cannot compile the kernels for {arch}: {error}\n{log.getvalue()}"
        ) from error
    return code, log.getvalue()


def cubin(file: str, arch: str, defines: dict[str, int]) -> bytes:
    """The binary of a source, from ``kernels`` under ``home()`` if it was compiled before.

    Args:
        file: a source in this directory, for example "attention.cu".
        arch: for example ``sm_75``.
        defines: preprocessor macros.

    Raises:
        BuildError: it is not cached and cannot be compiled.
    """
    text = source(file)
    key = "\n".join([text, arch, STANDARD, repr(sorted(defines.items())), str(compiler())])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = home() / "kernels" / f"{Path(file).stem}-{arch}-{digest}.cubin"
    with suppress(OSError):  # missing or unreadable: compile
        return path.read_bytes()
    code, _ = compile_source(text, arch, defines)
    with suppress(MinibertError), replacing(path) as temporary:  # read-only: compile every time
        temporary.write_bytes(code)
    return code
