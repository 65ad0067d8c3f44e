"""Runs the kernels' compiled code on the CPU: an interpreter of PTX, the assembly of NVIDIA's GPUs.

The emulator compiles our source, with our own reading of what the hardware does. This is a second
witness: NVRTC has compiled the source, and where a tensor core expects which number is written as
in CuTe, NVIDIA's library. The instructions are those of the PTX ISA:
https://docs.nvidia.com/cuda/parallel-thread-execution/

How PTX runs here, and on a GPU:

* A kernel is a list of instructions on registers (``add.f32 %f3, %f1, %f2;``). All threads execute
  the same list, each with its own registers. Here a register is a NumPy array with an element per
  thread, so one NumPy operation executes an instruction for many blocks at once.
* Threads part at branches. They are kept together as well as possible: of all basic blocks (runs of
  instructions without a branch) that threads are waiting to execute, the first in the text is next,
  and the threads that are not there are masked out. So threads meet again where branches join.
* Registers have no type, only a width; each instruction says how it reads them.

Every access to memory is checked: bounds, alignment, a read of what nobody wrote, an output written
twice or never. So is that whole warps execute the operations of a warp, and that barriers release.
Not checked are races, which the emulator finds.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import emulator
import numpy as np
from numpy.typing import NDArray

from minibert.speed.cuda import build, launch
from minibert.speed.cuda.launch import Launch

Lanes = NDArray[Any]  # one number per thread of all blocks that run together
U32, PREDICATE = np.dtype("u4"), np.dtype("?")
WARP = 32
AT_ONCE = 8192  # threads that run together: few enough for the caches, many enough for NumPy
SHARED_BASE = 1 << 10  # the address of the first byte of shared memory; not 0
DONE, WAITING = 1 << 40, 1 << 39  # instead of the basic block that a thread executes next


class PtxError(AssertionError):
    """A kernel did something forbidden, or something that this interpreter does not know."""


# ---- tables of CuTe ----------------------------------------------------------------------------


def layout(shape: tuple, stride: tuple) -> NDArray[np.int64]:
    """A CuTe layout of (thread, value) as a table of offsets.

    A shape like ((4, 8), 2) counts threads as 4 * 8 with the first factor running fastest; each
    factor moves the offset by its stride.
    """
    axes = []
    for sizes, strides in zip(shape, stride):
        if isinstance(sizes, int):
            sizes, strides = (sizes,), (strides,)
        axis = np.zeros(1, np.int64)
        for size, step in zip(sizes, strides):
            axis = (np.arange(size)[:, None] * step + axis).ravel()
        axes.append(axis)
    return axes[0][:, None] + axes[1]


# CUTLASS, include/cute/atom/mma_traits_sm75.hpp, MMA_Traits<SM75_16x8x8_F32F16F16F32_TN>. Offsets
# into column-major matrices: A (16 x 8) m + 16 k, B (8 x 8) n + 8 k, C (16 x 8) m + 16 n.
MMA_A = layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))
MMA_B = layout(((4, 8), 2), ((16, 1), 8))
MMA_C = layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))
# include/cute/atom/copy_traits_sm75.hpp, DstLayout of SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T.
# Offsets in bits into the rows that the 32 threads point to, 128 bits each; here in halves.
LDMATRIX = layout((32, (32, 4)), (32, (1, 1024)))[:, ::16] // 16
LDMATRIX_TRANS = layout(((4, 8), (16, 2, 4)), ((256, 16), (1, 128, 1024)))[:, ::16] // 16


# ---- arithmetic --------------------------------------------------------------------------------


def fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a * b + c in float64, rounded to odd: rounding that to float32 is rounding once.

    The product is exact. The sum's error tells whether a sum that ends in an even bit was rounded;
    if so, its odd neighbour on the exact sum's side takes its place (Boldo and Melquiond 2008).
    """
    product, c = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = np.asarray(product + c)
    error = (product - (total - (total - product))) + (c - (total - product))
    nudged = np.nextafter(total, np.copysign(np.inf, error))
    return np.where((np.abs(error) > 0) & (total.view(np.uint64) % 2 == 0), nudged, total)


