"""One-pass AdamW against the plain one in float64, run from its CUDA source by the emulator."""

from __future__ import annotations

import math
import weakref

import emulator  # noqa: F401 (gives the kernel a CPU side)
import kernel_reference
import pytest
import torch
from torch import Tensor, nn

from minibert.speed.cuda import adamw
from minibert.training import adamw as optim

SHAPES = [(3,), (70, 64), (adamw.CHUNK,), (adamw.CHUNK + 1,), (2, adamw.CHUNK), ()]
FACTORS = [1.0, 0.5, 1.0, 1.0, 2.0, 1.0]
DECAYS = [0.0, 0.1, 0.01, 0.0, 0.1, 0.0]
BETAS, EPS = (0.9, 0.999), 1e-6


def new_sweep(semantics: str = "torch", device: str = "cpu") -> adamw.Sweep:
    torch.manual_seed(0)
    parameters = draw(device)
    first, second = ([torch.zeros_like(x) for x in parameters] for _ in range(2))
    return adamw.Sweep(parameters, first, second, FACTORS, DECAYS, semantics, BETAS, EPS)


def draw(device: str = "cpu") -> list[Tensor]:
    return [torch.randn(shape).to(device) for shape in SHAPES]


def check_close(got: list[Tensor], want: list[Tensor], lr: float, steps: int) -> None:
    """An update is at most a few lr; each of its float32 operations errs by 2^-24 relative, and
    each step rounds the parameter once or twice."""

    def bounded(x: Tensor) -> kernel_reference.Bounded:
        return x, steps * (2 * 2**-24 * x.abs() + 32 * 2**-24 * 10 * lr)

    names = [f"parameter {i}" for i in range(len(want))]
    kernel_reference.check(
        dict(zip(names, got)), {name: bounded(x.double()) for name, x in zip(names, want)}
    )


def check_trajectory(
    semantics: str, max_norm: float, scale: float | None, device: str = "cpu"
) -> None:
    """Against the plain optimiser in float64; one step lacks a gradient."""
    sweep, steps, lr = new_sweep(semantics, device), 6, 1e-2
    parameters = [nn.Parameter(x.double()) for x in sweep.parameters]
    groups = [optim.Group([p], d, f) for p, d, f in zip(parameters, DECAYS, FACTORS)]
    reference = optim.AdamW(groups, semantics, BETAS, EPS)
    for step in range(steps):
        gradients: list[Tensor | None] = [*draw(device)]
        if step == 2:
            gradients[1] = None
        for p, g in zip(parameters, gradients):
            p.grad = None if g is None else g.double()
        scaled = [None if g is None else g * (scale or 1) for g in gradients]
        norm = sweep.step(scaled, lr, step, max_norm, scale)
        assert float(norm) == pytest.approx(float(reference.clipped_step(lr, max_norm)), 1e-5)
    check_close(sweep.parameters, [p.detach().cpu() for p in parameters], lr, steps)


@pytest.mark.parametrize("semantics", adamw.SEMANTICS)
@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1024.0), (1e6, 1024.0), (math.inf, None)])
def test_trajectory(semantics: str, max_norm: float, scale: float | None) -> None:
    check_trajectory(semantics, max_norm, scale)


def test_an_overflow_skips_the_step() -> None:
    sweep = new_sweep()
    before = [x.clone() for x in sweep.parameters]
    gradients = [torch.ones(shape) for shape in SHAPES]
    gradients[3][7] = float("inf")
    norm = sweep.step(gradients, 1e-2, 0, 1.0, 2.0)
    assert not torch.isfinite(norm)
    assert all(map(torch.equal, sweep.parameters, before))


@pytest.mark.parametrize("semantics", adamw.SEMANTICS)
@pytest.mark.parametrize("scaled", [True, False])
def test_one_pass_follows_the_plain_optimizer(semantics: str, scaled: bool) -> None:
    """The same gradients to both, with one overflow and one missing gradient."""
    shapes = [(70, 8), (3,), (adamw.CHUNK + 1,)]
    runs, steps, lr = [], 5, 1e-2
    for kind in (optim.AdamW, optim.OnePassAdamW):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [optim.Group(parameters[:1], 0.1), optim.Group(parameters[1:], 0.0, 0.5)]
        optimizer = kind(groups, semantics)
        scaler = optim.LossScaler(1024.0, patience=2) if scaled else None
        for step in range(steps):
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient * (scaler.scale if scaler else 1.0)
            if step == 1:
                parameters[1].grad = None
            if step == 3 and scaled:
                parameters[2].grad[5] = float("inf")
            optimizer.clipped_step(lr, 1.0, scaler)
            optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
        assert optimizer.steps == (steps - 1 if scaled else steps)
        if scaler:
            assert (scaler.scale, scaler.good_steps) == (1024.0, 1)  # up, down, one on the way up
        runs.append([p.detach() for p in parameters])
    plain, one_pass = runs
    check_close(one_pass, plain, lr, 2 * steps)


def test_chunks_change_only_when_other_tensors_have_gradients() -> None:
    sweep = new_sweep()
    gradients: list[Tensor | None] = [*draw()]
    sweep.step(gradients, 1e-2)
    chunks, table = sweep.chunks, sweep.table.clone()
    sweep.step([g.clone() for g in gradients], 1e-2)
    assert sweep.chunks is chunks
    assert (sweep.table != table).any(0).tolist() == [False, True, False, False]
    gradients[4] = None
    sweep.step(gradients, 1e-2)
    assert len(sweep.chunks) == len(chunks) - 2


def test_gradients_are_not_held_after_the_step() -> None:
    sweep, gradients = new_sweep(), draw()
    watched = [weakref.ref(gradient) for gradient in gradients]
    sweep.step(gradients, 1e-2)
    gradients.clear()
    assert not any(reference() is not None for reference in watched)


def test_what_the_kernel_cannot_read_is_refused() -> None:
    x = [torch.zeros(3, 4).T]
    with pytest.raises(ValueError, match="contiguous float32"):
        adamw.Sweep(x, x, x, [1.0], [0.0], "torch", BETAS, EPS)
