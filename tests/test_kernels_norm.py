"""Dropout, residual and LayerNorm against float64, run from their CUDA source by the emulator."""

from __future__ import annotations

import emulator
import kernel_reference
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minibert
from minibert import BertConfig, BertForTokenClassification
from minibert.model import encoder
from minibert.speed import cuda, fused
from minibert.speed.cuda import norm, obstacles

EPS = 1e-2  # large enough that leaving it out shows
SEED = 0x1234_5678_9ABC_DEF


def check(rows: int, D: int, dropout_p: float, wide: bool, device: str = "cpu") -> None:
    """Forward and backward; ``wide``: whether the residual is float32."""
    dtype = torch.float32 if wide else torch.float16
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, D, generator=draw).half()
    before = (torch.randn(rows, D, generator=draw) + 1).to(dtype)
    weight, bias = (torch.randn(D, generator=draw).to(dtype) for _ in range(2))
    dy = torch.randn(rows, D, generator=draw).to(dtype)
    seed = torch.tensor([SEED]) if dropout_p else None
    there = [t if t is None else t.to(device) for t in (dy, x, before, weight, bias, seed)]
    y, mean, scale = norm.forward(*there[1:], EPS, dropout_p)
    dx, dresidual, sums = norm.backward(*there[:4], mean, scale, there[5], dropout_p)
    kernel_reference.check(
        {"y": y, "dx": dx, "dresidual": dresidual, "dweight": sums[0], "dbias": sums[1]},
        kernel_reference.add_norm(dy, x, before, weight, bias, SEED, EPS, dropout_p),
    )


@pytest.mark.parametrize(
    ("rows", "D", "wide", "dropout_p"),
    [
        (1, 64, True, 0.0),
        (2, 64, True, 0.1),
        (31, 384, False, 0.1),
        (17, 768, False, 0.0),
        (6, 768, True, 0.5),
    ],
)
def test_float64(rows: int, D: int, wide: bool, dropout_p: float) -> None:
    check(rows, D, dropout_p, wide)


def test_a_warp_does_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "BLOCKS", 2)
    check(2 * norm.ROWS + 5, 64, 0.1, True)


def test_the_same_batch_gives_the_same_bits() -> None:
    """The emulator draws another order of the threads in each run."""
    x, before, dy = (torch.randn(50, 384).half() for _ in range(3))
    weight, seed = torch.ones(384).half(), torch.tensor([5])
    _, mean, scale = norm.forward(x, before, weight, weight, seed, EPS, 0.1)
    arguments = (dy, x, before, weight, mean, scale, seed, 0.1)
    assert all(map(torch.equal, norm.backward(*arguments), norm.backward(*arguments)))


def test_tensors_at_odd_addresses_give_the_same_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    x, before, dy = (torch.randn(5, 64, generator=draw).half() for _ in range(3))
    weight, bias = torch.randn(2, 64, generator=draw).half()

    def shifted(t: Tensor) -> Tensor:
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

    def both(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
        y, mean, scale = norm.forward(x, before, weight, bias, None, EPS, 0.0)
        return [y, *norm.backward(dy, x, before, weight, mean, scale, None, 0.0)]

    tensors = (x, before, weight, bias, dy)
    assert all(map(torch.equal, both(*map(shifted, tensors)), both(*tensors)))


def operands() -> list[Tensor]:
    """x, residual, weight and bias as under autocast, with gradients."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(7, 64), (7, 64), (64,), (64,)]
    x, *rest = (torch.randn(shape, generator=draw) for shape in shapes)
    return [t.requires_grad_() for t in (x.half(), *rest)]


def test_opcheck() -> None:
    arguments = (*operands(), torch.tensor([7]), EPS, 0.1)
    torch.library.opcheck(torch.ops.minibert.add_norm.default, arguments)
    x, before, weight, _ = (t.detach() for t in arguments[:4])
    y, mean, scale = (t.detach() for t in torch.ops.minibert.add_norm(*arguments))
    backward = (y, x, before, weight, mean, scale, torch.tensor([7]), 0.1)
    torch.library.opcheck(torch.ops.minibert.add_norm_backward.default, backward)


def test_gradients_reach_every_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4, through ``cuda.add_norm`` and autograd."""
    monkeypatch.setattr(obstacles, "norm", lambda *_: None)
    x, before, weight, bias = operands()
    dy = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    y = cuda.add_norm(x, before, weight, bias, EPS)
    y.backward(dy)
    assert y.grad_fn.name() == "_AddNormBackward"
    got = {"y": y, "dx": x.grad, "dresidual": before.grad}
    got |= {"dweight": weight.grad, "dbias": bias.grad}
    detached = (t.detach() for t in (x, before, weight, bias))
    kernel_reference.check(got, kernel_reference.add_norm(dy, *detached, 0, EPS, 0.0))


def test_the_generator_fixes_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "norm", lambda *_: None)

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return cuda.add_norm(*operands(), EPS, 0.5)

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_where_the_kernels_cannot_run_it_is_torch(dropout_p: float) -> None:
    """Bit for bit, including the random numbers of dropout."""
    x, before, weight, bias = operands()
    torch.manual_seed(3)
    y = cuda.add_norm(x, before, weight, bias, EPS, dropout_p)
    torch.manual_seed(3)
    assert torch.equal(y, F.layer_norm(F.dropout(x, dropout_p) + before, (64,), weight, bias, EPS))


def test_fused_attention_brings_it_and_a_trace_sees_through_it() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, labels=("O",),
    )  # fmt: skip
    assert BertForTokenClassification(config, "fused").bert.layers[0].add_norm is fused.add_norm
    model = BertForTokenClassification(config, "sdpa").eval()
    assert model.bert.layers[0].add_norm is encoder.add_norm
    model.bert.layers[1].add_norm = fused.add_norm
    ids = torch.arange(6)[None]
    with minibert.trace(model) as t:
        logits = model(ids).logits
    assert t["layers.1.attention_norm"].shape == (1, 6, 64)
    assert model.bert.layers[1].add_norm is fused.add_norm
    assert torch.equal(model(ids).logits, logits)


def test_no_rows_are_no_launch() -> None:
    empty, weight = torch.empty(0, 64).half(), torch.ones(64).half()
    with emulator.recorded() as launches:
        y, mean, scale = norm.forward(empty, empty, weight, weight, None, EPS, 0.0)
        grads = norm.backward(empty, empty, empty, weight, mean, scale, None, 0.0)
    assert launches == []
    assert y.shape == grads[0].shape == (0, 64)
    assert not grads[2].any()


@pytest.mark.parametrize(
    ("x", "before"),
    [
        (torch.zeros(2, 96).half(), torch.zeros(2, 96)),
        (torch.zeros(2, 832).half(), torch.zeros(2, 832)),
        (torch.zeros(2, 64), torch.zeros(2, 64)),
        (torch.zeros(2, 64).half(), torch.zeros(2, 64).bfloat16()),
        (torch.zeros(2, 64).half(), torch.zeros(3, 64)),
    ],
)
def test_what_the_kernels_do_not_support_is_refused(x: Tensor, before: Tensor) -> None:
    with pytest.raises(ValueError, match="D a multiple of 64 up to 768"):
        norm.forward(x, before, x[0], x[0], None, EPS, 0.0)
