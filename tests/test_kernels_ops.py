"""The kernels as torch operators, and which device gets which kernels.

The operators' CPU side is the emulator, so what runs here is the registration, the arguments and
the CUDA source that run on a GPU.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from types import SimpleNamespace

import emulator  # gives the operators a CPU side
import kernel_reference
import pytest
import torch
from torch import Tensor

from minibert.files import MinibertError
from minibert.speed import cuda
from minibert.speed.cuda import build, ladder, launch, obstacles, ops, seeds
from minibert.training import adamw as optim

LENGTHS = [5, 17, 9]
STARTS = torch.tensor([0, 5, 22, 31], dtype=torch.int32)


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4: the ladder ends at the project's kernels."""
    rung = ladder.Rung("own kernels", "the test says so")
    monkeypatch.setattr(ladder, "choose", lambda *_: rung)


def product(head_size: int = 32) -> Tensor:
    return torch.randn(31, 3, 2, head_size).half().requires_grad_()


def check(
    context: Tensor, grad: Tensor, qkv: Tensor, d_context: Tensor, lengths: list[int]
) -> None:
    want = kernel_reference.attention(qkv.detach(), d_context, lengths)
    del want["lse"]
    dq, dk, dv = grad.unbind(1)
    kernel_reference.check({"context": context, "dq": dq, "dk": dk, "dv": dv}, want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck(dropout_p: float) -> None:
    q, k, v = (x.detach().requires_grad_() for x in product().unbind(1))
    seed = torch.tensor([7]) if dropout_p else None
    arguments = (q, k, v, STARTS, seed, 17, dropout_p)
    torch.library.opcheck(torch.ops.minibert.attention.default, arguments)
    context, lse = (x.detach() for x in torch.ops.minibert.attention(*arguments))
    q, k, v = q.detach(), k.detach(), v.detach()
    backward = (torch.ones_like(context), q, k, v, context, lse, *arguments[3:])
    torch.library.opcheck(torch.ops.minibert.attention_backward.default, backward)


@pytest.mark.usefixtures("own_kernels")
def test_gradients_reach_the_packed_product() -> None:
    qkv = product()
    context = cuda.attend_packed(*qkv.unbind(1), STARTS, 17)
    d_context = torch.randn(31, 2, 32).half()
    context.backward(d_context)
    check(context, qkv.grad, qkv, d_context, LENGTHS)


@pytest.mark.usefixtures("own_kernels")
def test_a_padded_batch_is_its_sentences_and_zeros() -> None:
    """Right padding, left padding, a hole, and a row of padding alone; gradients too."""
    mask = torch.tensor(
        [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0] * 5, [1] * 5]
    ).bool()
    tokens = mask.flatten().nonzero()[:, 0]
    starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    qkv = torch.randn(25, 3, 2, 32).half().requires_grad_()
    context = cuda.attend_padded(*qkv.unbind(1), tokens, starts, 5)
    d_context = torch.randn(25, 2, 32).half()
    context.backward(d_context)
    lengths = mask.sum(1).tolist()
    check(context[tokens], qkv.grad[tokens], qkv[tokens], d_context[tokens], lengths)
    padding = ~mask.flatten()
    assert (context[padding] == 0).all()
    assert (qkv.grad[padding] == 0).all()


@pytest.mark.usefixtures("own_kernels")
def test_a_batch_of_padding_alone_gives_zeros() -> None:
    q, k, v = product().unbind(1)
    nothing = torch.zeros(0, dtype=torch.int64)
    context = cuda.attend_padded(q, k, v, nothing, torch.zeros(3, dtype=torch.int32), 15)
    assert (context == 0).all()


