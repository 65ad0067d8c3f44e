"""Dropout of attention weights: the right rate, independent, and the same mask in every kernel."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import attention_reference
import emulator
import numpy as np
import pytest
import torch
from cuda.core._kernel_arg_handler import ParamHolder
from torch import Tensor

from minibert.speed.cuda import attention

# Writes what `kept` returns for every 16 x 16 patch of every sentence and head, seen from rows that
# are queries and from rows that are keys.
PROBE = """
KERNEL(probe, 32, 1, (u32* queries, u32* keys, const u64* seed, int length, u32 drop_below),
       Problem p{}; p.drop_below = drop_below;
       const int patches = length / 16;
       Place at = place(block_index_x() / patches * length, length, block_index_y());
       const int row = block_index_x() % patches;
       for (int column = 0; column < patches; column++) {
         const long long block = (long long)block_index_y() * 4 * patches + block_index_x();
         const long long to = (block * patches + column) * 32 + thread_index();
         store_global(queries + to, kept<false>(p, *seed, at, 16 * row, 16 * column));
         store_global(keys + to, kept<true>(p, *seed, at, 16 * row, 16 * column));
       })
"""
PLACE = """
static Place place(int first_token, int length, int head) {
  alignas(Place) char bytes[sizeof(Place)];
  Place& at = *(Place*)bytes;
  at.first_token = first_token, at.length = length, at.head = head, at.first_row = 0;
  return at;
}
"""
SENTENCES, HEADS, LENGTH = 4, 10, 512  # 10 485 760 weights
SEED = 0x1234_5678_9ABC_DEF0


@cache
def masks(drop_below: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept weights by query rows and by key rows: (heads, sentences, queries, keys) bool each."""
    defines = {"HEAD_SIZE": 64, "DROPOUT": 1}
    machine = emulator.Emulator(emulator.source() + PLACE + PROBE, defines, "-Og")
    patches = LENGTH // 16
    words = [torch.zeros(HEADS, SENTENCES, patches, patches, 32, dtype=torch.int32) for _ in "qk"]
    seed = torch.tensor([SEED])
    machine.library.emulator_clear_views()
    machine.view("queries", words[0], True)
    machine.view("keys", words[1], True)
    machine.view("seed", seed, False)
    parameters = [*(x.data_ptr() for x in (*words, seed)), ctypes.c_int32(LENGTH)]
    parameters.append(ctypes.c_uint32(drop_below))
    grid = (SENTENCES * patches, HEADS)
    machine.run_packed("probe", grid, 32, ParamHolder(parameters), len(parameters))
    by_queries, by_keys = (_unpack(x.numpy()) for x in words)
    return by_queries, by_keys.swapaxes(2, 3)


def _unpack(words: np.ndarray) -> np.ndarray:
    """The lanes' bits as a matrix: of lane 4g + t, bit 4j + 2r + i is (g + 8r, 8j + 2t + i)."""
    bits = (words[..., None] >> np.arange(8)) & 1
    heads, sentences, patches = words.shape[:3]
    lanes = bits.reshape(heads, sentences, patches, patches, 8, 4, 2, 2, 2)  # ... g t j r i
    rows_columns = lanes.transpose(
        0, 1, 2, 7, 4, 3, 6, 5, 8
    )  # row patch, r, g, column patch, j, t, i
    return rows_columns.reshape(heads, sentences, LENGTH, LENGTH).astype(bool)


def standard_deviations(count: float, draws: int, rate: float) -> float:
    """How far a count lies from its expectation."""
    return abs(count - draws * rate) / math.sqrt(draws * rate * (1 - rate))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_keep_rate(dropout_p: float) -> None:
    """Ten million weights, and each row, key and head of them, within binomial bounds.

    Five standard deviations for the whole; for the largest of m groups, the deviation that a normal
    variable exceeds once in 10^4 m.
    """
    drop_below = attention.drop_below(dropout_p)
    kept, _ = masks(drop_below)
    rate = 1 - drop_below / 65536
    assert kept.size > 1e7
    assert standard_deviations(kept.sum(), kept.size, rate) < 5
    for axes in ((0, 1, 3), (0, 1, 2), (0, 2, 3), (1, 2, 3), (3,), (2,)):
        counts = kept.sum(axis=axes)
        bound = math.sqrt(2 * math.log(1e4 * counts.size))
        worst = max(abs(counts - counts.mean()).max(), 1)
        draws = kept.size // counts.size
        assert worst / math.sqrt(draws * rate * (1 - rate)) < bound, axes


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_no_correlation(dropout_p: float) -> None:
    """Between heads, sentences, rows and keys, at every small distance and those of the tiling."""
    kept, _ = masks(attention.drop_below(dropout_p))
    centred = (kept - kept.mean()).astype(np.float32)
    variance = float(np.square(centred).mean())
    for axis, name in enumerate(("heads", "sentences", "queries", "keys")):
        for distance in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 32, 64, 256):
            if distance < kept.shape[axis]:
                first = np.take(centred, range(kept.shape[axis] - distance), axis)
                second = np.take(centred, range(distance, kept.shape[axis]), axis)
                correlation = float(np.mean(first * second, dtype=np.float64)) / variance
                assert abs(correlation) * math.sqrt(first.size) < 5, (name, distance)
    transposed = float(np.mean(centred * centred.swapaxes(2, 3), dtype=np.float64)) / variance
    # A mask against its own transpose: the diagonal is the same weight, once in LENGTH.
    assert abs(transposed - 1 / LENGTH) * math.sqrt(centred.size / 2) < 5


