"""Dropout, residual and LayerNorm from their CUDA source, run by the emulator, against float64."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import emulator
import pytest
import torch
import torch.nn.functional as F
from attention_reference import philox
from torch import Tensor, nn

import minibert
from benchmarks import kernel_resources
from minibert import BertConfig, BertForTokenClassification
from minibert.model import encoder
from minibert.speed import cuda, fused
from minibert.speed.cuda import attention, build, norm, ops

EPS = 1e-2  # large enough to be missed if it is left out
SEED = 0x1234_5678_9ABC_DEF
CASES = [  # rows, D, dropout, whether the residual is float32
    (1, 64, 0.1, True),
    (2, 384, 0.0, False),
    (31, 384, 0.1, True),
    (17, 768, 0.1, False),
    (6, 768, 0.5, True),
    (norm.BLOCKS * norm.ROWS + 5, 64, 0.1, False),  # a warp does two rows
]


class Both(NamedTuple):
    """A number of each kind, from the kernels or from float64."""

    y: Tensor
    dx: Tensor
    dresidual: Tensor
    dweight: Tensor
    dbias: Tensor


def kept(rows: int, D: int, threshold: int) -> Tensor:
    """Which numbers dropout keeps: 16 bits of Philox each, four to a draw."""
    column, row = torch.arange(D), torch.arange(rows)
    step, lane = column // 64, column % 64 // 2
    draw = (step // 2 * 32 + lane).expand(rows, D)
    low, high = philox(SEED, row[:, None].expand(rows, D), draw)
    word = torch.where(step % 2 == 1, high, low)
    return (word >> 16 * (column % 2) & 0xFFFF) >= threshold


def check(
    rows: int,
    D: int,
    dropout_p: float,
    wide: bool,
    launch: norm.Launcher = emulator.launch_norm,
    device: str = "cpu",
) -> None:
    """Every number within what float32 and the rounding of what is stored allow.

    A number goes through a sum over the row (a lane's D / 32, then five exchanges) and about 16
    operations more, each of which errs by 2^-24 of the largest number in it. Subtracting the mean
    leaves the error of h behind while h shrinks: hence `grown`.
    """
    dtype = torch.float32 if wide else torch.float16
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, D, generator=draw).half()
    before = (torch.randn(rows, D, generator=draw) + 1).to(dtype)
    weight, bias = (torch.randn(D, generator=draw).to(dtype) for _ in range(2))
    dy = torch.randn(rows, D, generator=draw).to(dtype)
    seed = torch.tensor([SEED]) if dropout_p else None
    there = [t if t is None else t.to(device) for t in (dy, x, before, weight, bias, seed)]
    y, mean, scale = norm.forward(launch, *there[1:], EPS, dropout_p)
    dx, dresidual, sums = norm.backward(launch, *there[:4], mean, scale, there[5], dropout_p)
    got = Both(*(t.cpu() for t in (y, dx, dresidual, *sums)))

    threshold = attention.drop_below(dropout_p)
    keep = kept(rows, D, threshold) * 65536 / (65536 - threshold)
    exact = [t.double().requires_grad_() for t in (x, before, weight, bias)]
    h = exact[0] * keep + exact[1]
    F.layer_norm(h, (D,), *exact[2:], eps=EPS).backward(dy.double())
    want = Both(
        F.layer_norm(h, (D,), *exact[2:], eps=EPS).detach(),
        *(t.grad for t in exact),
    )
    h = h.detach()
    s = 1 / (h.var(1, correction=0, keepdim=True) + EPS).sqrt()
    n = (h - h.mean(1, keepdim=True)) * s
    g = (dy.double() * weight.double()).abs().amax(1, keepdim=True)
    unit = (2 * (D / 32) + 32) * 2**-24
    grown = 1 + h.abs().amax(1, keepdim=True) * s
    most = 1 + n.abs().amax(1, keepdim=True)
    every_row = (rows + 32) * 2**-24 * grown.amax()
    allowed = Both(
        y=unit * (grown * weight.double().abs() + bias.double().abs()),
        dx=unit * s * g * most * most * grown * 2,
        dresidual=unit * s * g * most * most * grown,
        dweight=every_row * (dy.double() * n).abs().sum(0) + unit * grown.amax() * dy.abs().sum(0),
        dbias=every_row * dy.double().abs().sum(0),
    )
    for name, found, expected, bound in zip(Both._fields, got, want, allowed):
        ulp = 2**-11 if found.dtype == torch.float16 else 2**-24
        stored = ulp * expected.abs() + 2**-25 * (found.dtype == torch.float16)
        gap = (found.double() - expected).abs()
        assert (gap <= bound + stored).all(), f"{name} leaves its bound by {gap.max():.2e}"


@pytest.mark.parametrize(("rows", "D", "dropout_p", "wide"), CASES)
def test_it_is_what_float64_says(rows: int, D: int, dropout_p: float, wide: bool) -> None:
    check(rows, D, dropout_p, wide)


def test_the_same_batch_gives_the_same_bits() -> None:
    """Whatever the order of the threads."""
    x, before, dy = (torch.randn(50, 128).half() for _ in range(3))
    weight, seed = torch.ones(128).half(), torch.tensor([5])
    first, second = (
        norm.backward(
            emulator.launch_norm, dy, x, before, weight,
            *norm.forward(emulator.launch_norm, x, before, weight, weight, seed, EPS, 0.1)[1:],
            seed, 0.1,
        )
        for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@ops.add_norm_forward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm.forward(emulator.launch_norm, *arguments)


@ops.add_norm_backward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm.backward(emulator.launch_norm, *arguments)


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
    """As on a T4: through ``cuda.add_norm`` and autograd, beside torch's three operations."""
    launched = []
    monkeypatch.setattr(cuda, "obstacle_to_norm", lambda *_: launched.append(1))
    ours, theirs = operands(), operands()
    draw = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    y = cuda.add_norm(*ours, EPS)
    y.backward(draw)
    assert launched
    assert y.grad_fn.name().startswith("GeneratedBackwardFor_minibert_add_norm")
    expected = F.layer_norm(theirs[0] + theirs[1], (64,), *theirs[2:], eps=EPS)
    expected.backward(draw)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours, theirs):
        half = mine.dtype == torch.float16
        torch.testing.assert_close(mine.grad, other.grad, rtol=2**-10 if half else 1e-4, atol=1e-5)