def exp2(a: Lanes) -> Lanes:
    y = np.exp2(a.astype(np.float64))
    return np.where(y < 2.0**-126, 0, y)  # .ftz: numbers below the normal range are zero


def log2(a: Lanes) -> Lanes:
    return np.log2(np.where(np.abs(a) < 2.0**-126, 0, a).astype(np.float64))


# By opcode without types. The operands have the opcode's last type, the result gets its first.
# Opcodes that are not here or among the methods of `Blocks` do not occur in the kernels.
ARITHMETIC: dict[str, Callable[..., Lanes]] = {
    **dict.fromkeys(("mov", "cvt", "cvt.rn", "cvta.to.global"), np.asarray),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.lo": np.multiply,
    "mul.wide": lambda a, b: np.multiply(a, b, dtype=f"{a.dtype.kind}8"),
    "mad.lo": lambda a, b, c: a * b + c,
    "fma.rn": fma,
    "div": lambda a, b: np.trunc(a / b),  # exact for 32 bits
    "div.rn": np.divide,
    "rcp.rn": np.reciprocal,
    "sqrt.rn": np.sqrt,
    "ex2.approx.ftz": exp2,
    "lg2.approx.ftz": log2,
    "neg": np.negative,  # only from NVRTC 12
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "setp.eq": np.equal,
    "setp.ne": np.not_equal,
    "setp.lt": np.less,
    "setp.le": np.less_equal,
    "setp.gt": np.greater,
    "setp.ge": np.greater_equal,
    "selp": lambda a, b, choose_a: np.where(choose_a, a, b),
}


# ---- text --------------------------------------------------------------------------------------


class Address(NamedTuple):
    base: Any  # an operand, or a parameter's name
    offset: int


class Instruction(NamedTuple):
    """``@guard name.types operands``; the first operands are written, the others read."""

    text: str
    guard: str | None  # a predicate's register: threads that have False in it do nothing
    name: str  # the opcode without its types
    operands: list[Any]  # a register's name, a constant, a label, an `Address`, or a list
    types: list[np.dtype]  # of the operands


class Kernel(NamedTuple):
    name: str
    parameters: dict[str, str]  # name to PTX type
    threads: int  # of a block
    shared_bytes: int
    blocks: list[list[Instruction]]  # basic blocks
    labels: dict[str, int]  # of basic blocks


NUMPY = {"s": "i", "u": "u", "b": "u", "f": "f"}


def numpy_type(ptx: str) -> np.dtype:
    return PREDICATE if ptx == "pred" else np.dtype(f"{NUMPY[ptx[0]]}{int(ptx[1:]) // 8}")


@cache
def compiled(text: str, defines: tuple[tuple[str, int], ...]) -> str:
    """A source as PTX, compiled with the options of ``build.compile_source``.

    Not by cuda-core, which asks a driver whether it could load the result.
    """
    from cuda.bindings import nvrtc

    def call(status: Any, *results: Any) -> Any:
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
        return results[0] if results else None

    options = [b"-arch=compute_75", f"-std={build.STANDARD}".encode()]
    options += [f"-D{name}={value}".encode() for name, value in defines]
    program = call(*nvrtc.nvrtcCreateProgram(text.encode(), b"", 0, [], []))
    call(*nvrtc.nvrtcCompileProgram(program, len(options), options))
    ptx = bytearray(call(*nvrtc.nvrtcGetPTXSize(program)))
    call(*nvrtc.nvrtcGetPTX(program, ptx))
    call(*nvrtc.nvrtcDestroyProgram(program))
    return ptx.decode().rstrip("\0")


