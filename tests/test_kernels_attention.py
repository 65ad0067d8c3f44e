"""The attention kernels against float64, run from their CUDA source by the emulator.

Every run here also fails on an access out of bounds, on shared memory read before it is written, on
a race, and on an output element that is not written exactly once: see ``emulator.h``.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import emulator
import kernel_reference
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minibert.speed.cuda import attention

EDGES = [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130]
KINDS = ("forward", "backward_q", "backward_kv")
SEED = 0x1234_5678_9ABC_DEF0


class Case(NamedTuple):
    """One packed batch and what the kernels made of it."""

    qkv_N3HK: Tensor
    d_context_NHK: Tensor
    rest: tuple  # starts, seed, max_length, dropout_p
    context_NHK: Tensor
    lse_HN: Tensor
    grad_N3HK: Tensor
    kernels: list[str]


def run(
    lengths: list[int],
    heads: int = 2,
    head_size: int = 64,
    dropout_p: float = 0.0,
    size: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Forward and backward of random numbers of standard deviation ``size``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), 3, heads, head_size)
    qkv_N3HK = (size * torch.randn(shape, generator=generator)).half().to(device)
    d_context_NHK = torch.randn(shape[0], heads, head_size, generator=generator).half().to(device)
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    dropout_seed = torch.randint(2**62, (1,), generator=generator).to(device)
    rest = (starts, dropout_seed, max_length or max(lengths), dropout_p)
    with emulator.recorded() as launches:
        results = both(d_context_NHK, *qkv_N3HK.unbind(1), *rest)
    kernels = [launch.kernel for launch in launches]
    return Case(qkv_N3HK, d_context_NHK, rest, *results, kernels)


def both(
    d_context_NHK: Tensor, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, *rest
) -> tuple[Tensor, ...]:
    """Context, lse and the gradients."""
    qkv = (q_NHK, k_NHK, v_NHK)
    context_NHK, lse_HN = attention.forward(*qkv, *rest)
    grad_N3HK = attention.backward(d_context_NHK, *qkv, context_NHK, lse_HN, *rest)
    return context_NHK, lse_HN, grad_N3HK


def check(case: Case) -> None:
    starts, seed, _, dropout_p = case.rest
    dq, dk, dv = case.grad_N3HK.unbind(1)
    kernel_reference.check(
        {"context": case.context_NHK, "lse": case.lse_HN, "dq": dq, "dk": dk, "dv": dv},
        kernel_reference.attention(
            case.qkv_N3HK.cpu(),
            case.d_context_NHK.cpu(),
            starts.diff().tolist(),
            int(seed),
            dropout_p,
        ),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [64, 32])
@pytest.mark.parametrize("kernels", ["long", "short"])
def test_edge_lengths(
    kernels: str, head_size: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", {"long": 64, "short": 512}[kernels])
    case = run(EDGES, head_size=head_size, dropout_p=dropout_p)
    assert case.kernels == [f"{kind}_{kernels}" for kind in KINDS]
    check(case)


def test_the_length_selects_the_kernels() -> None:
    assert run([attention.SHORT], heads=1).kernels[0] == "forward_short"
    assert run([attention.SHORT + 1], heads=1).kernels[0] == "forward_long"


@pytest.mark.parametrize("short", [64, 512])
def test_a_sentence_gets_the_same_bits_in_every_batch(
    short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one kernel, without dropout; two kernels sum in two orders."""
    monkeypatch.setattr(attention, "SHORT", short)
    lengths = [33, 70, 5, 16]
    case = run(lengths, heads=1)
    starts = case.rest[0].tolist()
    for first, stop in pairwise(starts):
        q, k, v = case.qkv_N3HK[first:stop].unbind(1)
        alone = torch.tensor([0, stop - first], dtype=torch.int32)
        context_NHK, _ = attention.forward(q, k, v, alone, case.rest[1], max(lengths), 0.0)
        assert torch.equal(context_NHK, case.context_NHK[first:stop])


@pytest.mark.parametrize("size", [0.01, 5.0, 30.0])
def test_flat_and_peaked_softmax(size: int) -> None:
    check(run([12, 40, 70], size=size, dropout_p=0.1))


def test_strong_dropout() -> None:
    case = run([1, 1, 1, 1, 2, 33], dropout_p=0.9)
    assert (case.context_NHK == 0).all(-1).any(), "no row lost all its weights"
    check(case)


@pytest.mark.parametrize("max_length", [9, 65])
def test_sentences_without_tokens(max_length: int) -> None:
    check(run([0, 9, 0, 0, 3, 0], max_length=max_length))