def test_the_generator_fixes_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "obstacle_to_norm", lambda *_: None)

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return cuda.add_norm(*operands(), EPS, 0.5)

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


def test_where_the_kernels_cannot_run_it_is_torch() -> None:
    """Bit by bit what the plain modules do, dropout's draws included."""
    layer, dropout = nn.LayerNorm(64, eps=EPS), nn.Dropout(0.5)
    y_ND, x_ND = torch.randn(2, 5, 64)
    found = []
    for add_norm in (encoder.add_norm, fused.add_norm):
        torch.manual_seed(3)
        found.append(add_norm(y_ND, x_ND, layer, dropout.train()))
        found.append(add_norm(y_ND, x_ND, layer, dropout.eval()))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert "not cpu" in cuda.obstacle_to_norm(torch.device("cpu"), 768)


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
    def never(_: norm.Launch) -> None:
        raise AssertionError

    empty, weight = torch.empty(0, 64).half(), torch.ones(64).half()
    y, mean, scale = norm.forward(never, empty, empty, weight, weight, None, EPS, 0.0)
    grads = norm.backward(never, empty, empty, empty, weight, mean, scale, None, 0.0)
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
def test_what_the_kernels_do_not_take_is_refused(x: Tensor, before: Tensor) -> None:
    with pytest.raises(ValueError, match="D a multiple of 64 up to 768"):
        norm.forward(lambda _: None, x, before, x[0], x[0], None, EPS, 0.0)


@pytest.mark.parametrize("kernel", ["add_norm", "add_norm_backward", "add_norm_sums"])
def test_parameters_are_those_of_the_source(kernel: str) -> None:
    """Names, order and C types: ctypes packs what the kernels read."""
    steps: list[norm.Launch] = []
    x, seed = torch.zeros(2, 64).half(), torch.tensor([1])
    _, mean, scale = norm.forward(steps.append, x, x, x[0], x[0], seed, EPS, 0.1)
    norm.backward(steps.append, x, x, x, x[0], mean, scale, seed, 0.1)
    parameters = next(step.parameters for step in steps if step.kernel == kernel)
    source = (build.HERE / "norm.cu").read_text()
    declared = re.search(rf"KERNEL\({kernel}, [^(]*\((.*?)\),\n", source, re.S)
    assert declared
    c_types = {"int": "c_int", "float": "c_float", "u32": "c_uint"}
    for text, name, packed in zip(
        declared[1].split(","), parameters, attention.pack(parameters), strict=True
    ):
        words = re.split(r"[\s*]+", text.strip())
        assert words[-1] == name
        assert type(packed).__name__ == ("int" if "*" in text else c_types[words[0]])


FAULTS = {
    "no barrier": ("block_barrier();  // all", "// all", "race|nobody wrote"),
    "no eps": ("/ HIDDEN + eps)", "/ HIDDEN)", "y leaves"),
    "a warp beyond the last row": ("if (row >= rows) return;", "", "outside every tensor"),
    "the mean stays in": ("h[i].low - m, h[i].high - m", "h[i].low, h[i].high", "y leaves"),
    "no mean of g": ("(g[i].low - sum - n", "(g[i].low - n", "dx leaves"),
    "no mean of g n": (".high * product) * s", ".high * 0.f) * s", "dx leaves"),
    "what is kept is not scaled": ("x.low * keep_scale", "x.low", "y leaves"),
    "two steps share bits": ("step % 2 * 32", "0", "y leaves"),
    "no mask in the backward pass": ("dropout.of(dh, row, i)", "dh", "dx leaves"),
    "dbias is dweight": ("HIDDEN * 4, dbias[i]", "HIDDEN * 4, dweight[i]", "dbias leaves"),
    "a row done twice": ("row += blocks * WARPS", "row += blocks", "second time"),
    "a warp forgotten": ("other < WARPS", "other < WARPS - 1", "dweight leaves"),
    "no statistics kept": ("% 32 == 0) {", "% 32 < 0) {", "never written|not written|unwritten"),
    "a block forgotten": ("block < blocks", "block < blocks - 1", "dweight leaves"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, seen = FAULTS[fault]
    text = emulator.source("norm.cu")
    assert text.count(old) == 1
    monkeypatch.setattr(emulator, "source", lambda file: text.replace(old, new))
    with pytest.raises(AssertionError, match=seen):
        check(9, 128, 0.1, True)


@pytest.mark.parametrize("arch", kernel_resources.ARCHITECTURES)
@pytest.mark.parametrize(("D", "wide"), kernel_resources.NORM_VARIANTS)
def test_compiles_without_spills(arch: str, D: int, wide: int) -> None:
    measured = kernel_resources.measure_norm(arch, D, wide)
    assert set(measured) == {"add_norm", "add_norm_backward", "add_norm_sums"}
    assert not any(used.spilled for used in measured.values())
    assert measured["add_norm_backward"].shared == 4 * 2 * D * 4 <= 48 * 1024