@pytest.mark.usefixtures("own_kernels")
def test_the_generator_fixes_the_mask_and_is_used_for_nothing_else() -> None:
    qkv = product().detach().unbind(1)

    def attend(seed: int, dropout_p: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return cuda.attend_packed(*qkv, STARTS, 17, dropout_p), torch.get_rng_state()

    assert torch.equal(attend(1, 0.5)[0], attend(1, 0.5)[0])
    assert not torch.equal(attend(1, 0.5)[0], attend(2, 0.5)[0])
    before = torch.manual_seed(1).get_state()
    assert torch.equal(attend(1, 0.0)[1], before)
    assert not torch.equal(attend(1, 0.1)[1], before)


@pytest.mark.usefixtures("own_kernels")
def test_one_draw_gives_every_mask_of_a_pass_its_own_seed() -> None:
    qkv = product().detach().unbind(1)

    def masks(seed: int) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(seed)
        with seeds.one_draw():
            contexts = [cuda.attend_packed(*qkv, STARTS, 17, 0.5) for _ in range(3)]
        return contexts, torch.get_rng_state()

    (first, state), (again, same) = masks(1), masks(1)
    assert all(map(torch.equal, first, again))
    assert torch.equal(state, same)
    others = [*first, *masks(2)[0]]
    assert not any(torch.equal(a, b) for a, b in combinations(others, 2))
    torch.manual_seed(1)
    torch.randint(2**63 - 1, (seeds.AT_ONCE,))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_lasts_as_long_as_needed() -> None:
    """Not longer than the pass, whose masks the generator fixes."""
    cpu, many = torch.device("cpu"), seeds.AT_ONCE + 1
    torch.manual_seed(1)
    with seeds.one_draw():
        drawn = [int(seeds.draw(cpu)) for _ in range(many)]
    with seeds.one_draw():
        drawn.append(int(seeds.draw(cpu)))
    assert len(set(drawn)) == many + 1
    state = torch.get_rng_state()
    torch.manual_seed(1)
    torch.randint(2**63 - 1, (3 * seeds.AT_ONCE,))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_compiles_into_one_graph(dropout_p: float) -> None:
    def step(qkv: Tensor) -> Tensor:
        return cuda.attend_packed(*qkv.unbind(1), STARTS, 17, dropout_p) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    qkv = product()
    torch.manual_seed(3)
    expected = step(qkv)
    (expected_grad,) = torch.autograd.grad(expected.sum(), qkv)
    torch.manual_seed(3)
    got = compiled(qkv)
    (grad,) = torch.autograd.grad(got.sum(), qkv)
    assert torch.equal(got, expected)
    assert torch.equal(grad, expected_grad)


def test_second_derivatives_are_refused() -> None:
    qkv, x_ND = product(), torch.randn(2, 64, requires_grad=True)
    context = ops.attend(*qkv.unbind(1), STARTS, 17, 0.0)
    y_ND = ops.add_norm(x_ND.half(), x_ND, *torch.ones(2, 64), 1e-5, 0.0)
    for output, leaf in ((context, qkv), (y_ND, x_ND)):
        with pytest.raises(MinibertError, match="no second derivatives"):
            torch.autograd.grad(output.sum(), leaf, create_graph=True)


# ---- which device gets which kernels -----------------------------------------------------------

T4, A100, V100 = (7, 5), (8, 0), (7, 0)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
Gpu = Callable[..., torch.device]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Pretends that there is a GPU of this compute capability."""

    def pretend(capability: tuple[int, int], flash: bool = True) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
        monkeypatch.setattr(build, "cubin", lambda *_: b"")
        for trial in ("try_attention", "try_norm", "try_adamw"):
            monkeypatch.setattr(obstacles, trial, lambda *_: launch.load("", "", {}))
        forget()
        return torch.device("cuda", 0)

    def forget() -> None:
        for cached in (cuda.choose, obstacles.attention, obstacles.norm, obstacles.adamw):
            cached.cache_clear()

    yield pretend
    forget()


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "name", "reason"),
    [
        (T4, F16, 64, "own kernels", "7.5, float16, head size 64"),
        (T4, F16, 32, "own kernels", "head size 32"),
        (T4, F16, 48, "torch efficient", r"head size must be one of \(32, 64\), not 48"),
        (T4, F32, 64, "torch efficient", "dtype must be float16, not float32"),
        (V100, F16, 64, "torch efficient", "capability 7.5 is required, this is 7.0"),
        (A100, F16, 64, "torch flash", "8.0 has cp.async"),
        (A100, BF16, 64, "torch flash", "8.0 has cp.async"),
        (A100, F32, 64, "torch efficient", "dtype must be float16, not float32"),
    ],
)
def test_ladder(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_size: int,
    name: str,
    reason: str,
    gpu: Gpu,
) -> None:
    rung = cuda.choose(gpu(capability), dtype, head_size)
    assert rung.name == name
    assert re.search(reason, rung.reason)
    assert rung.name in ladder.RUNGS


def test_own_kernels_replace_a_missing_flash(gpu: Gpu) -> None:
    assert cuda.choose(gpu(A100, flash=False), F16, 64).name == "own kernels"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "message"),
    [
        (T4, BF16, 64, "bfloat16 needs compute capability 8.0, .* 7.5: use float16"),
        (A100, torch.float64, 64, "does not support torch.float64"),
        (A100, F16, 20, "multiple of 8 up to 256, not 20"),
    ],
)
def test_what_no_rung_can_do_is_an_error(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, message: str, gpu: Gpu
) -> None:
    with pytest.raises(cuda.FusedUnavailableError, match=message):
        cuda.choose(gpu(capability), dtype, head_size)


def test_on_a_cpu_fused_is_an_error_that_names_the_alternatives() -> None:
    q, k, v = product().unbind(1)
    with pytest.raises(cuda.FusedUnavailableError, match=r"not cpu: use .*'sdpa' or 'eager'"):
        cuda.attend_packed(q, k, v, STARTS, 17)


@pytest.mark.parametrize("name", ["torch efficient", "torch flash"])
def test_the_rungs_of_torch_are_called_as_torch_declares_them(name: str) -> None:
    """Shape and autograd node only: their kernels need a GPU."""
    qkv = product(64).detach().to("meta").requires_grad_()
    context = ladder.RUNGS[name](*qkv.unbind(1), STARTS.to("meta"), 17, 0.1)
    assert context.shape == (31, 2, 64)
    assert context.requires_grad


OBSTACLES: dict[str, Callable[[torch.device], str | None]] = {
    "attention": lambda device: obstacles.attention(device, F16, 64),
    "norm": lambda device: obstacles.norm(device, 768, F32),
    "adamw": lambda device: obstacles.adamw(device, "google"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=OBSTACLES)
def test_obstacles(
    obstacle: Callable[[torch.device], str | None], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reason why kernels cannot run, a binary that nothing can launch among them."""

    def refused(*_: object) -> None:
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU:\nno image")

    def broken(*_: object) -> bytes:
        raise build.BuildError("no NVRTC here")

    assert obstacle(gpu(T4)) is None
    assert obstacle(torch.device("cpu")) == "a CUDA device is required, not cpu"
    assert obstacle(gpu(V100)) == "compute capability 7.5 is required, this is 7.0"
    device = gpu(T4)
    with monkeypatch.context() as patch:
        patch.setattr(build, "cubin", broken)
        assert obstacle(device) == "no NVRTC here"
    device = gpu(T4)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "load", refused)
        want = "a first launch fails (RuntimeError: CUDA_ERROR_NO_BINARY_FOR_GPU: no image)"
        assert obstacle(device) == want
    device = gpu(T4)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "pip install '.[cuda]'" in obstacle(device)


