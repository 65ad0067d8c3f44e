"""Launches through NVIDIA's own cuda-core, on a stand-in for the driver: no GPU is needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread

import emulator
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("there is a real driver here", allow_module_level=True)

import fake_driver
from test_kernels_adamw import draw, new_sweep
from test_kernels_attention import KINDS, check, run
from test_kernels_norm import check as check_norm

from minibert.speed.cuda import build, launch, obstacles, ops

fake_driver.library()  # before anything looks for the real one


@pytest.fixture(autouse=True)
def real_enqueue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "enqueue", emulator.enqueue_on_gpu)


def test_what_reaches_the_driver_computes_the_right_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver's array of arguments, as cuda-core packed it, handed to the emulator."""
    machines = []

    def enqueue(work: launch.Launch) -> None:
        machines.append(emulator.machine(work.file, work.defines))
        machines[-1].watch(work)
        emulator.enqueue_on_gpu(work)

    def start(kernel: str, grid: tuple, threads: int, values: object) -> None:
        machines[-1].call(kernel, grid, threads, values)

    monkeypatch.setattr(launch, "enqueue", enqueue)
    with fake_driver.pretend(start) as started:
        check(run([70, 3], head_size=32, dropout_p=0.1))
        check(run([12, 3], head_size=32, dropout_p=0.1))
        check_norm(6, 64, 0.1, True)
        new_sweep().step(draw(), 1e-2)
    names = [f"{kind}_{size}" for size in ("long", "short") for kind in KINDS]
    names += ["add_norm", "add_norm_backward", "add_norm_sums", "adamw"]
    assert [one.kernel for one in started] == names
    assert {one.stream for one in started} == {fake_driver.STREAM}
    assert started[0].grid == (2 * 2, 2, 1)  # two sentences of up to two tiles, two heads
    assert started[0].block == (128, 1, 1)


def one_launch(x: torch.Tensor) -> None:
    launch.enqueue(launch.Launch("any.cu", "one", {}, (3, 2), 32, {"x": x, "n": 5}))


def test_a_launch_goes_to_the_device_of_its_tensors_and_back() -> None:
    class There(torch.Tensor):
        device = torch.device("cuda", 1)

    with fake_driver.pretend() as started:
        one_launch(torch.ones(2))
        one_launch(torch.ones(2).as_subclass(There))
        one_launch(torch.ones(2))
        assert fake_driver.current_device() == 0
    assert [one.device for one in started] == [0, 1, 0]
    assert {(one.grid, one.block) for one in started} == {((3, 2, 1), (32, 1, 1))}


def test_a_new_thread_launches_in_the_context_of_its_device() -> None:
    """As autograd's threads do, in which nothing has been made current."""
    with fake_driver.pretend(device=1) as started:
        thread = Thread(target=one_launch, args=(torch.ones(2),))
        thread.start()
        thread.join()
    assert [one.device for one in started] == [1]


@pytest.mark.parametrize(
    "function", ["cuLibraryLoadData", "cuLibraryGetKernel", "cuLaunchKernelEx"]
)
def test_what_the_driver_refuses_is_an_obstacle(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an exception from the first forward pass."""
    trial = obstacles.try_attention
    cpu = torch.device("cpu")
    monkeypatch.setattr(obstacles, "try_attention", lambda _, *rest: trial(cpu, *rest))
    device = torch.device("cuda", 0)
    try:
        with fake_driver.pretend():
            fake_driver.library().fake_fail(function.encode(), 209)
            obstacles.attention.cache_clear()
            found = obstacles.attention(device, torch.float16, 64)
            assert found.startswith("a first launch fails (CUDAError: CUDA_ERROR_"), found
    finally:
        obstacles.attention.cache_clear()


def test_nvrtc_compiles_beside_the_stand_in() -> None:
    """NVRTC looks for the driver as well, and uses what it finds."""
    code, _ = build.compile_source(build.source("adamw.cu"), "sm_75", {"SEMANTICS": 0})
    assert code.startswith(b"\x7fELF")


def best_ms(run: Callable[[], object], turns: int = 100) -> float:
    """The least processor time of a call, which other processes disturb least."""
    times = []
    for _ in range(turns):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


@pytest.mark.slow
def test_the_hosts_time() -> None:
    """Of our kernels in twelve layers, each with one attention and two norms."""
    q, k, v = torch.randn(3, 8, 2, 32).half().requires_grad_().unbind(0)
    starts, dy = torch.tensor([0, 5, 8], dtype=torch.int32), torch.randn(8, 2, 32).half()
    x = torch.randn(8, 64).half().requires_grad_()
    weight, bias = (torch.randn(64, requires_grad=True) for _ in range(2))

    def layer(dropout_p: float) -> list[torch.Tensor]:
        context = ops.attend(q, k, v, starts, 5, dropout_p)
        return [context, *(ops.add_norm(x, x, weight, bias, 1e-5, dropout_p) for _ in range(2))]

    @torch.no_grad()
    def inference() -> None:
        for _ in range(12):
            layer(0.0)

    def step() -> None:
        outputs = [y for _ in range(12) for y in layer(0.1)]
        gradients = [dy if y.dim() == 3 else x.detach() for y in outputs]
        torch.autograd.grad(outputs, (q, k, v, x, weight, bias), gradients)

    with fake_driver.pretend(count_only=True):
        launches = fake_driver.library().fake_launches
        inference()
        assert launches() == 12 * 3
        step()
        assert launches() == 12 * 3 + 12 * (3 + 2 + 2 * 2)
        found = best_ms(inference), best_ms(step)
    print(f"inference {found[0]:.2f} ms, training step {found[1]:.2f} ms")
    assert found[0] < 3
    assert found[1] < 16