@cache
def parse(text: str, name: str) -> Kernel:
    """One kernel of a PTX text.

    Raises:
        PtxError: an instruction that is not known.
    """
    entry = rf"\.entry {name}\((.*?)\)\n(.*?)\n\{{\n(.*?)\n\}}"
    parameters, directives, body = re.findall(entry, text, re.S)[0]
    body = re.sub(r"//.*", "", body)
    symbols, shared_bytes = {}, 0
    for align, symbol, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", body):
        shared_bytes += -shared_bytes % int(align)
        symbols[symbol] = SHARED_BASE + shared_bytes
        shared_bytes += int(size)
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement in re.findall(r"\$\w+(?=:)|[^;:\s][^;:]*(?=;)", body):
        statement = " ".join(statement.lstrip("{} \n\t").split())  # braces of inline assembly
        if statement.startswith("$"):
            if blocks[-1]:
                blocks.append([])
            labels[statement] = len(blocks) - 1
        elif not statement.startswith("."):
            instruction = _instruction(statement, symbols)
            blocks[-1].append(instruction)
            if instruction.name in ENDING:
                blocks.append([])
    types = {name: kind for kind, name in re.findall(r"\.param \.(\w+) (\w+)", parameters)}
    threads = int(re.findall(r"\.maxntid (\d+), 1, 1", directives)[0])
    return Kernel(name, types, threads, shared_bytes, blocks, labels)


def _instruction(text: str, symbols: dict[str, int]) -> Instruction:
    guard, opcode, rest = re.findall(r"^(?:@(\S+) )?(\S+) ?(.*)", text)[0]
    name, suffixes = re.findall(r"^(.*?)((?:\.(?:pred|[subf]\d+))*)$", opcode)[0]
    if name not in ARITHMETIC and name not in OTHERS:
        raise PtxError(f"unknown instruction: {text}")
    parts = re.findall(r"\{.*?\}|\[.*?\]|[^\s,|]+", rest)
    suffixes = [numpy_type(suffix) for suffix in suffixes.split(".")[1:]] or [U32]
    types = [suffixes[0], *[suffixes[-1]] * (len(parts) - 1)]
    if name.startswith("setp"):
        types[0] = PREDICATE
    elif name == "mul.wide":
        types[0] = np.dtype(f"{suffixes[-1].kind}8")
    elif name in ("shl", "shr"):
        types[2] = U32
    elif name == "selp":
        types[3] = PREDICATE
    operands = [_operand(part, kind, symbols) for part, kind in zip(parts, types)]
    return Instruction(text, guard or None, name, operands, types)


def _operand(text: str, kind: np.dtype, symbols: dict[str, int]) -> Any:
    if text[0] == "{":
        return [_operand(part, kind, symbols) for part in re.findall(r"[%\w]+", text)]
    if text[0] == "[":
        base, offset = re.findall(r"^\[([%\w]+)\+?(-?\d+)?\]$", text)[0]
        return Address(_operand(base, U32, symbols), int(offset or 0))
    if re.match(r"0f[0-9A-F]{8}$", text):
        return np.uint32(int(text[2:], 16)).view(kind)
    if text in symbols or re.match(r"-?\d+$", text):
        bits = 8 * kind.itemsize
        return np.dtype(f"u{kind.itemsize}").type(int(symbols.get(text, text)) % 2**bits).view(kind)
    return text


# ---- memory ------------------------------------------------------------------------------------

READ, WRITE = 1, 2
FORBIDDEN = {READ: "of what nobody wrote", WRITE: "to what is no output, or a second time"}
ALLOWED = {emulator.INPUT: READ, emulator.OUTPUT: WRITE, emulator.UPDATED: READ | WRITE}


