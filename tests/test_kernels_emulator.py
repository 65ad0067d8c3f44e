"""The checks can fail: small wrong kernels, and faults planted in the real ones.

The emulator must report the small kernels. A planted fault changes a line of the sources; either
the emulator reports it, or a result leaves the bound that the unchanged source keeps. Each test
says which.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import emulator
import pytest
import test_kernels_attention
import test_kernels_norm
import torch
from emulator import EmulationError, Emulator
from test_kernels_adamw import check_trajectory

from minibert.speed.cuda.launch import Launch

# name: threads, body, the expected message. Each has an input and an output of 64 floats.
KERNELS = {
    "right": (64, "store_global(out + i, load_global(in + i));", None),
    "reads_after": (64, "store_global(out + i, load_global(in + i + 1));", "outside every tensor"),
    "reads_before": (64, "store_global(out + i, load_global(in + i - 1));", "outside every tensor"),
    "writes_after": (64, "store_global(out + i + 1, 0.f);", "write of 4 bytes outside"),
    "writes_twice": (64, "store_global(out + i / 2, 0.f);", "written a second time"),
    "writes_half": (64, "if (i % 2) store_global(out + i, 0.f);", "128 bytes of out never written"),
    "writes_input": (64, "store_global((float*)in + i, 0.f);", "write to in, an input"),
    "reads_output": (64, "store_global(out + i, load_global(out + i));", "read of out, an output"),
    "misaligned": (64, "load_global_16((const f16*)(in + 1));", "misaligned global address"),
    "shared_after": (64, "store_shared(s + 4 * i + 4, 0.f);", "of 256 bytes of shared memory"),
    "shared_before": (64, "store_shared(s + 4 * i - 4, 0.f);", "of 256 bytes of shared memory"),
    "shared_misaligned": (64, "store_shared(s + 4 * i + 2, 0.f);", "misaligned offset"),
    "shared_unwritten": (64, "load_shared<float>(s + 4 * i);", "that nobody wrote"),
    "race_read": (
        64,
        "store_shared(s + 4 * i, 0.f); load_shared<float>(s + 4 * (63 - i));",
        "race: |nobody wrote",
    ),
    "race_write": (64, "store_shared(s + 4 * (i / 2), 0.f);", "race: write"),
    "race_of_warps": (
        64,
        "store_shared(s + 4 * i, 0.f); warp_barrier(); load_shared<float>(s + 4 * (63 - i));",
        "race: |nobody wrote",
    ),
    "race_after_read": (
        64,
        "store_shared(s + 4 * i, 0.f); block_barrier(); load_shared<float>(s + 4 * (63 - i));"
        "store_shared(s + 4 * i, 0.f);",
        "race: write|race: read",
    ),
    "warp_barrier_is_enough": (
        32,
        "store_shared(s + 4 * i, 0.f); warp_barrier();"
        "store_global(out + i, load_shared<float>(s + 4 * (31 - i)));"
        "store_global(out + 32 + i, 0.f);",
        None,
    ),
    "diverging": (64, "if (i % 2) warp_barrier(); else quad_sum(0.f);", "lanes of a warp diverge"),
    "one_lane_leaves": (64, "if (i) warp_barrier();", "deadlock"),
    "one_warp_leaves": (64, "if (i < 32) block_barrier();", "deadlock"),
}


@pytest.fixture(scope="module")
def machine() -> Emulator:
    kernels = "\n".join(
        f"KERNEL({name}, {threads}, 1, (const float* in, float* out), "
        f"SHARED_MEMORY(s, 256); const int i = thread_index(); (void)s; (void)i; {body})"
        for name, (threads, body, _) in KERNELS.items()
    )
    return Emulator(kernels, {})


def small(name: str, threads: int, **more: int) -> Launch:
    # Far apart in one allocation, so that a step out of one tensor is not a step into the other.
    memory = torch.zeros(1024)
    tensors = {"in": memory[256:320], "out": memory[640:704]}
    return Launch("", name, {}, (1, 1), threads, tensors, more)


@pytest.mark.parametrize("name", KERNELS)
def test_reports_of_the_emulator(name: str, machine: Emulator) -> None:
    threads, _, message = KERNELS[name]
    for order in range(3):
        if message is None:
            machine.run(small(name, threads), ["out"], order)
        else:
            with pytest.raises(EmulationError, match=message):
                machine.run(small(name, threads), ["out"], order)


def test_halves_are_rounded_as_torch_rounds_them(machine: Emulator) -> None:
    """Every half, its neighbours in float32, the midpoints between halves, and random numbers."""
    positive = torch.arange(0x7C00).short().view(torch.float16).float()
    halves = torch.cat([positive, -positive])
    middles = (halves[1:] + halves[:-1]) / 2
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    values = torch.cat(
        [
            *(x.nextafter(torch.tensor(to)) for x in (halves, middles) for to in (-1e9, 1e9)),
            halves,
            middles,
            bits.int().view(torch.float32),
            torch.tensor([float("inf"), -float("inf"), 65519.996, 65520.0, 1e30, 2**-25, 2**-26]),
        ]
    )
    got = torch.empty(len(values), dtype=torch.float16)
    machine.library.emulator_halves(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(got.data_ptr()), len(values)
    )
    want = values.half()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0).view(torch.int16), want.nan_to_num(0).view(torch.int16))


def test_a_launch_unlike_the_declaration_is_refused(machine: Emulator) -> None:
    with pytest.raises(EmulationError, match="no such kernel"):
        machine.run(small("absent", 64), ["out"])
    with pytest.raises(EmulationError, match="another number of threads"):
        machine.run(small("right", 32), ["out"])
    with pytest.raises(EmulationError, match="another number of parameters"):
        machine.run(small("right", 64, more=1), ["out"])


class Fault(NamedTuple):
    """``old`` occurs in the source exactly once and becomes ``new``."""

    old: str
    new: str
    seen: str  # the expected message
    lengths: tuple[int, ...] = (70, 33, 5)
    dropout_p: float = 0.1


SHORT = (33, 16, 5)
BEYOND = "beyond their bound"

ATTENTION = {
    # Barriers
    "no barrier before a tile is read": Fault(
        "    block_barrier();  // the tile is complete\n", "", "nobody wrote|race"
    ),
    "no barrier before the tiles become staging": Fault(
        "  block_barrier();  // all tiles are read; their memory becomes staging again\n",
        "",
        "race",
    ),
    "a tile replaced while others read it": Fault(
        "if (BUFFERS == 1) block_barrier();  // all", "// all", "race", SHORT
    ),
    "two buffers that are one": Fault(
        "next_k.commit(shared + buffer * S::PAIR_BYTES);\n"
        "      next_v.commit(shared + buffer * S::PAIR_BYTES + S::TILE_BYTES);\n"
        "    }\n"
        "  }\n\n"
        "  l[0]",
        "next_k.commit(shared);\n"
        "      next_v.commit(shared + S::TILE_BYTES);\n"
        "    }\n"
        "  }\n\n"
        "  l[0]",
        "race",
    ),
    "no warp barrier before ldmatrix reads the staging": Fault(
        "  rows.commit(staging);\n  warp_barrier();\n",
        "  rows.commit(staging);\n",
        "nobody wrote|race",
    ),
    "a barrier that half of the warps skip": Fault(
        "    block_barrier();  // the tile is complete\n",
        "    if (warp < 2) block_barrier();  // the tile is complete\n",
        "deadlock|race",
    ),
    # Memory
    "no tail check when fetching": Fault(
        "      if (row < length) {\n        chunks",
        "      {\n        chunks",
        "outside every tensor|" + BEYOND,
    ),
    "no tail check when storing": Fault(
        "    if (row < length) {\n      store_global_16",
        "    {\n      store_global_16",
        "outside every tensor|second time",
    ),
    "rows of one warp never stored": Fault(
        "UNROLL for (int index = lane; index < 16 * CHUNKS; index += 32) {",
        "UNROLL for (int index = lane; index < 15 * CHUNKS; index += 32) {",
        "never written",
    ),
    "the last lane writes no log-sum-exp": Fault(
        "if (t == 0 && row + g + 8 * r < at.length) {",
        "if (t == 0 && row + g + 8 * r < at.length - 1) {",
        "lse never written",
    ),
    "the gradient's stride taken for the input's": Fault(
        "p.dq + at.offset(p.grad_stride), p.grad_stride,",
        "p.dq + at.offset(p.heads * K), p.heads * K,",
        "write to|outside every tensor|second time",
    ),
    "staging of a warp overlaps its neighbour's": Fault(
        "static constexpr int STAGING_BYTES = 16 * ROW_BYTES;",
        "static constexpr int STAGING_BYTES = 8 * ROW_BYTES;",
        "race|nobody wrote|bytes of shared memory",
    ),
    # Lanes and fragments
    "ldmatrix with the matrices in another order": Fault(
        "chunk_offset(matrix % 2 * 8 + row, i + matrix / 2)",
        "chunk_offset(matrix / 2 * 8 + row, i + matrix % 2)",
        BEYOND,
    ),
    "an operand not transposed": Fault(
        "load_matrices_transposed(b, tile", "load_matrices(b, tile", BEYOND
    ),
    "rows g and g + 8 exchanged in the second product": Fault(
        "multiply_accumulate(sum[i + e], a_low, a_high, b[e])",
        "multiply_accumulate(sum[i + e], a_high, a_low, b[e])",
        BEYOND,
    ),
    "the maximum not shared by the four lanes of a row": Fault(
        "    largest = quad_max(largest);\n",
        "    if (STEP == 0) largest = quad_max(largest);\n",
        BEYOND,
    ),
    # Arithmetic
    "keys past the end take part in the softmax": Fault(
        "    if (first_key + STEP > at.length) {", "    if (false) {", BEYOND
    ),
    "sums not rescaled to the new maximum": Fault(
        "        sum[i][2 * r] *= shrink;\n", "", BEYOND, (40,), 0.0
    ),
    "normaliser not rescaled to the new maximum": Fault(
        "      l[r] *= shrink;\n", "", BEYOND, (40,), 0.0
    ),
    "the scale forgotten in the gradient of q": Fault(
        "store_rows(sum, p.scale, p.scale, staging", "store_rows(sum, 1.f, 1.f, staging", BEYOND
    ),
    "a log-sum-exp in the wrong base": Fault(
        "load_global(lse + query) * LOG2_E", "load_global(lse + query)", BEYOND
    ),
    "the log-sum-exp of the tile before": Fault(
        "statistics + 8 * (buffer * STEP + 16 * i + 8 * j + 2 * t + c)",
        "statistics + 8 * ((first_query ? 1 - buffer : 0) * STEP + 16 * i + 8 * j + 2 * t + c)",
        "race",  # its barrier guards another buffer
    ),
    "dk and dv exchanged": Fault(
        "accumulate(sum_v, s, d_tile, 16 * i);\n      accumulate(sum_k, dp, q_tile, 16 * i);",
        "accumulate(sum_k, s, d_tile, 16 * i);\n      accumulate(sum_v, dp, q_tile, 16 * i);",
        BEYOND,
    ),
    "the softmax's derivative without its row sum": Fault(
        "dp[j][e] = prob * (dp[j][e] - row_delta);", "dp[j][e] = prob * dp[j][e];", BEYOND
    ),
    # Dropout
    "another mask in the gradient of k and v": Fault(
        "const int which = ROWS_ARE_KEYS ? 2 * j + r : 2 * r + j;",
        "const int which = 2 * r + j;",
        BEYOND,
    ),
    "the same mask for every head": Fault("(u32)at.head << 16 | key", "key", BEYOND),
    "the same mask in every sentence": Fault(
        "at.first_token + query, (u32)", "query, (u32)", BEYOND
    ),
    "a weight dropped in the sum and kept in its gradient": Fault(
        "if (DROPOUT) dp[j][e] = dropped(dp[j][e], keep, 4 * j + e, p);\n          s[j][e]",
        "s[j][e]",
        BEYOND,
    ),
    "dropout before the softmax's sum": Fault(
        "          l[e / 2] += s[i][j][e];  // before dropout: softmax comes first\n",
        "          l[e / 2] += dropped(s[i][j][e], keep[i], 4 * j + e, p);\n",
        BEYOND,
    ),
    "survivors not scaled up": Fault(
        "keep >> bit & 1 ? weight * p.keep_scale : 0.f", "keep >> bit & 1 ? weight : 0.f", BEYOND
    ),
}
NORM = {
    "no barrier": Fault("block_barrier();  // all", "// all", "race|nobody wrote"),
    "no eps": Fault("/ HIDDEN + eps)", "/ HIDDEN)", "y: .* beyond"),
    "a warp past the last row": Fault("if (row >= rows) return;", "", "outside every tensor"),
    "the mean stays in": Fault(
        "h[i].low - m, h[i].high - m", "h[i].low, h[i].high", "y: .* beyond"
    ),
    "no mean of g": Fault("(g[i].low - sum - n", "(g[i].low - n", "dx: .* beyond"),
    "no mean of g n": Fault(".high * product) * s", ".high * 0.f) * s", "dx: .* beyond"),
    "kept numbers not scaled": Fault("x.low * keep_scale", "x.low", "y: .* beyond"),
    "two steps share bits": Fault("step % 2 * 32", "0", "y: .* beyond"),
    "no mask in the backward pass": Fault("dropout.of(dh, row, i)", "dh", "dx: .* beyond"),
    "dbias is dweight": Fault("HIDDEN * 4, dbias[i]", "HIDDEN * 4, dweight[i]", "dbias: .* beyond"),
    "a row done twice": Fault("row += blocks * WARPS", "row += blocks", "second time"),
    "a warp forgotten": Fault("other < WARPS", "other < WARPS - 1", "dweight: .* beyond"),
    "no statistics kept": Fault("% 32 == 0) {", "% 32 < 0) {", "never written"),
    "a block forgotten": Fault("block < blocks", "block < blocks - 1", "dweight: .* beyond"),
}
ADAMW = {
    "no tail check": Fault(
        "if (at < size) {\n             p[i]", "{\n             p[i]", "outside every tensor"
    ),
    "overlapping chunks": Fault(
        "chunks + 2 * block_index_x() + 1) * CHUNK;",
        "chunks + 2 * block_index_x() + 1) * CHUNK / 2;",
        "second time|after it was updated",
    ),
    "a chunk without an end": Fault(
        "base < start + CHUNK && ", "", "second time|after it was updated"
    ),
    "a chunk's squares beyond the tensor": Fault(
        "at < part.size ? load_global(gradient + at) : 0.f",
        "load_global(gradient + at)",
        "outside every tensor",
    ),
    "no barrier before the warps' squares": Fault(
        "block_barrier();  // all warps' sums", "// all warps' sums", "nobody wrote|race"
    ),
    "a warp's squares left out": Fault("int warp = 1", "int warp = 2", r"assert [0-9.]+ == "),
    "a wrong first moment": Fault("(g[i] - m[i])", "g[i]", BEYOND),
    "the rate as decay": Fault("2 * tensor + 1);\n\n", "2 * tensor);\n\n", BEYOND),
}


def check_attention(fault: Fault) -> None:
    lengths = list(fault.lengths)
    case = test_kernels_attention.run(lengths, head_size=32, dropout_p=fault.dropout_p)
    test_kernels_attention.check(case)


def check_norm(_: Fault) -> None:
    test_kernels_norm.check(9, 128, 0.1, True)


def check_adamw(_: Fault) -> None:
    check_trajectory("torch", 1.0, 1024.0)


FAULTS = [
    pytest.param(file, check, fault, id=name, marks=[] if name in fast else pytest.mark.slow)
    for file, check, faults, fast in (
        ("attention.cu", check_attention, ATTENTION, {"the same mask for every head"}),
        ("norm.cu", check_norm, NORM, {}),
        ("adamw.cu", check_adamw, ADAMW, {}),
    )
    for name, fault in faults.items()
]


@pytest.mark.parametrize(("file", "check", "fault"), FAULTS)
def test_a_planted_fault_is_seen(
    file: str, check: Callable[[Fault], None], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = emulator.source(file)
    assert text.count(fault.old) == 1, "the fault no longer fits the source"
    check(fault)
    monkeypatch.setattr(emulator, "source", lambda _: text.replace(fault.old, fault.new))
    with pytest.raises(AssertionError, match=fault.seen):
        check(fault)
