"""The kernels' PTX, as NVRTC compiles it for a T4, run by ``ptx.py`` against float64.

The checks and their bounds are those of the emulator's tests. That they can fail is shown by faults
in the sources, in the compiled text, and in the interpreter's tables.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

import emulator
import numpy as np
import ptx
import pytest
import test_kernels_attention
import test_kernels_emulator
from test_kernels_adamw import check_trajectory
from test_kernels_attention import EDGES, KINDS, run
from test_kernels_norm import check as check_norm

from minibert.speed.cuda import adamw, attention, build, launch, norm

BEYOND = test_kernels_emulator.BEYOND


@pytest.fixture(autouse=True)
def by_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on CPU tensors go to the interpreter."""
    monkeypatch.setattr(launch, "enqueue", ptx.enqueue)


def check_attention(*arguments, **options) -> list[str]:
    """Runs forward and backward; returns the names of the kernels."""
    case = run(*arguments, **options)
    test_kernels_attention.check(case)
    return case.kernels


def sample() -> None:
    """A tiny batch, forward and backward: half a second once it is compiled."""
    check_attention([12, 3], head_size=32, dropout_p=0.1)


# ---- the kernels -------------------------------------------------------------------------------


def test_a_sample_of_the_kernels() -> None:
    with emulator.recorded() as launches:
        sample()
        check_norm(6, 64, 0.1, True)
        check_trajectory("torch", 1.0, 1024.0)
    names = {f"{kind}_short" for kind in KINDS}
    names |= {"add_norm", "add_norm_backward", "add_norm_sums", "squares", "adamw"}
    assert {one.kernel for one in launches} == names


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [64, 32])
@pytest.mark.parametrize("kernels", ["long", "short"])
def test_every_attention_kernel(
    kernels: str, head_size: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", {"long": 0, "short": 512}[kernels])
    options = {"head_size": head_size, "dropout_p": dropout_p}
    assert check_attention(EDGES, **options) == [f"{kind}_{kernels}" for kind in KINDS]
    check_attention([0, 9, 0, 3], heads=3, max_length=20, size=8.0, **options)


@pytest.mark.slow
def test_attention_at_full_length() -> None:
    check_attention([512, 3], heads=1, dropout_p=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rows", "D"), [(1, 64), (37, 128), (31, 384), (17, 768)])
def test_add_norm(
    rows: int, D: int, wide: bool, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "BLOCKS", 3)  # so that a warp does several rows
    check_norm(rows, D, dropout_p, wide)


@pytest.mark.slow
@pytest.mark.parametrize("semantics", adamw.SEMANTICS)
@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1024.0), (math.inf, None)])
def test_adamw(semantics: str, max_norm: float, scale: float | None) -> None:
    check_trajectory(semantics, max_norm, scale)


# ---- planted faults ----------------------------------------------------------------------------

HALF = "setp.lt.u32 %p99, %tid.x, 16;"
A_QUAD = r"\{(%\w+), (%\w+), (%\w+), (%\w+)\}"
# name: a pattern of which the first match in forward_short is replaced, by what, and what is seen.
IN_PTX = {
    # Layouts
    "an operand not transposed": (r"(ldmatrix\S*)\.trans", r"\1", BEYOND),
    "an operand transposed": (r"(ldmatrix\S*x4)\.shared", r"\1.trans.shared", BEYOND),
    "two matrices exchanged": (rf"(ldmatrix\S*) {A_QUAD}", r"\1 {\2, \4, \3, \5}", BEYOND),
    "rows of A exchanged": (r"(mma.*?), \{(%r\d+), (%r\d+)\}", r"\1, {\3, \2}", BEYOND),
    "columns of D exchanged": (rf"(mma\S*) {A_QUAD}", r"\1 {\3, \2, \5, \4}", BEYOND),
    "rows of D exchanged": (rf"(mma\S*) {A_QUAD}", r"\1 {\4, \5, \2, \3}", BEYOND),
    # Memory
    "a read outside": (r"(ld\.global\.nc.*)\]", r"\1+1048576]", "read of 16 bytes outside every"),
    "a write outside": (r"(st\.global\.v4.*)\]", r"\1+-1048576]", "write of 16 bytes outside"),
    "a misaligned read": (r"(ld\.global\.nc.*)\]", r"\1+4]", "16 bytes at a misaligned address"),
    "a misaligned write": (r"(st\.shared\.v4.*)\]", r"\1+8]", "16 bytes at a misaligned address"),
    "a write to an input": (r"forward_short_param_3\]", "forward_short_param_0]", "no output"),
    "a write left out": (r"st\.global\.f32.*", "", "bytes of lse never written"),
    "a write done twice": (r"(st\.global\.f32.*)", r"\1 \1", "or a second time"),
    "shared memory too small": (r"6shared\[2048\]", "6shared[2032]", "outside the block's shared"),
    "a row not in shared memory": (r"st\.shared\.v4.*", "", "read of 16 bytes of what nobody"),
    # Control
    "threads that leave": (r"bar\.sync", f"{HALF} @%p99 ret; bar.sync", "skip a barrier"),
    "half a warp": (r"bar\.warp", f"{HALF} @%p99 bar.warp", "executed by a part of a warp"),
    "two threads, one address": (r"or\.pred(\s+%p\d+), %p\d+,", r"mov.pred\1,", "two threads"),
    "a register without a value": (r"mov\.u32\s+%r\d+, %tid\.x;", "", "was never written"),
    "an unknown instruction": (r"add\.s32", "add.sat.s32", "unknown instruction: add.sat.s32"),
}  # fmt: skip