def test_an_empty_batch_launches_nothing() -> None:
    case = run([0, 0], max_length=0)
    assert case.kernels == []
    assert case.context_NHK.shape == (0, 2, 64)
    assert case.grad_N3HK.shape == (0, 3, 2, 64)


def test_any_layout_of_q_k_v_gives_the_same_bits() -> None:
    """Slices of one product, separate tensors, wider rows, and rows that must be copied."""
    case = run([20, 70], dropout_p=0.1)

    def wider(x_NHK: Tensor, by: int) -> Tensor:
        room = torch.empty(x_NHK.shape[0], x_NHK[0].numel() + by, dtype=x_NHK.dtype)
        view = room.as_strided(x_NHK.shape, (room.shape[1], x_NHK.shape[2], 1))
        return view.copy_(x_NHK)

    q, k, v = case.qkv_N3HK.unbind(1)
    layouts = [
        (q.contiguous(), k.contiguous(), v.contiguous()),
        (wider(q, 8), wider(k, 24), wider(v, 64)),
        (wider(q, 1), k.transpose(0, 1).contiguous().transpose(0, 1), v),
    ]
    for qkv in layouts:
        results = both(case.d_context_NHK, *qkv, *case.rest)
        assert all(map(torch.equal, results, (case.context_NHK, case.lse_HN, case.grad_N3HK)))


def test_tensors_at_odd_addresses_give_the_same_bits() -> None:
    """Contiguous, but not from a multiple of 16 bytes on; a GPU would fault on a vector load."""

    def shifted(x: Tensor) -> Tensor:
        moved = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        assert moved.is_contiguous()
        assert moved.data_ptr() % 16
        return moved

    case = run([12, 70], heads=1, dropout_p=0.1)
    qkv = [x.contiguous() for x in case.qkv_N3HK.unbind(1)]
    starts, *rest = case.rest
    context, lse = attention.forward(*map(shifted, qkv), shifted(starts), *rest)
    assert torch.equal(context, case.context_NHK)
    arguments = map(shifted, (case.d_context_NHK, *qkv, context, lse, starts))
    assert torch.equal(attention.backward(*arguments, *rest), case.grad_N3HK)


def test_thread_order_changes_no_bit() -> None:
    """Deterministic gradients: the emulator draws another order of the threads in each run."""
    first, *others = (run([12, 70], dropout_p=0.1) for _ in range(3))
    for case in others:
        assert torch.equal(case.context_NHK, first.context_NHK)
        assert torch.equal(case.grad_N3HK, first.grad_N3HK)


@pytest.mark.parametrize("head_size", [64, 32])
def test_no_bank_conflicts(head_size: int) -> None:
    """The swizzle of ``chunk_offset`` is effective."""
    machine = emulator.machine("attention.cu", {"HEAD_SIZE": head_size, "DROPOUT": 0})
    before = machine.bank_conflicts
    run([70, 12], head_size=head_size)
    run([12], head_size=head_size)
    assert machine.bank_conflicts == before


def test_a_sentence_does_not_see_its_neighbours() -> None:
    alone = run([33], seed=5)
    other = torch.full((20, 2, 64), 7.0).half()
    packed = [torch.cat([other, x, other]) for x in alone.qkv_N3HK.unbind(1)]
    starts = torch.tensor([0, 20, 53, 73], dtype=torch.int32)
    context, lse = attention.forward(*packed, starts, None, 33, 0.0)
    assert torch.equal(context[20:53], alone.context_NHK)
    assert torch.equal(lse[:, 20:53], alone.lse_HN)


def test_what_the_kernels_do_not_support_is_refused() -> None:
    x = torch.zeros(4, 2, 64)
    starts = torch.tensor([0, 4], dtype=torch.int32)

    def forward(q: Tensor, k: Tensor, starts: Tensor = starts, dropout_p: float = 0.0) -> None:
        attention.forward(q, k, k, starts, None, 4, dropout_p)

    with pytest.raises(ValueError, match=r"float16, but q is torch\.float32"):
        forward(x, x)
    with pytest.raises(ValueError, match=r"one shape \(N, H, K\), got k"):
        forward(x.half(), x[:3].half())
    with pytest.raises(ValueError, match=r"one of \(32, 64\), got 48"):
        forward(x[..., :48].half(), x[..., :48].half())
    with pytest.raises(ValueError, match="int32"):
        forward(x.half(), x.half(), starts.long())
    for dropout_p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout probability"):
            forward(x.half(), x.half(), dropout_p=dropout_p)


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=5).filter(any),
    heads=st.integers(1, 3),
    head_size=st.sampled_from([32, 64]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    size=st.sampled_from([0.1, 1.0, 8.0]),
    slack=st.integers(0, 100),
    seed=st.integers(0, 2**31),
)
def test_any_batch(
    lengths: list[int],
    heads: int,
    head_size: int,
    dropout_p: float,
    size: float,
    slack: int,
    seed: int,
) -> None:
    check(run(lengths, heads, head_size, dropout_p, size, max(lengths) + slack, seed))


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [64, 32])
def test_every_edge_alone_and_bert_base_at_full_length(head_size: int, dropout_p: float) -> None:
    for length in EDGES:
        check(run([length], head_size=head_size, dropout_p=dropout_p, seed=length))
    check(run([512, 511, 1, 257], heads=12, head_size=head_size, dropout_p=dropout_p))


