"""From the shell to the first tagged sentence, with MiniLM: whole processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import peers, stage
from benchmarks.child import run_child
from benchmarks.stage import Place, Plan, Run

INFERENCE, TURNS, WARM_UP = True, 5, 1
SENTENCE = "who directed the frozen station with irene zimmer"
PIPELINE = (
    "import sys, transformers; "
    "tag = transformers.pipeline('token-classification', sys.argv[1], "
    "aggregation_strategy='simple'); print(tag(sys.argv[2]))"
)


def subjects(plan: Plan) -> Sequence[str]:
    return ("ceiling", "minibert", "transformers")  # the ceiling: what both import


def test_startup(found: dict) -> None:
    assert found["peak_mb"] > 0


def build(subject: str, place: Place) -> Run:
    directory = stage.minilm_directory(place.model_dir, place.folder / "minilm")
    peers.need("transformers")
    command = {
        "ceiling": ["-c", "import numpy, torch, tokenizers, safetensors"],
        "minibert": ["-m", "minibert.cli", "tag", directory, SENTENCE],
        "transformers": ["-c", PIPELINE, directory, SENTENCE],
    }[subject]
    return lambda: {"peak_mb": run_child([sys.executable, *command])}
