"""The attention kernels, run from their CUDA source by the emulator, against float64.

Every test here also fails on an access out of bounds, on shared memory read before it is written,
on a race, and on an output element that is not written exactly once: see ``emulator.h``.
"""

from __future__ import annotations

from typing import NamedTuple

import attention_reference
import emulator
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minibert.speed.cuda import attention

EDGES = [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130]


class Case(NamedTuple):
    """One packed batch and everything the kernels made of it."""

    lengths: list[int]
    qkv_N3HK: Tensor
    d_context_NHK: Tensor
    starts: Tensor
    seed: Tensor
    dropout_p: float
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
    launch: attention.Launcher = emulator.launch,
    device: str = "cpu",
) -> Case:
    """Forward and backward of random numbers of standard deviation ``size``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), 3, heads, head_size)
    qkv_N3HK = (size * torch.randn(shape, generator=generator)).half().to(device)
    d_context_NHK = torch.randn(shape[0], heads, head_size, generator=generator).half().to(device)
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    dropout_seed = torch.randint(2**62, (1,), generator=generator).to(device)
    kernels = []

    def recorded(step: attention.Launch) -> None:
        kernels.append(step.kernel)
        launch(step)

    rest = (starts, dropout_seed, max_length or max(lengths), dropout_p)
    qkv = qkv_N3HK.unbind(1)
    context_NHK, lse_HN = attention.forward(recorded, *qkv, *rest)
    grad_N3HK = attention.backward(recorded, d_context_NHK, *qkv, context_NHK, lse_HN, *rest)
    return Case(lengths, qkv_N3HK, d_context_NHK, starts, dropout_seed, dropout_p, context_NHK,
                lse_HN, grad_N3HK, kernels)  # fmt: skip


def check(case: Case) -> None:
    """Every element within its bound, which NaN is not."""
    expected = attention_reference.attention(
        case.qkv_N3HK.cpu(),
        case.d_context_NHK.cpu(),
        case.lengths,
        int(case.seed),
        attention.drop_below(case.dropout_p),
    )
    grad_N3HK = case.grad_N3HK.cpu()
    got = {"context": case.context_NHK.cpu(), "lse": case.lse_HN.cpu()}
    want = {"context": expected.context, "lse": expected.lse}
    bound = {"context": expected.context_bound, "lse": expected.lse_bound}
    for i, name in enumerate(("dq", "dk", "dv")):
        got[name] = grad_N3HK[:, i]
        want[name] = expected.grad[:, i]
        bound[name] = expected.grad_bound[:, i]
    for name, value in got.items():
        error = (value.double() - want[name]).abs()
        wrong = ~(error <= bound[name])
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements beyond their bound, first at "
            f"{wrong.nonzero()[0].tolist()}, error up to {error.max():.2e}"
        )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [64, 32])
def test_edge_lengths_by_the_long_kernels(head_size: int, dropout_p: float) -> None:
    case = run(EDGES, head_size=head_size, dropout_p=dropout_p)
    assert case.kernels == ["forward_long", "backward_q_long", "backward_kv_long"]
    check(case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [64, 32])
def test_edge_lengths_by_the_short_kernels(
    head_size: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 512)
    case = run(EDGES, head_size=head_size, dropout_p=dropout_p)
    assert case.kernels == ["forward_short", "backward_q_short", "backward_kv_short"]
    check(case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [64, 32])
def test_longest_sentence(head_size: int, dropout_p: float) -> None:
    check(run([512], heads=1, head_size=head_size, dropout_p=dropout_p))


@pytest.mark.parametrize("length", EDGES)
def test_a_sentence_alone(length: int) -> None:
    check(run([length], dropout_p=0.1, seed=length))


def test_the_length_chooses_the_kernels() -> None:
    assert run([attention.SHORT], heads=1).kernels[0] == "forward_short"
    assert run([attention.SHORT + 1], heads=1).kernels[0] == "forward_long"


@pytest.mark.parametrize("size", [0.01, 5.0, 30.0])
def test_flat_and_peaked_softmax(size: int) -> None:
    check(run([12, 40, 70], size=size, dropout_p=0.1))


def test_strong_dropout() -> None:
    case = run([1, 1, 1, 1, 2, 33], dropout_p=0.9)
    assert (case.context_NHK == 0).all(-1).any(), (
        "no row lost all its weights: the test sees nothing"
    )
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
    rest = (case.starts, case.seed, 70, 0.1)

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
        context, lse = attention.forward(emulator.launch, *qkv, *rest)
        grad = attention.backward(emulator.launch, case.d_context_NHK, *qkv, context, lse, *rest)
        assert torch.equal(context, case.context_NHK)
        assert torch.equal(lse, case.lse_HN)
        assert torch.equal(grad, case.grad_N3HK)


def test_thread_order_changes_no_bit() -> None:
    """Deterministic gradients: nothing depends on which thread came first."""
    cases = [
        run([12, 70], dropout_p=0.1, launch=lambda step, order=order: _ordered(step, order))
        for order in range(3)
    ]
    for case in cases[1:]:
        assert torch.equal(case.context_NHK, cases[0].context_NHK)
        assert torch.equal(case.grad_N3HK, cases[0].grad_N3HK)


def _ordered(step: attention.Launch, order: int) -> None:
    emulator.emulator(step.defines["HEAD_SIZE"], 1).run(step, seed=order)


@pytest.mark.parametrize("head_size", [64, 32])
def test_no_bank_conflicts(head_size: int) -> None:
    """The swizzle of ``chunk_offset`` does what it is for."""
    machine = emulator.emulator(head_size, 0)
    before = machine.bank_conflicts
    run([70, 12], head_size=head_size)
    run([12], head_size=head_size)
    assert machine.bank_conflicts == before


def test_a_sentence_does_not_see_its_neighbours() -> None:
    alone = run([33], seed=5)
    q, k, v = alone.qkv_N3HK.unbind(1)
    other = torch.full((20, 2, 64), 7.0).half()
    packed = [torch.cat([other, x, other]) for x in (q, k, v)]
    starts = torch.tensor([0, 20, 53, 73], dtype=torch.int32)
    context, lse = attention.forward(emulator.launch, *packed, starts, None, 33, 0.0)
    assert torch.equal(context[20:53], alone.context_NHK)
    assert torch.equal(lse[:, 20:53], alone.lse_HN)


def test_what_cannot_be_computed_is_refused() -> None:
    x = torch.zeros(4, 2, 64)
    starts = torch.tensor([0, 4], dtype=torch.int32)

    def forward(q: Tensor, k: Tensor, starts: Tensor = starts, dropout_p: float = 0.0) -> None:
        attention.forward(emulator.launch, q, k, k, starts, None, 4, dropout_p)

    with pytest.raises(ValueError, match=r"float16, but q is torch\.float32"):
        forward(x, x)
    with pytest.raises(ValueError, match="alike, got k"):
        forward(x.half(), x[:3].half())
    with pytest.raises(ValueError, match=r"head sizes \(32, 64\), got 48"):
        forward(x[..., :48].half(), x[..., :48].half())
    with pytest.raises(ValueError, match="int32"):
        forward(x.half(), x.half(), starts.long())
    for dropout_p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout probability"):
            forward(x.half(), x.half(), dropout_p=dropout_p)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
@pytest.mark.parametrize("head_size", [64, 32])
def test_bert_base_heads_at_full_length(head_size: int) -> None:
    check(run([512, 511, 1, 257], heads=12, head_size=head_size, dropout_p=0.1))
