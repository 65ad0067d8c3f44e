"""Peak resident memory of whole processes: tagging, training, and tagging ever larger files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from benchmarks import workload
from benchmarks.child import run_child
from benchmarks.workload import Workload


def test_memory(race: Callable, work: Workload) -> None:
    sides = ["minibert, tag", "minibert int8, tag", "transformers, tag"]
    sides = [*filter(workload.runs_here, sides), "minibert, train", "transformers, train"]
    growing = [f"minibert tag MiniLM, {count} sentences" for count in work.plan.corpora]
    race([*sides, *growing], lambda name: build(name, work), turns=1, warm_up=0)


def build(name: str, work: Workload) -> Callable[[], dict]:
    side, what = name.split(", ")
    if side == "transformers":
        workload.need(side)
    python = [sys.executable, "-m"]
    if what == "train":
        command = [*python, "benchmarks.child", "train", side, work.plan_name]
        return lambda: {"peak_mb": run_child(command)}
    count = work.plan.sentences if what == "tag" else int(what.split()[0])
    file = sentences(count, work)
    directory = work.minilm
    if what == "tag":
        directory = work.folder / "base"
        if not directory.exists():
            work.save(work.ours, directory)
    if side == "transformers":
        command = [*python, "benchmarks.child", "tag", directory, file]
        return lambda: {"peak_mb": run_child(command)}
    command = [*python, "minibert.cli", "tag", directory]
    if side == "minibert int8":
        command += ["--dtype", "int8"]
    found = {} if what == "tag" else {"sentences": count}
    return lambda: found | {"peak_mb": run_child(command, file)}


def sentences(count: int, work: Workload) -> Path:
    """A file of ``count`` sentences, one a line: the test set, repeated."""
    texts = (" ".join(sentence.words) for sentence in work.corpus[1])
    file = work.folder / f"{count}.txt"
    file.write_text("".join(f"{text}\n" for text in islice(cycle(texts), count)))
    return file
