"""The kernels as torch operators, the ladder, and the launch: everything of it a CPU can show.

The operators' CPU side is the emulator, so what runs here is the registration, the arguments and
the CUDA source that run on a GPU.
"""

from __future__ import annotations

import contextlib
import re
import sys
from types import SimpleNamespace
from typing import Any

import attention_reference
import cuda.core
import emulator
import pytest
import torch
from cuda.core._kernel_arg_handler import ParamHolder
from test_kernels import check, run
from torch import Tensor

from minibert.speed import cuda
from minibert.speed.cuda import attention, build, ladder, launch, ops

LENGTHS = [5, 17, 9]
STARTS = torch.tensor([0, 5, 22, 31], dtype=torch.int32)


@ops.forward.register_kernel("cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return attention.forward(emulator.launch, *arguments)


@ops.backward.register_kernel("cpu")
def _(*arguments: Any) -> Tensor:
    return attention.backward(emulator.launch, *arguments)


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4: the ladder ends at the project's kernels."""
    rung = ladder.Rung("own kernels", "the test says so")
    monkeypatch.setattr(ladder, "choose", lambda *_: rung)


def product(head_size: int = 32) -> Tensor:
    return torch.randn(31, 3, 2, head_size).half().requires_grad_()


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
    expected = attention_reference.attention(qkv.detach(), d_context, LENGTHS)
    assert ((context - expected.context).abs() <= expected.context_bound).all()
    assert ((qkv.grad - expected.grad).abs() <= expected.grad_bound).all()


@pytest.mark.usefixtures("own_kernels")
def test_a_padded_batch_is_its_sentences_and_zeros() -> None:
    """Right padding, left padding, a hole, and a row that is all padding; gradients too."""
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
    expected = attention_reference.attention(qkv.detach()[tokens], d_context[tokens], lengths)
    assert ((context[tokens] - expected.context).abs() <= expected.context_bound).all()
    assert ((qkv.grad[tokens] - expected.grad).abs() <= expected.grad_bound).all()
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
def test_the_generator_fixes_the_mask() -> None:
    qkv = product().detach()

    def attend(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return cuda.attend_packed(*qkv.unbind(1), STARTS, 17, 0.5)

    assert torch.equal(attend(1), attend(1))
    assert not torch.equal(attend(1), attend(2))


@pytest.mark.usefixtures("own_kernels")
def test_without_dropout_no_random_number_is_drawn() -> None:
    qkv = product().detach().unbind(1)
    state = torch.get_rng_state()
    cuda.attend_packed(*qkv, STARTS, 17)
    assert torch.equal(torch.get_rng_state(), state)
    cuda.attend_packed(*qkv, STARTS, 17, 0.1)
    assert not torch.equal(torch.get_rng_state(), state)


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
    qkv = product()
    context, _ = torch.ops.minibert.attention(*qkv.unbind(1), STARTS, None, 17, 0.0)
    (grad,) = torch.autograd.grad(context.float().square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.float().sum().backward()


def test_parameters_are_those_of_the_source() -> None:
    """Names, order and C types: ctypes packs what the kernels read."""
    source = (build.HERE / "problem.cuh").read_text()
    declared = re.search(r"#define PROBLEM_PARAMETERS\s*\\\s*\((.*?)\)\n", source, re.S)
    assert declared
    parameters = declared[1].replace("\\", " ").split(",")
    names = [re.split(r"[\s*]+", parameter.strip())[-1] for parameter in parameters]
    assert tuple(names) == attention.Problem._fields
    passed = re.search(r"Problem \{(.*?)\}", source.split("#define PROBLEM ")[1], re.S)
    assert passed
    assert [name.strip() for name in passed[1].replace("\\", " ").split(",")] == names

    example = attention.Problem(*[None] * 12, *[1] * 7, 0.5, 1.0, 3)  # type: ignore[arg-type]
    c_types = {"int": "c_int", "float": "c_float", "u32": "c_uint"}
    for parameter, packed in zip(parameters, attention.pack(example._asdict())):
        kind = parameter.strip().split(" ")[0]
        expected = "int" if "*" in parameter else c_types[kind]
        assert type(packed).__name__ == expected, parameter


def test_launch_hands_the_driver_what_the_emulator_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch on a GPU with the driver replaced: same kernel, grid and bytes of parameters."""
    enqueued = []

    def enqueue(stream: Any, config: Any, kernel: Any, *parameters: Any) -> None:
        assert stream.__cuda_stream__() == (0, 99)
        name, arch, defines = kernel
        assert arch == "sm_75"
        machine = emulator.emulator(defines["HEAD_SIZE"], defines["DROPOUT"])
        machine.run_packed(name, config.grid[:2], config.block[0], ParamHolder(parameters), 22)
        enqueued.append(name)

    def load(file: str, arch: str, defines: dict[str, int]) -> Any:
        assert file == "attention.cu"
        return SimpleNamespace(get_kernel=lambda name: (name, arch, defines))

    current = []
    device = SimpleNamespace(set_current=lambda: current.append(True))
    monkeypatch.setattr(cuda.core, "Device", lambda index: device)
    monkeypatch.setattr(cuda.core, "launch", enqueue)
    monkeypatch.setattr(launch, "load", load)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    stream = SimpleNamespace(cuda_stream=99)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    launch._kernel.cache_clear()

    def watched(step: attention.Launch) -> None:
        machine = emulator.emulator(step.defines["HEAD_SIZE"], step.defines["DROPOUT"])
        machine.watch(step)
        launch.launch(step)

    check(run([70, 3], head_size=32, dropout_p=0.1, launch=watched))
    assert enqueued == ["forward_long", "backward_q_long", "backward_kv_long"]
    assert len(current) == 3
    launch._kernel.cache_clear()


# ---- the ladder --------------------------------------------------------------------------------

T4, A100, V100 = (7, 5), (8, 0), (7, 0)
LADDER = [
    (T4, torch.float16, 64, "own kernels", "7.5, float16, head size 64"),
    (T4, torch.float16, 32, "own kernels", "head size 32"),
    (T4, torch.float16, 48, "torch efficient", r"head sizes \(32, 64\), not 48"),
    (T4, torch.float32, 64, "torch efficient", "float16, not float32"),
    (V100, torch.float16, 64, "torch efficient", "capability 7.5, this is 7.0"),
    (A100, torch.float16, 64, "torch flash", "8.0 has cp.async"),
    (A100, torch.bfloat16, 64, "torch flash", "8.0 has cp.async"),
    (A100, torch.float32, 64, "torch efficient", "float16, not float32"),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that a GPU of this capability is there."""

    def pretend(capability: tuple[int, int], flash: bool = True) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
        monkeypatch.setattr(build, "cubin", lambda *_: b"")
        ladder.choose.cache_clear()
        return torch.device("cuda", 0)

    yield pretend
    ladder.choose.cache_clear()


@pytest.mark.parametrize(("capability", "dtype", "head_size", "name", "reason"), LADDER)
def test_ladder(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_size: int,
    name: str,
    reason: str,
    gpu: Any,
) -> None:
    rung = cuda.choose(gpu(capability), dtype, head_size)
    assert rung.name == name
    assert re.search(reason, rung.reason)
    assert rung.name in ladder.RUNGS


def test_own_kernels_stand_in_for_a_missing_flash(gpu: Any) -> None:
    assert cuda.choose(gpu(A100, flash=False), torch.float16, 64).name == "own kernels"


def test_a_failed_build_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu(T4)

    def broken(*_: Any) -> bytes:
        raise build.BuildError("no NVRTC here")

    monkeypatch.setattr(build, "cubin", broken)
    rung = cuda.choose(device, torch.float16, 64)
    assert rung.name == "torch efficient"
    assert "no NVRTC here" in rung.reason


def test_a_binary_that_nothing_can_launch_is_of_no_use(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once and kept, but cuda-core has been uninstalled since."""
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    rung = cuda.choose(gpu(T4), torch.float16, 64)
    assert rung.name == "torch efficient"
    assert "pip install 'minibert[cuda]'" in rung.reason


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "message"),
    [
        (T4, torch.bfloat16, 64, "bfloat16 needs compute capability 8.0, .* 7.5: use float16"),
        (A100, torch.float64, 64, "does not compute in torch.float64"),
        (A100, torch.float16, 20, "multiple of 8 up to 256, not 20"),
    ],
)
def test_what_no_rung_can_do_is_an_error(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, message: str, gpu: Any
) -> None:
    with pytest.raises(cuda.FusedUnavailableError, match=message):
        cuda.choose(gpu(capability), dtype, head_size)


def test_on_a_cpu_fused_is_an_error_that_names_the_alternatives() -> None:
    q, k, v = product().unbind(1)
    with pytest.raises(cuda.FusedUnavailableError, match=r"not cpu: use .*'sdpa' or 'eager'"):
        cuda.attend_packed(q, k, v, STARTS, 17)


@pytest.mark.parametrize("name", ["torch efficient", "torch flash"])
def test_the_rungs_of_torch_are_called_as_torch_declares_them(name: str) -> None:
    """Shape and autograd node only: their kernels exist on GPUs alone."""
    qkv = product(64).detach().to("meta").requires_grad_()
    context = ladder.RUNGS[name](*qkv.unbind(1), STARTS.to("meta"), 17, 0.1)
    assert context.shape == (31, 2, 64)
    assert context.requires_grad