# ---- dropout: the same mask in every kernel, independent, with the right rate ------------------


@pytest.mark.parametrize("length", [16, 37, 64])
@pytest.mark.parametrize("kernels", ["short", "long"])
def test_every_kernel_applies_the_mask_of_the_reference(
    length: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read the mask off each result of the kernels, in the second of two sentences.

    With no scores every weight is 1 / S. One-hot v then shows the weights in the context, one-hot
    d_context shows them in dv, and one-hot k and q show ds in dq and dk, which is larger where a
    weight was kept.
    """
    monkeypatch.setattr(attention, "SHORT", {"short": 64, "long": 0}[kernels])
    before, heads = 5, 2
    nothing = torch.zeros(before + length, heads, 64).half()
    one_hot, first = nothing.clone(), nothing.clone()
    one_hot[before:] = torch.eye(64).half()[:length, None]
    first[..., 0] = 1
    starts = torch.tensor([0, before, before + length], dtype=torch.int32)
    rest = (starts, torch.tensor([SEED]), length, 0.3)

    def matrix(x_NHK: Tensor) -> Tensor:
        """(rows, H, columns) as (H, rows, columns)."""
        return x_NHK[before:, :, :length].transpose(0, 1) > 0

    context, _, grad = both(one_hot, nothing, nothing, one_hot, *rest)
    seen = {"context": matrix(context), "dv": matrix(grad[:, 2]).mT}
    _, _, grad = both(first, nothing, one_hot, first, *rest)
    seen["dq"] = matrix(grad[:, 0])
    _, _, grad = both(first, one_hot, nothing, first, *rest)
    seen["dk"] = matrix(grad[:, 1]).mT
    expected = kernel_reference.kept(SEED, before, length, heads, 0.3)
    for name, mask in seen.items():
        assert torch.equal(mask, expected), name


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
    """Random123's vectors for ``philox2x32 7``."""
    got = kernel_reference.philox(key, *(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in got) == random


@cache
def masks(dropout_p: float) -> np.ndarray:
    """The reference's masks, (heads, sentences, queries, keys): 10 485 760 weights."""
    sentences = [kernel_reference.kept(SEED, 512 * i, 512, 10, dropout_p) for i in range(4)]
    return torch.stack(sentences, 1).numpy()


def standard_deviations(count: float, draws: int, rate: float) -> float:
    """How far a count is from its expectation."""
    return abs(count - draws * rate) / math.sqrt(draws * rate * (1 - rate))


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_keep_rate(dropout_p: float) -> None:
    """All weights, and those of each row, key and head, within binomial bounds.

    Five standard deviations for the whole; for the largest of m groups, the deviation that a normal
    variable exceeds once in 10^4 m.
    """
    kept = masks(dropout_p)
    rate = 1 / kernel_reference.scale_of_kept(dropout_p)
    assert standard_deviations(kept.sum(), kept.size, rate) < 5
    for axes in ((0, 1, 3), (0, 1, 2), (0, 2, 3), (1, 2, 3), (3,), (2,)):
        counts = kept.sum(axis=axes)
        bound = math.sqrt(2 * math.log(1e4 * counts.size))
        worst = max(abs(counts - counts.mean()).max(), 1)
        draws = kept.size // counts.size
        assert worst / math.sqrt(draws * rate * (1 - rate)) < bound, axes


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_no_correlation(dropout_p: float) -> None:
    """Between heads, sentences, rows and keys, at every small distance and those of the tiling."""
    kept = masks(dropout_p)
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
    # A mask against its own transpose: the diagonal, one weight in 512, is the same.
    assert abs(transposed - 1 / 512) * math.sqrt(centred.size / 2) < 5


@pytest.mark.slow
def test_every_bit_of_the_random_numbers_counts() -> None:
    """The smallest and the largest probabilities: one in 65536 dropped, one in 65536 kept."""
    rarely, mostly = masks(1 / 65536), masks(65535 / 65536)
    assert standard_deviations(rarely.size - rarely.sum(), rarely.size, 1 / 65536) < 5
    assert standard_deviations(mostly.sum(), mostly.size, 1 / 65536) < 5
