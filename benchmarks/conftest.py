"""The timing harness: pytest-benchmark, with contenders that alternate within one run.

A module ``bench_*.py`` is one part of the benchmark, its test one race:

    def test_latency(race, work):
        race(NAMES, lambda name: build(name, work), work.plan.turns)

``build`` returns the function to time, without arguments; the numbers that it returns are kept.
Run one part with ``python -m pytest benchmarks/bench_latency.py``, all with ``make bench``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from pytest_benchmark.stats import Stats

from benchmarks import gpu_plan
from benchmarks.workload import PLANS, LeftOutError, Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plan", choices=PLANS, default="usual")
    parser.addoption("--model-dir", type=Path, help="a trained MiniLM, as train.py saves it")


@pytest.fixture(scope="session")
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    option = request.config.getoption
    return Workload(option("--plan"), tmp_path_factory.mktemp("bench"), option("--model-dir"))


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> gpu_plan.Plan:
    tiny = request.config.getoption("--plan") == "tiny"
    return gpu_plan.tiny() if tiny else gpu_plan.full()


@pytest.fixture
def race(benchmark) -> Callable[..., dict[Any, dict[str, Any]]]:
    """Time contenders in alternating turns (a b c, a b c, ...): a slow spell hits all of them."""

    def run(
        names: Iterable[Hashable],
        build: Callable[[Any], Callable[[], dict[str, Any] | None]],
        turns: int,
        warm_up: int = 1,
        pause: float = 0.0,  # seconds between turns
    ) -> dict[Any, dict[str, Any]]:
        runs: dict[Hashable, Callable[[], dict[str, Any] | None]] = {}
        for name in names:
            try:
                runs[name] = build(name)
            except LeftOutError as error:
                print(f"left out: {name}: {error}")
        numbers: dict[Hashable, dict[str, Any]] = {}
        order = cycle(runs)

        def turn(name: Hashable) -> None:
            numbers[name] = runs[name]() or {}

        def rest() -> tuple[tuple[Hashable], dict[str, Any]]:
            time.sleep(pause)
            return (next(order),), {}

        benchmark.pedantic(
            turn,
            setup=rest,
            rounds=turns * len(runs),
            warmup_rounds=warm_up * len(runs),
        )
        times = benchmark.stats.stats.data
        rows = {}
        for i, name in enumerate(runs):
            seconds = times[i :: len(runs)]
            rows[name] = {"seconds": seconds, "median_s": median(seconds)} | numbers[name]
        benchmark.extra_info["contenders"] = {str(name): row for name, row in rows.items()}
        return rows

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_group_stats(benchmarks: list[dict[str, Any]]) -> list[tuple[str, list]]:
    """pytest-benchmark's own table: one row per contender instead of one per race."""
    groups = []
    for race in benchmarks:
        rows = []
        for name, row in race["extra_info"]["contenders"].items():
            stats = Stats()
            stats.data = row["seconds"]
            rows.append(race | stats.as_dict() | {"name": name, "fullname": name})
        groups.append((race["name"], rows))
    return groups
