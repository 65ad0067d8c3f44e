"""One-pass AdamW, run from its CUDA source by the emulator, against AdamW in float64."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import emulator
import pytest
import torch
from cuda.core._kernel_arg_handler import ParamHolder
from torch import Tensor, nn

from minibert.speed.cuda import adamw, build, launch
from minibert.training import adamw as optim

SHAPES = [(3,), (70, 64), (adamw.CHUNK,), (adamw.CHUNK + 1,), (2, adamw.CHUNK), ()]
FACTORS = [1.0, 0.5, 1.0, 1.0, 2.0, 1.0]
DECAYS = [0.0, 0.1, 0.01, 0.0, 0.1, 0.0]
BETAS, EPS = (0.9, 0.999), 1e-6


def emulated(sweep: adamw.Sweep, step: adamw.Launch) -> None:
    machine = emulator.Emulator(emulator.source("adamw.cu"), step.defines, "-Og")
    machine.library.emulator_clear_views()
    inputs = (sweep.table, sweep.sizes, sweep.rates, sweep.chunks, sweep.scalars)
    for name, x in zip(("tensors", "sizes", "rates", "chunks", "scalars"), inputs):
        machine.view(name, x, 0)
    for i, x in enumerate(sweep.gradients):
        machine.view(f"gradient {i}", x.flatten(), 0)
    skipped = not sweep.scalars[3]
    for name in ("parameters", "first", "second"):
        for i, x in enumerate(getattr(sweep, name)):
            touched = sweep.addresses[i][1] and not skipped
            machine.view(f"{name} {i}", x.view(-1), 2 if touched else 0)
    holder = ParamHolder(step.parameters)
    count = len(step.parameters)
    machine.run_packed("adamw", (step.blocks, 1), adamw.THREADS, holder, count)


def sweep(semantics: str) -> adamw.Sweep:
    torch.manual_seed(0)
    parameters, first, second = ([torch.randn(shape) for shape in SHAPES] for _ in range(3))
    for x, y in zip(first, second):
        x.zero_()
        y.zero_()
    return adamw.Sweep(
        parameters, first, second, FACTORS, DECAYS, semantics, BETAS, EPS, launch=emulated
    )


class Written:
    """AdamW as published, in float64, with torch's clipping before it."""

    def __init__(self, parameters: list[Tensor], semantics: str) -> None:
        self.parameters = [x.double() for x in parameters]
        self.moments = [[torch.zeros_like(x) for x in self.parameters] for _ in range(2)]
        self.semantics, self.steps = semantics, 0

    def step(self, gradients: list[Tensor | None], lr: float, max_norm: float) -> float:
        norm = sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5
        clip = min(1.0, max_norm / (norm + 1e-6))
        self.steps += 1
        correction1, correction2 = (1 - beta**self.steps for beta in BETAS)
        for p, g, m, v, factor, decay in zip(
            self.parameters, gradients, *self.moments, FACTORS, DECAYS
        ):
            if g is None:
                continue
            rate = lr * factor
            g = g.double() * clip
            m.copy_(BETAS[0] * m + (1 - BETAS[0]) * g)
            v.copy_(BETAS[1] * v + (1 - BETAS[1]) * g * g)
            if self.semantics == "torch":
                p.mul_(1 - rate * decay)
                p.sub_(rate * (m / correction1) / ((v / correction2).sqrt() + EPS))
            elif self.semantics == "transformers":
                p.sub_(rate * correction2**0.5 / correction1 * m / (v.sqrt() + EPS))
                p.mul_(1 - rate * decay)
            else:
                p.sub_(rate * (m / (v.sqrt() + EPS) + decay * p))
        return norm


def close(got: list[Tensor], want: list[Tensor], lr: float, steps: int) -> None:
    """An update is at most a few lr; each of its float32 operations errs by 2^-24 relative, and
    each step rounds the parameter once or twice."""
    for x, y in zip(got, want):
        bound = steps * (2 * 2**-24 * y.abs() + 32 * 2**-24 * 10 * lr)
        assert ((x.double() - y).abs() <= bound).all()


@pytest.mark.parametrize("semantics", ["torch", "transformers", "google"])
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_trajectory(semantics: str, max_norm: float) -> None:
    machine = sweep(semantics)
    written = Written(machine.parameters, semantics)
    steps, lr = 6, 1e-2
    for step in range(steps):
        gradients: list[Tensor | None] = [torch.randn(shape) for shape in SHAPES]
        if step == 2:
            gradients[1] = None
        scale = torch.tensor(1024.0)
        scaled = [None if g is None else g * scale for g in gradients]
        norm = machine.step(scaled, lr, max_norm, scale)
        expected = written.step(gradients, lr, max_norm)
        assert float(norm) == pytest.approx(expected, rel=1e-5)
    close(machine.parameters, written.parameters, lr, steps)


def test_without_clipping_and_scaling_it_is_torch_adamw() -> None:
    machine = sweep("torch")
    parameters = [x.clone().requires_grad_() for x in machine.parameters]
    groups = [
        {"params": [p], "lr": 1e-2 * factor, "weight_decay": decay}
        for p, factor, decay in zip(parameters, FACTORS, DECAYS)
    ]
    reference = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    for _ in range(4):
        gradients = [torch.randn(shape) for shape in SHAPES]
        for p, g in zip(parameters, gradients):
            p.grad = g.clone()
        reference.step()
        machine.step(gradients, 1e-2)
    close(machine.parameters, [p.detach().double() for p in parameters], 1e-2, 2 * 4)


