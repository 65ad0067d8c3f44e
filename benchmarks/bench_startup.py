"""From the shell to the first tagged sentence, with MiniLM: whole processes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks import workload
from benchmarks.child import run_child
from benchmarks.workload import Workload

SENTENCE = "who directed the frozen station with irene zimmer"
PIPELINE = (
    "import sys, transformers; "
    "tag = transformers.pipeline('token-classification', sys.argv[1], "
    "aggregation_strategy='simple'); print(tag(sys.argv[2]))"
)


def test_startup(race: Callable, work: Workload) -> None:
    commands = {
        "ceiling": ["-c", "import numpy, torch, tokenizers, safetensors"],  # what both import
        "minibert": ["-m", "minibert.cli", "tag", work.minilm, SENTENCE],
        "minibert int8": ["-m", "minibert.cli", "tag", work.minilm, SENTENCE, "--dtype", "int8"],
        "transformers": ["-c", PIPELINE, work.minilm, SENTENCE],
    }

    def build(name: str) -> Callable[[], dict]:
        if name == "transformers":
            workload.need(name)
        return lambda: {"peak_mb": run_child([sys.executable, *commands[name]])}

    race(filter(workload.runs_here, commands), build, work.plan.turns)