def test_widths_that_add_norm_does_not_support_are_an_obstacle(gpu: Gpu) -> None:
    for width in (96, 832):
        assert f"up to 768, not {width}" in obstacles.norm(gpu(T4), width, F32)


CPU = torch.device("cpu")
TRIALS: dict[str, tuple[Callable[[], None], str, str]] = {
    "attention": (lambda: obstacles.try_attention(CPU, 32, 0.25), "delta[r] =", "delta[r] = 2 *"),
    "norm": (lambda: obstacles.try_norm(CPU, 64, F32, 0.25), "sum - n[i]", "sum + n[i]"),
    "AdamW": (lambda: obstacles.try_adamw(CPU, "google"), "+ decay *", "- 64 * decay *"),
}


@pytest.mark.parametrize(("trial", "right", "wrong"), TRIALS.values(), ids=TRIALS)
def test_a_trial_accepts_the_kernels_and_sees_a_fault(
    trial: Callable[[], None], right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial()
    source = emulator.source

    def faulty(file: str) -> str:
        text = source(file)
        assert right in text
        return text.replace(right, wrong)

    monkeypatch.setattr(emulator, "source", faulty)
    with pytest.raises(ArithmeticError, match="differs from float64"):
        trial()


@pytest.mark.parametrize("semantics", ["torch", "transformers"])
def test_the_other_updates_pass_their_trial(semantics: str) -> None:
    obstacles.try_adamw(CPU, semantics)


def test_the_gpu_gets_one_pass_adamw_or_a_reason(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(optim, "OnePassAdamW", lambda *_, eps: made.append("one pass"))
    monkeypatch.setattr(optim, "AdamW", lambda *_, eps: made.append("plain"))
    groups = [optim.Group([SimpleNamespace(device=gpu(T4))])]
    assert "the CUDA kernel" in optim.choose_adamw(groups, "google").reason
    gpu(V100)
    reason = optim.choose_adamw(groups, "google").reason
    assert reason.endswith("cannot run: compute capability 7.5 is required, this is 7.0")
    assert made == ["one pass", "plain"]
