"""The kernels on a GPU; skipped without one.

Results must keep the same bounds as in the emulator. To run under NVIDIA's checker:

    compute-sanitizer --tool memcheck python -m pytest tests/test_gpu_kernels.py -m gpu -k bounds
    compute-sanitizer --tool racecheck python -m pytest tests/test_gpu_kernels.py -m gpu -k bounds
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_kernels_adamw import check_trajectory
from test_kernels_attention import EDGES, check, run
from test_kernels_norm import check as check_norm
from torch import Tensor

from minibert.speed import cuda
from minibert.speed.cuda import adamw, attention, build, ladder, launch, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(lengths: list[int], **options) -> None:
    check(run(lengths, device="cuda", **options))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_size", [64, 32])
@pytest.mark.parametrize("short", [True, False])
def test_bounds_hold(
    head_size: int, dropout_p: float, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 512 if short else 0)
    on_gpu(EDGES, head_size=head_size, dropout_p=dropout_p)
    on_gpu([512, 3, 0, 257], heads=12, head_size=head_size, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(33, 768), (700, 384)])
def test_norm_bounds_hold(rows: int, width: int, wide: bool, dropout_p: float) -> None:
    check_norm(rows, width, dropout_p, wide, "cuda")


@pytest.fixture
def turing_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Load PTX for compute_75, which the driver translates for the present GPU."""
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    known, (major, minor) = driver.cuDriverGetVersion()[1], build.compiler()
    if known < 1000 * major + 10 * minor:
        pytest.skip(f"the driver knows CUDA {known / 1000:.1f}, the PTX is of {major}.{minor}")

    loaded = []

    def load(file: str, arch: str, defines: dict[str, int]) -> ObjectCode:
        code, _ = build.compile_source(build.source(file), "compute_75", defines, "ptx")
        loaded.append(file)
        return ObjectCode.from_ptx(code)

    monkeypatch.setattr(launch, "load", load)
    launch._kernel.cache_clear()
    yield loaded
    launch._kernel.cache_clear()


@pytest.mark.parametrize("head_size", [64, 32])
def test_turing_code_on_a_newer_gpu(head_size: int, turing_code: list[str]) -> None:
    on_gpu([*EDGES, 512], head_size=head_size, dropout_p=0.1)
    on_gpu([12, 9, 33], head_size=head_size, dropout_p=0.1)
    assert turing_code


def test_the_gpu_computes_what_the_emulator_computes() -> None:
    """The same masks, and numbers that differ only as the order of addition allows."""
    here = run([70, 12], dropout_p=0.1)
    there = run([70, 12], dropout_p=0.1, device="cuda")
    difference = (here.context_NHK - there.context_NHK.cpu()).abs()
    assert (difference <= 2**-9 * here.context_NHK.abs() + 2**-12).all()


def test_gradients_are_the_same_in_every_run() -> None:
    first, *others = (run([130, 512, 7], dropout_p=0.1, device="cuda") for _ in range(5))
    for other in others:
        assert torch.equal(first.context_NHK, other.context_NHK)
        assert torch.equal(first.grad_N3HK, other.grad_N3HK)


@pytest.fixture
def packed() -> tuple[Tensor, Tensor]:
    qkv = torch.randn(80, 3, 2, 64, device="cuda").half().requires_grad_()
    return qkv, torch.tensor([0, 12, 80], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck(dropout_p: float, packed: tuple[Tensor, Tensor]) -> None:
    qkv, starts = packed
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(1))
    seed = torch.tensor([7], device="cuda") if dropout_p else None
    arguments = (q, k, v, starts, seed, 68, dropout_p)
    torch.library.opcheck(torch.ops.minibert.attention.default, arguments)


def test_autocast_casts_to_half(packed: tuple[Tensor, Tensor]) -> None:
    qkv, starts = packed
    q, k, v = qkv.detach().float().unbind(1)
    with torch.autocast("cuda", torch.float16):
        context, _ = torch.ops.minibert.attention(q, k, v, starts, None, 68, 0.0)
        assert context.dtype == torch.float16
        assert cuda.attend_packed(q, k, v, starts, 68).dtype == torch.float16


def test_compiles_into_one_graph(packed: tuple[Tensor, Tensor]) -> None:
    qkv, starts = packed

    def step(qkv: Tensor) -> Tensor:
        return ops.attend(*qkv.unbind(1), starts, 68, 0.0) * 2

    assert torch.equal(torch.compile(step, fullgraph=True)(qkv), step(qkv))


def test_a_replayed_graph_draws_a_new_mask(packed: tuple[Tensor, Tensor]) -> None:
    qkv, starts = packed[0].detach(), packed[1]
    ops.attend(*qkv.unbind(1), starts, 68, 0.5)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        context = ops.attend(*qkv.unbind(1), starts, 68, 0.5)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(context.clone())
    assert torch.isfinite(results[0]).all()
    assert not torch.equal(*results)


def test_every_rung_agrees(packed: tuple[Tensor, Tensor]) -> None:
    """torch's variable-length kernels against ours, forward and gradient."""
    qkv, starts = packed
    rungs = ["own kernels", "torch efficient"]
    if torch.cuda.get_device_capability() >= (8, 0):
        rungs.append("torch flash")
    results = []
    for name in rungs:
        context = ladder.RUNGS[name](*qkv.unbind(1), starts, 68, 0.0)
        (grad,) = torch.autograd.grad(context.float().square().sum(), qkv)
        results.append((context, grad))
    for context, grad in results[1:]:
        torch.testing.assert_close(context, results[0][0], rtol=2**-9, atol=2**-10)
        torch.testing.assert_close(grad, results[0][1], rtol=2**-8, atol=2**-7)


def test_the_ladder_runs_what_it_chooses(packed: tuple[Tensor, Tensor]) -> None:
    qkv, starts = packed
    rung = cuda.choose(qkv.device, torch.float16, 64)
    assert rung.name in ladder.RUNGS
    assert cuda.attend_packed(*qkv.unbind(1), starts, 68).shape == (80, 2, 64)


@pytest.mark.parametrize("semantics", adamw.SEMANTICS)
@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1024.0), (None, None)])
def test_one_pass_adamw(semantics: str, max_norm: float | None, scale: float | None) -> None:
    check_trajectory(semantics, max_norm, scale, "cuda")