class Memory:
    """Bytes, and what may be done with each of them.

    ``locate`` says whether ``size`` bytes from each address on are inside, and where they are.
    """

    stored: int  # what may be done with a byte after it was written
    outside: str  # for messages

    def __init__(self, size: int) -> None:
        self.bytes, self.allowed = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def allows(self, what: int, index: Lanes, size: int) -> Lanes:
        every_byte = int(f"{what:02x}" * size, 16)
        return (self.allowed.view(f"u{size}")[index] & every_byte == every_byte).all(1)

    def load(self, index: Lanes, size: int) -> Lanes:
        return self.bytes.view(f"u{size}")[index]

    def store(self, index: Lanes, size: int, values: Lanes) -> None:
        self.bytes.view(f"u{size}")[index] = values.view(f"u{size}")
        self.allowed.view(f"u{size}")[index] = int(f"{self.stored:02x}" * size, 16)


class SharedMemory(Memory):
    """The shared memory of some blocks, one after the other."""

    stored = READ | WRITE
    outside = "outside the block's shared memory"

    def __init__(self, blocks: int, size: int) -> None:
        super().__init__(blocks * size)
        self.allowed[:] = WRITE
        self.size = size

    def locate(self, address: Lanes, size: int, block: Lanes) -> tuple[Lanes, Lanes]:
        offset = address - SHARED_BASE
        return (offset >= 0) & (offset + size <= self.size), block * self.size + offset


