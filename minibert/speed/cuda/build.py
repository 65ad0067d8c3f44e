"""From CUDA source to a binary for the GPU at hand: NVRTC, and a cache on disk.

NVRTC is NVIDIA's compiler as a library; torch's CUDA wheels bring it along, so no CUDA toolkit and
no host compiler is needed. The sources include nothing, which keeps them independent of any
installed header.

A binary is compiled for one architecture (``sm_75``) rather than as PTX: PTX from an NVRTC newer
than the installed driver is refused by it, and the driver would compile it once more.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from minibert.files import MinibertError, home, replacing

HERE = Path(__file__).parent
OPTIONS = "c++17"  # part of the cache's key, beside the source and the architecture


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what to do."""


def source(file: str, primitives: bool = True) -> str:
    """A kernel file with its includes put in place: one self-contained text.

    Args:
        file: a source in this directory.
        primitives: whether ``primitives.cuh`` is among them; the emulator brings its own.
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


def compile_source(text: str, arch: str, defines: dict[str, int], kind: str = "cubin"):
    """Compile with NVRTC; needs neither a GPU nor a driver.

    Args:
        text: CUDA C++ without includes.
        arch: ``sm_75`` for a binary, ``compute_75`` for PTX.
        defines: preprocessor macros.
        kind: "cubin" or "ptx".

    Returns:
        The code (bytes) and the assembler's log: registers, spills and shared memory a kernel.

    Raises:
        BuildError: NVRTC is missing or refuses the source.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise BuildError(
            f"the CUDA kernels are compiled with cuda-core, which cannot be imported ({error}): "
            "pip install 'minibert[cuda]'"
        ) from error
    log = _Log()
    options = ProgramOptions(
        arch=arch,
        std=OPTIONS,
        define_macro=[(name, str(value)) for name, value in defines.items()],
        ptxas_options=["-v"] if kind == "cubin" else None,
    )
    try:
        code = Program(text, "c++", options).compile(kind, logs=log).code
    except Exception as error:  # cuda-core raises its own and NVRTC's types, by version
        raise BuildError(
            f"NVRTC does not compile the kernels for {arch}: {error}\n{log.text}"
        ) from (error)
    return code, log.text


class _Log:
    """What ``Program.compile`` writes its messages to."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def cubin(file: str, arch: str, defines: dict[str, int], directory: Path | None = None) -> bytes:
    """The binary of a kernel file, from the cache if the same source was compiled before.

    Args:
        file: a source in this directory, for example "attention.cu".
        arch: for example ``sm_75``.
        defines: preprocessor macros.
        directory: where binaries are kept; ``kernels`` under ``home()`` by default.

    Raises:
        BuildError: it has to be compiled, and cannot be.
    """
    text = source(file)
    key = "\n".join([text, arch, OPTIONS, repr(sorted(defines.items()))])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = (directory or home() / "kernels") / f"{Path(file).stem}-{arch}-{digest}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass  # not there, or not readable: compile
    code, _ = compile_source(text, arch, defines)
    _write(path, code)
    return code


def _write(path: Path, code: bytes) -> None:
    """Keep a binary for the next process.

    A directory that cannot be written costs that process a compilation, and nothing else.
    """
    with suppress(MinibertError), replacing(path) as temporary:
        temporary.write_bytes(code)
