"""Turns: how pytest-benchmark times several subjects side by side.

Every test is one turn of one subject, and pytest runs them by turns (a b c, a b c, ...): what slows
the machine down for a while slows all of them down. ``bench.py`` takes the medians over the turns.
A module names its subjects in ``subjects(plan)`` and builds one in ``build(name, place)``, which
returns what is timed: a function of no arguments that gives back numbers to keep, such as the
tokens. ``TURNS`` bounds the turns, ``WARM_UP`` says how many do not count, ``INFERENCE`` whether
gradients are off.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import stage
from benchmarks.peers import MissingError
from benchmarks.stage import PLANS, Place, Run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plan", choices=PLANS, default="usual")
    parser.addoption("--model-dir", type=Path, help="a trained MiniLM, as train.py leaves it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        plan = PLANS[metafunc.config.getoption("--plan")]
        turns = range(min(plan.turns, metafunc.module.TURNS))
        names = [name for name in metafunc.module.subjects(plan) if stage.runs_here(name)]
        metafunc.parametrize(("turn", "subject"), [(t, name) for t in turns for name in names])


class Theatre:
    """The subjects of a module, each built at its first turn and kept."""

    def __init__(self, module: ModuleType, place: Place):
        self.module = module
        self.place = place
        self.runs: dict[str, Run] = {}
        self.began = time.monotonic()

    def run_of(self, subject: str) -> Run:
        if subject not in self.runs:
            try:
                self.runs[subject] = self.module.build(subject, self.place)
            except MissingError as error:
                pytest.skip(str(error))
        return self.runs[subject]


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    option = request.config.getoption
    return Place(option("--plan"), tmp_path_factory.mktemp("bench"), option("--model-dir"))


@pytest.fixture(scope="module")
def theatre(request: pytest.FixtureRequest, place: Place) -> Theatre:
    return Theatre(request.module, place)


@pytest.fixture
def found(benchmark, theatre: Theatre, turn: int, subject: str) -> dict[str, Any]:
    """Time one turn of a subject; the first may be preceded by some that do not count."""
    module = theatre.module
    spent = time.monotonic() - theatre.began
    if turn > 1 and spent > theatre.place.plan.seconds:
        pytest.skip(f"{spent:.0f} s spent on this part")
    with torch.inference_mode(module.INFERENCE):
        run = theatre.run_of(subject)
        benchmark.group = module.__name__.rpartition("bench_")[2]
        numbers = benchmark.pedantic(run, warmup_rounds=0 if turn else module.WARM_UP)
    benchmark.extra_info |= {"subject": subject, "turn": turn} | numbers
    return numbers
