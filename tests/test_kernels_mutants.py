"""Planted faults: each changes a line of the kernels, and the checks of the suite must see it.

A fault is seen when the emulator reports it, or when a result leaves the bound that the unchanged
source keeps on the same batch. Which of the two is part of the test.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import emulator
import pytest
from test_kernels import check, run

BEYOND = "beyond their bound"
LONG, SHORT = [70, 33, 5], [33, 16, 5]


class Fault(NamedTuple):
    """``old`` stands in the source exactly once and becomes ``new``."""

    old: str
    new: str
    seen: str  # in the message of the failure, as a regular expression
    lengths: list[int] = LONG
    dropout_p: float = 0.1
    head_size: int = 32


FAULTS = {
    # Waiting for each other
    "no barrier before a tile is read": Fault(
        "    block_barrier();  // the tile is complete\n", "", "nobody wrote|race"
    ),
    "no barrier before the tiles become staging": Fault(
        "  block_barrier();  // the tiles are read; their memory becomes staging again\n",
        "",
        "race",
    ),
    "a tile replaced while others read it": Fault(
        "if (BUFFERS == 1) block_barrier();  // everyone", "// everyone", "race", SHORT
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
    "keys behind the end take part in the softmax": Fault(
        "    if (first_key + STEP > at.length) {", "    if (false) {", BEYOND
    ),
    "sums not rescaled to the new maximum": Fault(
        "        sum[i][2 * r] *= shrink;\n", "", BEYOND, [40], 0.0
    ),
    "normaliser not rescaled to the new maximum": Fault(
        "      l[r] *= shrink;\n", "", BEYOND, [40], 0.0
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


def plant(fault: Fault) -> emulator.Emulator | None:
    """The kernels with this fault; None if it does not fit the source."""
    text = emulator.source()
    if text.count(fault.old) != 1:
        return None
    defines = {"HEAD_SIZE": fault.head_size, "DROPOUT": int(fault.dropout_p > 0)}
    return emulator.Emulator(text.replace(fault.old, fault.new), defines, "-Og")


@pytest.fixture(scope="module")
def mutants() -> dict[str, emulator.Emulator | None]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAULTS, pool.map(plant, FAULTS.values())))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name: str, mutants: dict[str, emulator.Emulator | None]) -> None:
    fault, mutant = FAULTS[name], mutants[name]
    assert mutant, "the fault no longer fits the source: plant it anew"

    def attempt() -> None:
        check(run(fault.lengths, 2, fault.head_size, fault.dropout_p, launch=mutant.run))

    with pytest.raises(AssertionError, match=fault.seen):
        attempt()


@pytest.mark.parametrize(
    ("lengths", "dropout_p"), {(tuple(f.lengths), f.dropout_p) for f in FAULTS.values()}
)
def test_the_unchanged_source_passes_where_faults_are_planted(
    lengths: tuple[int, ...], dropout_p: float
) -> None:
    check(run(list(lengths), 2, 32, dropout_p))