def test_every_bit_of_the_random_numbers_counts() -> None:
    """The smallest and the largest probabilities: one in 65536 dropped, one in 65536 kept."""
    rarely, _ = masks(1)
    assert standard_deviations(rarely.size - rarely.sum(), rarely.size, 1 / 65536) < 5
    mostly, _ = masks(65535)
    assert standard_deviations(mostly.sum(), mostly.size, 1 / 65536) < 5


def test_queries_and_keys_see_one_mask_and_it_is_philox() -> None:
    drop_below = attention.drop_below(0.1)
    by_queries, by_keys = masks(drop_below)
    assert np.array_equal(by_queries, by_keys)
    for sentence in range(SENTENCES):
        first = sentence * LENGTH
        expected = attention_reference.kept(SEED, first, LENGTH, HEADS, drop_below).numpy()
        assert np.array_equal(by_queries[:, sentence], expected)


@pytest.mark.parametrize(
    ("key", "counter", "random"),
    [
        (0, (0, 0), (0x257A3673, 0xCD26BE2A)),
        (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), (0xAB302C4D, 0x3DC9D239)),
        (0x13198A2E, (0x243F6A88, 0x85A308D3), (0xBEDBBE6B, 0xE4C770B3)),
    ],
)
def test_philox_gives_the_published_answers(
    key: int, counter: tuple[int, int], random: tuple[int, int]
) -> None:
    """The reference, to which the kernels are equal: Random123's vectors, ``philox2x32 7``."""
    got = attention_reference.philox(key, *(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in got) == random


@pytest.mark.parametrize("length", [16, 37, 64])
@pytest.mark.parametrize("kernels", ["short", "long"])
def test_forward_and_backward_drop_the_same_weights(
    length: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask read off each result of the real kernels.

    With no scores every weight is 1 / S. One-hot v then shows the weights in the context, one-hot
    d_context shows them in dv, and one-hot k and q show ds in dq and dk, which is larger where a
    weight was kept.
    """
    monkeypatch.setattr(attention, "SHORT", {"short": 64, "long": 0}[kernels])
    heads, drop_below = 2, attention.drop_below(0.3)
    nothing = torch.zeros(length, heads, 64).half()
    one_hot = torch.eye(64).half()[:length, None].repeat(1, heads, 1)
    first = nothing.clone()
    first[..., 0] = 1
    starts = torch.tensor([0, length], dtype=torch.int32)
    rest = (starts, torch.tensor([SEED]), length, 0.3)

    def both(q: Tensor, k: Tensor, v: Tensor, d_context: Tensor) -> tuple[Tensor, Tensor]:
        context, lse = attention.forward(emulator.launch, q, k, v, *rest)
        inputs = (d_context, q, k, v, context, lse)
        return context, attention.backward(emulator.launch, *inputs, *rest)

    def matrix(x_NHK: Tensor) -> Tensor:
        """(rows, H, columns) as (H, rows, columns)."""
        return x_NHK[..., :length].transpose(0, 1)

    context, grad = both(nothing, nothing, one_hot, one_hot)
    seen = {"context": matrix(context) > 0, "dv": matrix(grad[:, 2]).mT > 0}
    _, grad = both(nothing, one_hot, first, first)
    seen["dq"] = matrix(grad[:, 0]) > 0
    _, grad = both(one_hot, nothing, first, first)
    seen["dk"] = matrix(grad[:, 1]).mT > 0
    expected = attention_reference.kept(SEED, 0, length, heads, drop_below)
    for name, mask in seen.items():
        assert torch.equal(mask, expected), name