def test_an_overflow_skips_the_step_and_is_not_counted() -> None:
    machine = sweep("torch")
    before = [x.clone() for x in machine.parameters]
    gradients = [torch.ones(shape) for shape in SHAPES]
    gradients[3][7] = float("inf")
    norm = machine.step(gradients, 1e-2, 1.0, torch.tensor(2.0))
    assert not torch.isfinite(norm)
    assert all(torch.equal(x, y) for x, y in zip(machine.parameters, before))
    assert machine.steps == 0


@pytest.mark.parametrize("semantics", ["torch", "transformers", "google"])
@pytest.mark.parametrize("scaled", [True, False])
def test_one_pass_follows_the_plain_optimizer(
    semantics: str, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients to both, an overflow and one that is missing among them."""
    monkeypatch.setattr(adamw, "launch_on_gpu", emulated)
    shapes = [(70, 8), (3,), (adamw.CHUNK + 1,)]
    runs, steps, lr = [], 5, 1e-2
    for kind in (optim.AdamW, optim.OnePassAdamW):
        draw = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
        groups = [optim.Group(parameters[:1], 0.1), optim.Group(parameters[1:], 0.0, 0.5)]
        optimizer = kind(groups, semantics)
        scaler = optim.LossScaler(1024.0, patience=2) if scaled else None
        for step in range(steps):
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=draw)
                parameter.grad = gradient * (scaler.scale if scaler else 1.0)
            if step == 1:
                parameters[1].grad = None
            if step == 3 and scaled:
                parameters[2].grad[5] = float("inf")
            optimizer.clipped_step(lr, 1.0, scaler)
            optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
        optimizer_steps = steps - 1 if scaled else steps
        assert optimizer.steps == optimizer_steps
        if scaler:
            assert (scaler.scale, scaler.good_steps) == (1024.0, 1)  # up, down, one on the way up
        runs.append(parameters)
    plain, one_pass = runs
    close([p.detach() for p in one_pass], [p.detach().double() for p in plain], lr, 2 * steps)


def test_the_gpu_chooses_one_pass_and_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "OnePassAdamW", lambda *_, eps: "one pass")
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_75")
    monkeypatch.setattr(optim, "AdamW", lambda *_, eps: "plain")
    there = [optim.Group([SimpleNamespace(device=torch.device("cuda"))])]
    assert optim.choose_adamw(there, "google").value == "one pass"

    def cubin(*_) -> bytes:
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "cubin", cubin)
    chosen = optim.choose_adamw(there, "google")
    assert chosen.value == "plain"
    assert chosen.reason.endswith("the one-pass kernel cannot run: no compiler")


def test_chunks_are_cut_anew_only_when_other_tensors_have_gradients() -> None:
    machine = sweep("torch")
    gradients: list[Tensor | None] = [torch.randn(shape) for shape in SHAPES]
    machine.step(gradients, 1e-2)
    chunks, table = machine.chunks, machine.table
    machine.step([g.clone() for g in gradients], 1e-2)
    assert machine.chunks is chunks
    assert machine.table is not table
    gradients[4] = None
    machine.step(gradients, 1e-2)
    assert len(machine.chunks) == len(chunks) - 2


def test_gradients_are_not_held_beyond_the_step() -> None:
    machine = sweep("torch")
    gradients: list[Tensor | None] = [torch.randn(shape) for shape in SHAPES]
    watched = [weakref.ref(gradient) for gradient in gradients]
    machine.step(gradients, 1e-2)
    gradients.clear()
    assert not any(reference() is not None for reference in watched)


def test_what_the_kernel_cannot_read_is_refused() -> None:
    x = [torch.zeros(3, 4).T]
    with pytest.raises(ValueError, match="contiguous float32"):
        adamw.Sweep(x, x, x, [1.0], [0.0], "torch", BETAS, EPS)


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("if (at < size) {\n             p[i]", "{\n             p[i]", "outside every tensor"),
        ("* CHUNK;", "* CHUNK / 2;", "second time|after it was updated"),
        ("base < start + CHUNK && ", "", "second time|after it was updated"),
        ("(g[i] - m[i])", "g[i]", "NUMBERS"),
        ("2 * tensor + 1);\n\n", "2 * tensor);\n\n", "NUMBERS"),
    ],
)
def test_planted_faults_are_seen(
    old: str, new: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = emulator.source("adamw.cu")
    assert text.count(old) in (1, 2)
    monkeypatch.setattr(emulator, "source", lambda file: text.replace(old, new, 1))

    def attempt() -> None:
        try:
            test_trajectory("torch", 1.0)
        except emulator.EmulationError:
            raise
        except AssertionError:
            raise AssertionError("NUMBERS") from None

    with pytest.raises(AssertionError, match=seen):
        attempt()


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_compiles_without_spills(arch: str) -> None:
    for semantics in adamw.SEMANTICS.values():
        _, log = build.compile_source(build.source("adamw.cu"), arch, {"SEMANTICS": semantics})
        assert "0 bytes spill stores, 0 bytes spill loads" in log
