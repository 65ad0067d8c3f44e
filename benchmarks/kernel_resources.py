"""What the compiler makes of the kernels: registers, spills, shared memory, tensor-core use.

    python -m benchmarks.kernel_resources            print the tables
    python -m benchmarks.kernel_resources --write    put them into docs/fused-attention.md

Needs NVRTC (``pip install '.[cuda]'``) and no GPU.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from minibert.speed.cuda import build

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
ATTENTION = tuple(
    {"HEAD_SIZE": size, "DROPOUT": dropout} for size in (64, 32) for dropout in (0, 1)
)
NORM = tuple({"HIDDEN": D, "DROPOUT": 1, "WIDE": wide} for D in (768, 384) for wide in (1, 0))
ADAMW = tuple({"SEMANTICS": semantics} for semantics in range(3))
DOCUMENT = Path(__file__).parents[1] / "docs" / "fused-attention.md"
BEGIN, END = "<!-- kernel_resources.py -->", "<!-- end -->"

# The low 12 bits of a 128-bit instruction are its opcode, from Volta on.
OPCODES = {"HMMA": 0x23C, "LDSM": 0x83B}  # tensor-core product, ldmatrix


class Resources(NamedTuple):
    """One kernel in one binary."""

    registers: int  # per thread
    spilled: int  # bytes stored to and loaded from local memory, per thread
    shared: int  # bytes per block
    hmma: int  # tensor-core instructions in the code
    ldmatrix: int


def measure(file: str, arch: str, defines: dict[str, int]) -> dict[str, Resources]:
    """Compile a source; what the assembler and the binary say of its kernels, by name."""
    return _measure(file, arch, tuple(defines.items()))


@cache
def _measure(file: str, arch: str, defines: tuple[tuple[str, int], ...]) -> dict[str, Resources]:
    code, log = build.compile_source(build.source(file), arch, dict(defines))
    resources = {}
    for entry in log.split("Compiling entry function '")[1:]:
        kernel = entry.split("'")[0]
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", entry))
        found = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)  # absent for none
        if not found:
            raise RuntimeError(f"{kernel}: the assembler's log has another form: {entry!r}")
        counts = Counter(_opcodes(code, f".text.{kernel}"))
        resources[kernel] = Resources(
            registers=int(found[1]),
            spilled=spilled,
            shared=int(shared[1]) if shared else 0,
            hmma=counts[OPCODES["HMMA"]],
            ldmatrix=counts[OPCODES["LDSM"]],
        )
    return resources


def _opcodes(elf: bytes, section: str) -> Iterator[int]:
    """Opcodes of the instructions in one section of an ELF64 file."""
    table, size, count, names = (
        *struct.unpack_from("<Q", elf, 40),
        *struct.unpack_from("<HHH", elf, 58),
    )
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if elf[start : elf.index(b"\0", start)].decode() == section:
            for at in range(header[4], header[4] + header[5], 16):
                yield struct.unpack_from("<Q", elf, at)[0] & 0xFFF


def blocks_on_t4(warps: int, used: Resources) -> int:
    """How many blocks a multiprocessor of the T4 holds at once.

    64 K registers, allocated per warp in units of 256; 64 KB shared memory; 32 warps; 16 blocks
    (CUDA C++ Programming Guide, technical specifications for compute capability 7.5).
    """
    registers_a_warp = -(-used.registers * 32 // 256) * 256
    # A warp stays on one of four schedulers, each with a quarter of the registers.
    warps_at_once = 4 * (65536 // 4 // registers_a_warp)
    return min(warps_at_once // warps, 65536 // used.shared, 32 // warps, 16)


def tables() -> str:
    """Everything as Markdown."""
    lines = [f"Compiled by NVRTC {version('nvidia-cuda-nvrtc')}; no kernel spills a register.", ""]
    lines += [
        "| head size | dropout | kernel | registers, sm_75 / 80 / 90 | shared memory | "
        "HMMA | ldmatrix | blocks (warps) per T4 multiprocessor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for defines in ATTENTION:
        for kernel, registers, used in _rows("attention.cu", defines):
            warps = 4 if kernel.endswith("_long") else 1
            blocks = blocks_on_t4(warps, used)
            lines.append(
                f"| {defines['HEAD_SIZE']} | {'yes' if defines['DROPOUT'] else 'no'} | `{kernel}` "
                f"| {registers} | {used.shared} | {used.hmma} | {used.ldmatrix} "
                f"| {blocks} ({blocks * warps}) |"
            )
    lines += ["", "| width | residual | kernel | registers, sm_75 / 80 / 90 | shared memory |"]
    lines += ["|---|---|---|---|---|"]
    for defines in NORM:
        for kernel, registers, used in _rows("norm.cu", defines):
            lines.append(
                f"| {defines['HIDDEN']} | {'float32' if defines['WIDE'] else 'float16'} "
                f"| `{kernel}` | {registers} | {used.shared} |"
            )
    return "\n".join(lines)


def _rows(file: str, defines: dict[str, int]) -> Iterator[tuple[str, str, Resources]]:
    """Each kernel's name, its registers on all architectures, its resources on the first."""
    measured = [measure(file, arch, defines) for arch in ARCHITECTURES]
    for kernel, used in reversed(measured[0].items()):
        if any(found[kernel].spilled for found in measured):
            raise RuntimeError(f"{kernel} spills registers with {defines}")
        yield kernel, " / ".join(str(found[kernel].registers) for found in measured), used


def documented() -> str:
    """The tables in the document."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"update {DOCUMENT.name}")
    text = tables()
    if not parser.parse_args().write:
        print(text)
        return
    head, _, rest = DOCUMENT.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