@pytest.mark.parametrize("fault", IN_PTX)
def test_a_fault_in_the_compiled_text_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, seen = IN_PTX[fault]
    original = ptx.compiled

    def changed(*unit) -> str:
        before, rest = original(*unit).split(".entry forward_short")
        kernel, end, after = rest.partition("\n}\n")
        kernel, count = re.subn(old, new, kernel, count=1)
        assert count, "the fault no longer fits the compiled code"
        return f"{before}.entry forward_short{kernel}{end}{after}"

    monkeypatch.setattr(ptx, "compiled", changed)
    with pytest.raises(AssertionError, match=re.escape(seen)):
        sample()


@pytest.mark.parametrize("table", ["MMA_A", "MMA_B", "MMA_C", "LDMATRIX", "LDMATRIX_TRANS"])
def test_another_table_is_seen(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two values of each thread exchanged: the result depends on every table."""
    monkeypatch.setattr(ptx, table, getattr(ptx, table)[:, ::-1])
    with pytest.raises(AssertionError, match=BEYOND):
        sample()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "ldmatrix with the matrices in another order",
        "an operand not transposed",
        "rows g and g + 8 exchanged in the second product",
        "the maximum not shared by the four lanes of a row",
        "another mask in the gradient of k and v",
    ],
)
def test_a_fault_in_the_source_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, text = test_kernels_emulator.ATTENTION[fault], build.source("attention.cu")
    assert text.count(planted.old) == 1
    monkeypatch.setattr(build, "source", lambda _: text.replace(planted.old, planted.new))
    with pytest.raises(AssertionError, match=BEYOND):
        check_attention(list(planted.lengths), head_size=32, dropout_p=planted.dropout_p)


# ---- the interpreter ---------------------------------------------------------------------------


def test_tables_agree_with_the_manual() -> None:
    """PTX ISA, "Matrix Fragments for mma.m16n8k8" and "ldmatrix": g = lane / 4, t = lane % 4."""
    g, t = np.divmod(np.arange(32), 4)
    a = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
    assert (np.stack([m + 16 * k for m, k in a], 1) == ptx.MMA_A).all()
    assert (np.stack([g + 8 * k for k in (2 * t, 2 * t + 1)], 1) == ptx.MMA_B).all()
    assert (ptx.MMA_A == ptx.MMA_C).all()
    matrix, half = np.divmod(np.arange(8), 2)
    row, column = g[:, None], 2 * t[:, None] + half
    assert (64 * matrix + 8 * row + column == ptx.LDMATRIX).all()
    assert (64 * matrix + 8 * column + row == ptx.LDMATRIX_TRANS).all()


def test_fma_rounds_once() -> None:
    draw = np.random.default_rng(0)
    a, b, c = draw.standard_normal((3, 2000)).astype(np.float32)
    c[:500] *= -a[:500] * b[:500]  # cancellation
    # In float64 the last sum is a tie between two float32; exactly, it is a little below.
    ulp = np.float32(2**-23)
    a, b = np.append(a, ulp / 2 * (1 + ulp)), np.append(b, 1 - ulp)
    c = np.append(c, 1 + ulp)
    got = ptx.fma(a, b, c).astype(np.float32)
    for x, y, z, result in zip(a, b, c, got):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for other in (np.nextafter(result, np.float32(s)) for s in (-np.inf, np.inf)):
            assert abs(Fraction(float(result)) - exact) <= abs(Fraction(float(other)) - exact)
    assert got[-1] == 1 + ulp
