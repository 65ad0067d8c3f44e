"""Peak resident memory of whole processes: tagging, training, and tagging ever larger files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle, islice

from benchmarks import peers, stage
from benchmarks.child import run_child
from benchmarks.stage import Place, Plan, Run

INFERENCE, TURNS, WARM_UP = False, 1, 0


def subjects(plan: Plan) -> Sequence[str]:
    return (
        "minibert, tag",
        "transformers, tag",
        "minibert, train",
        "transformers, train",
        *(f"minibert tag MiniLM, {count} sentences" for count in plan.corpora),
    )


def test_memory(found: dict) -> None:
    assert found["peak_mb"] > 0


def build(subject: str, place: Place) -> Run:
    name = place.plan_name
    peers.need("transformers")
    side, what = subject.split(", ")
    child = [sys.executable, "-m", "benchmarks.child", side]
    if what == "train":
        return lambda: {"peak_mb": run_child([*child, "train", name])}
    count = place.plan.sentences if what == "tag" else int(what.split()[0])
    texts = [" ".join(sentence.words) for sentence in stage.corpus(name)[1]]
    file = place.folder / f"{count}.txt"
    file.write_text("".join(f"{text}\n" for text in islice(cycle(texts), count)))
    if what == "tag":
        directory = place.folder / "base"
        if not directory.exists():
            stage.save_model(stage.ours(name), directory)
        return lambda: {"peak_mb": run_child([*child, "tag", directory, file])}
    directory = stage.minilm_directory(place.model_dir, place.folder / "minilm")
    command = [sys.executable, "-m", "minibert.cli", "tag", directory]
    return lambda: {"peak_mb": run_child(command, file), "sentences": count}