class GlobalMemory(Memory):
    """A copy of some tensors, at the addresses that they have on the host."""

    stored = 0
    outside = "outside every tensor"

    def __init__(self, views: list[emulator.View]) -> None:
        starts: list[int] = []
        ends: list[int] = []
        for view in sorted(views, key=lambda view: view.address):  # slices of a tensor overlap
            if not starts or view.address > ends[-1]:
                starts.append(view.address)
                ends.append(view.address)
            last_row = view.address + (view.rows - 1) * view.stride
            ends[-1] = max(ends[-1], last_row + view.row_bytes)
        self.starts, self.ends = np.array(starts), np.array(ends)
        # The copies lie one after the other, each as well aligned as the original.
        places = np.cumsum([0, *((self.ends - self.starts) // 16 + 2) * 16])
        super().__init__(int(places[-1]))
        self.moved = places[:-1] + self.starts % 16 - self.starts
        self.views = views
        for original, copy in self._regions():
            copy[:] = original
        for view in views:
            self._allowed(view)[:] |= ALLOWED[view.role]

    def _regions(self) -> list[tuple[NDArray, NDArray]]:
        """The bytes of the tensors: originals and copies."""
        regions = []
        for start, end, moved in zip(*(x.tolist() for x in (self.starts, self.ends, self.moved))):
            original = np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
            regions.append((original, self.bytes[start + moved : end + moved]))
        return regions

    def _allowed(self, view: emulator.View) -> NDArray:
        """What may be done with the bytes of a tensor, (rows, bytes of a row)."""
        region = np.searchsorted(self.starts, view.address, "right") - 1
        rest = self.allowed[view.address + self.moved[region] :]
        shape, strides = (view.rows, view.row_bytes), (view.stride, 1)
        return np.lib.stride_tricks.as_strided(rest, shape, strides)

    def locate(self, address: Lanes, size: int, block: Lanes) -> tuple[Lanes, Lanes]:
        region = np.searchsorted(self.starts, address, "right") - 1
        inside = (region >= 0) & (address + size <= self.ends[region])
        return inside, address + self.moved[region]

    def finish(self) -> None:
        """Copy the results back.

        Raises:
            PtxError: an output was not written completely.
        """
        for view in self.views:
            missing = np.count_nonzero(self._allowed(view) & WRITE)
            if view.role == emulator.OUTPUT and missing:
                raise PtxError(f"{missing} bytes of {view.name} never written")
        for original, copy in self._regions():
            original[:] = copy


# ---- execution ---------------------------------------------------------------------------------


class Blocks:
    """Some blocks of a launch, run together.

    Args:
        kernel: what they execute.
        parameters: by name, NumPy scalars.
        memory: global memory.
        x, y: which blocks of the grid, one number each per block.
    """

    def __init__(
        self, kernel: Kernel, parameters: dict, memory: GlobalMemory, x: Lanes, y: Lanes
    ) -> None:
        self.kernel, self.parameters, self.x, self.y = kernel, parameters, x, y
        self.memory = {"global": memory, "shared": SharedMemory(len(x), kernel.shared_bytes)}
        self.block, thread = np.divmod(np.arange(len(x) * kernel.threads), kernel.threads)
        self.registers = {
            "%tid.x": thread.astype(U32),
            "%ctaid.x": x.astype(U32)[self.block],
            "%ctaid.y": y.astype(U32)[self.block],
        }
        # The basic block that a thread executes next, or DONE or WAITING.
        self.next = np.zeros(len(self.block), np.int64)
        self.after_barrier = self.next.copy()

    def run(self) -> None:
        while (first := self.next.min()) != DONE:
            if first == WAITING:
                raise PtxError(f"{self.kernel.name}: deadlock: some threads skip a barrier")
            here = self.next == first
            self.next[here] = first + 1
            for instruction in self.kernel.blocks[first]:
                try:
                    self.execute(instruction, here)
                except PtxError as error:
                    message = f"{self.kernel.name}: {instruction.text}: {error}"
                    raise PtxError(message) from None

    def execute(self, instruction: Instruction, active: Lanes) -> None:
        _, guard, name, operands, types = instruction
        if guard:
            active = active & self.read(guard, PREDICATE)
        if name in OTHERS:
            OTHERS[name](self, instruction, active)
        else:
            values = [self.read(operand, kind) for operand, kind in zip(operands[1:], types[1:])]
            self.write(operands[0], ARITHMETIC[name](*values).astype(types[0], copy=False), active)

    # -- registers --

    def read(self, operand: Any, kind: np.dtype | None) -> Lanes:
        """An operand of all threads, active or not; None: as unsigned numbers of its width."""
        if isinstance(operand, list):  # several registers as one, the first in the low bits
            part = np.dtype(f"u{kind.itemsize // len(operand)}")
            return np.stack([self.read(x, part) for x in operand], 1).view(kind)[:, 0]
        if not isinstance(operand, str):
            return operand
        if operand not in self.registers:
            raise PtxError(f"{operand} was never written")
        bits = self.registers[operand]
        return bits if kind is None else bits.view(kind)

    def lanes(self, operand: Any, kind: np.dtype | None) -> Lanes:
        """The same, a constant too as one number per thread."""
        values = self.read(operand, kind)
        return values if values.ndim else np.full(len(self.next), values)

    def write(self, operand: Any, values: Lanes, active: Lanes) -> None:
        """Give active threads new values."""
        if values.ndim == 0:
            values = np.full(len(active), values)
        if isinstance(operand, list):
            kind = f"u{values.itemsize // len(operand)}"
            parts = np.ascontiguousarray(values).view(kind).reshape(-1, len(operand))
            for register, part in zip(operand, parts.T):
                self.write(register, part, active)
            return
        bits = values if values.dtype == PREDICATE else values.view(f"u{values.itemsize}")
        if not active.all():
            # A register that a thread reads before it has written to it holds a NaN.
            bits = np.where(active, bits, self.registers.get(operand, ~bits.dtype.type(0)))
        self.registers[operand] = bits

    def write_some(self, operands: list, values: Lanes, active: Lanes) -> None:
        """The same from (active threads, operands)."""
        everyone = np.empty((len(operands), len(active)), values.dtype)
        everyone[:, active] = values.T
        for operand, row in zip(operands, everyone):
            self.write(operand, row, active)

    # -- memory --

    def load_parameter(self, instruction: Instruction, active: Lanes) -> None:
        register, address = instruction.operands
        self.write(register, self.parameters[address.base].view(instruction.types[0]), active)

    def load(self, instruction: Instruction, active: Lanes) -> None:
        destination, size = instruction.operands[0], instruction.types[0].itemsize
        registers = destination if isinstance(destination, list) else [destination]
        memory, index = self.access(READ, instruction, size, len(registers), active)
        self.write_some(registers, memory.load(index, size), active)

    def store(self, instruction: Instruction, active: Lanes) -> None:
        source, kind = instruction.operands[1], instruction.types[0]
        registers = source if isinstance(source, list) else [source]
        memory, index = self.access(WRITE, instruction, kind.itemsize, len(registers), active)
        if len(np.unique(index)) < index.size:
            raise PtxError("two threads write to one address")
        values = [self.lanes(x, kind)[active] for x in registers]
        memory.store(index, kind.itemsize, np.stack(values, 1))

    def access(
        self, what: int, instruction: Instruction, size: int, count: int, active: Lanes
    ) -> tuple[Memory, Lanes]:
        """Where active threads read or write ``count`` elements of ``size`` bytes.

        Returns:
            The memory, and indices (active threads, count) of its elements.

        Raises:
            PtxError: it is not allowed.
        """
        address = next(x for x in instruction.operands if isinstance(x, Address))
        memory = self.memory["shared" if ".shared" in instruction.name else "global"]
        at = self.lanes(address.base, None)[active].astype(np.int64) + address.offset
        verb = f"{'read' if what == READ else 'write'} of {size * count} bytes"
        inside, place = memory.locate(at, size * count, self.block[active])
        self.require(inside, active, f"{verb} {memory.outside}")
        self.require(at % (size * count) == 0, active, f"{verb} at a misaligned address")
        index = (place // size)[:, None] + np.arange(count)
        self.require(memory.allows(what, index, size), active, f"{verb} {FORBIDDEN[what]}")
        return memory, index

    def require(self, condition: Lanes, active: Lanes, message: str) -> None:
        """``condition``: one for each active thread."""
        if not condition.all():
            first = np.flatnonzero(active)[np.argmin(condition)]
            block, thread = self.block[first], first % self.kernel.threads
            raise PtxError(
                f"thread {thread} of block ({self.x[block]}, {self.y[block]}): {message}"
            )

    # -- control --

    def branch(self, instruction: Instruction, active: Lanes) -> None:
        self.next[active] = self.kernel.labels[instruction.operands[0]]

    def leave(self, instruction: Instruction, active: Lanes) -> None:
        self.next[active] = DONE

    def block_barrier(self, instruction: Instruction, active: Lanes) -> None:
        self.after_barrier[active] = self.next[active]
        self.next[active] = WAITING
        complete = (self.next == WAITING).reshape(len(self.x), -1).all(1)
        self.next = np.where(complete[self.block], self.after_barrier, self.next)

    # -- operations of a warp --

    def warps(self, active: Lanes) -> Lanes:
        """Which warps are active.

        Raises:
            PtxError: only a part of one is.
        """
        by_warp = active.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise PtxError("executed by a part of a warp")
        return by_warp[:, 0]

    def warp_barrier(self, instruction: Instruction, active: Lanes) -> None:
        self.warps(active)

    def shuffle(self, instruction: Instruction, active: Lanes) -> None:
        """Every thread gets the value of the thread whose number differs in the bits ``flip``."""
        self.warps(active)
        result, valid, value, flip, clamp, members = instruction.operands
        whole = (self.lanes(clamp, U32) == 31) & (self.lanes(members, U32) == 2**32 - 1)
        self.require(whole[active], active, "an exchange among a part of a warp")
        source = np.arange(len(active)) ^ self.read(flip, U32) % WARP
        self.write(result, self.lanes(value, U32)[source], active)
        self.write(valid, np.ones_like(active), active)

    def load_matrices(self, instruction: Instruction, active: Lanes) -> None:
        self.warps(active)
        memory, index = self.access(READ, instruction, 4, 4, active)  # a row of 16 bytes each
        halves = memory.load(index, 4).view(np.uint16).reshape(-1, WARP * 8)
        table = LDMATRIX_TRANS if ".trans" in instruction.name else LDMATRIX
        values = halves[:, table].reshape(-1, 8).view(U32)
        self.write_some(instruction.operands[0], values, active)

    def multiply(self, instruction: Instruction, active: Lanes) -> None:
        """D = A B + C in float64, then rounded; the bounds allow for what a tensor core does."""
        warps = self.warps(active)
        d, a, b, c = instruction.operands

        def matrices(registers: list, table: NDArray, kind: str) -> NDArray:
            """(warps, columns, rows), from the values that the threads hold."""
            held = np.stack([self.lanes(x, U32).reshape(-1, WARP)[warps] for x in registers], 2)
            found = np.empty((len(held), table.size))
            found[:, table] = held.view(kind)
            return found.reshape(len(held), 8, -1)

        a_km, b_kn = matrices(a, MMA_A, "f2"), matrices(b, MMA_B, "f2")
        c_nm = matrices(c, MMA_C, "f4")
        d_nm = (b_kn.swapaxes(1, 2) @ a_km + c_nm).astype(np.float32)
        self.write_some(d, d_nm.reshape(len(d_nm), -1)[:, MMA_C].reshape(-1, 4), active)


ENDING = ("bra", "bra.uni", "ret", "bar.sync")  # after these a new basic block begins
OTHERS: dict[str, Callable[[Blocks, Instruction, Lanes], None]] = {
    "ld.param": Blocks.load_parameter,
    **dict.fromkeys(("ld.global", "ld.global.v2", "ld.global.nc.v4"), Blocks.load),
    **dict.fromkeys(("ld.shared", "ld.shared.v2", "ld.shared.v4"), Blocks.load),
    **dict.fromkeys(("st.global", "st.global.v2", "st.global.v4"), Blocks.store),
    **dict.fromkeys(("st.shared", "st.shared.v2", "st.shared.v4"), Blocks.store),
    "bra": Blocks.branch,
    "bra.uni": Blocks.branch,
    "ret": Blocks.leave,
    "bar.sync": Blocks.block_barrier,
    "bar.warp.sync": Blocks.warp_barrier,
    "shfl.sync.bfly": Blocks.shuffle,
    "ldmatrix.sync.aligned.m8n8.x4.shared": Blocks.load_matrices,
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared": Blocks.load_matrices,
    "mma.sync.aligned.m16n8k8.row.col": Blocks.multiply,
}


# ---- launches ----------------------------------------------------------------------------------


def enqueue(work: Launch) -> None:
    """Run a launch on CPU tensors, as ``launch.enqueue`` does on a GPU.

    Raises:
        PtxError: a forbidden access, a deadlock, an incomplete output, an unknown instruction.
    """
    ptx = compiled(build.source(work.file), tuple(sorted(work.defines.items())))
    kernel = parse(ptx, work.kernel)
    if work.threads != kernel.threads:
        raise PtxError(f"{work.kernel} is compiled for {kernel.threads} threads")
    packed = launch.pack(work)
    parameters = {
        name: _parameter(kind, value)
        for (name, kind), value in zip(kernel.parameters.items(), packed, strict=True)
    }
    memory = GlobalMemory(emulator.views(work))
    numbers, at_once = np.arange(work.grid[0] * work.grid[1]), max(AT_ONCE // work.threads, 1)
    with np.errstate(all="ignore"):  # inactive threads compute too, on anything
        for first in range(0, len(numbers), at_once):
            y, x = np.divmod(numbers[first : first + at_once], work.grid[0])
            Blocks(kernel, parameters, memory, x, y).run()
    memory.finish()


def _parameter(kind: str, value: Any) -> np.generic:
    """A kernel's argument as ``launch.pack`` gives it."""
    expected = {"u64": int, "u32": np.int32, "f32": np.float32}[kind]
    if type(value) is not expected:
        raise PtxError(f"a parameter of type {kind} gets {value!r}")
    return np.uint64(value) if kind == "u64" else value.view(numpy_type(kind))
