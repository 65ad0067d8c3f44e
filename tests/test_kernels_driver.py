"""Launches through NVIDIA's own cuda-core, on a stand-in for the driver: no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Thread
from types import SimpleNamespace

import emulator
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("there is a real driver here", allow_module_level=True)

from test_kernels_adamw import draw, new_sweep
from test_kernels_attention import KINDS, check, run
from test_kernels_norm import check as check_norm

from benchmarks import gpu_host
from minibert.speed.cuda import build, launch, obstacles
from minibert.speed.cuda_graphs import Recorder
from tests import fake_driver

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
    names += ["add_norm", "add_norm_backward", "add_norm_sums", "squares", "adamw"]
    assert [one.kernel for one in started] == names
    assert {one.stream for one in started} == {fake_driver.STREAM}
    assert started[0].grid == (2 * 2, 2, 1)  # two sentences of up to two tiles, two heads
    assert started[0].block == (128, 1, 1)


def one_launch(x: torch.Tensor) -> None:
    launch.enqueue(launch.Launch("any.cu", "one", {}, (3, 2), 32, {"x": x}, {"n": 5}))


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


def test_what_a_pass_asks_of_the_host() -> None:
    """Twelve layers, each with one attention and two norms."""
    with gpu_host.a_gpu():
        inference = gpu_host.count(gpu_host.kernels(training=False))
        step = gpu_host.count(gpu_host.kernels(training=True))
        replayed = gpu_host.count(gpu_host.replayed_step())
    # Only the results, and what the kernels keep for the backward pass.
    assert inference == (12 * 3, 12 * (2 + 2 * 3), 12 * (2 + 2 * 3), 0)
    assert (step.launches, step.streams) == (12 * (1 + 2 + 2 * (1 + 2)), 0)
    # Also the gradients, and two tensors that one kernel writes for the next.
    assert step.allocations == 12 * (2 + 2 + 2 * (3 + 4))
    # The update: the squares of the gradients into one tensor, then all in one launch.
    assert (replayed.launches, replayed.allocations) == (2, 1)


def test_a_capture_gets_the_launches_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder of CUDA graphs, with torch's graphs and streams replaced.

    Three passes on another stream come first: they load the kernels, and draw nothing that the
    captured one would have drawn.
    """
    current, drawn = [fake_driver.STREAM], []

    @contextmanager
    def on(number: int) -> Iterator[None]:
        current.append(number)
        yield
        current.pop()

    def stream(number: int) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=number, wait_stream=lambda _: None)

    def run_pass() -> torch.Tensor:
        one_launch(torch.ones(2))
        drawn.append(float(torch.rand(1)))
        return torch.ones(3)

    graph = SimpleNamespace(replay=lambda: None)
    with fake_driver.pretend() as started, monkeypatch.context() as patch:
        for name, value in {
            "Stream": lambda: stream(2),
            "stream": lambda stream: on(stream.cuda_stream),
            "current_stream": lambda _=None: stream(current[-1]),
            "device": lambda _: nullcontext(),
            "CUDAGraph": lambda: graph,
            "graph": lambda captured, pool: on(3 if captured is graph and pool == "pool" else -1),
            "graph_pool_handle": lambda: "pool",
            "get_rng_state": lambda _: None,
            "set_rng_state": lambda *_: None,
        }.items():
            patch.setattr(torch.cuda, name, value)
        recording = Recorder(torch.device("cuda", 0))(run_pass)
    assert [one.stream for one in started] == [2, 2, 2, 3]
    assert drawn[3] == drawn[0]
    assert recording.replay is graph.replay
    assert torch.equal(recording.result, torch.ones(3))
