"""Processes of their own, watched for their memory; and what runs in them.

python -m benchmarks.child minibert tag DIR FILE
python -m benchmarks.child transformers train DIR PLAN
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs import ROOT

# A process begins with the peak of the one that it was forked from, so that one must be small.
LAUNCH = (
    "import resource, subprocess, sys; "
    "ran = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(ran.returncode)"
)


def run_child(command: Sequence[str | Path], stdin: Path | None = None) -> float:
    """Run a command to its end; its peak resident memory in MB.

    Raises:
        RuntimeError: it failed, with the last lines it wrote to standard error.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, *command]
    with (stdin or Path(os.devnull)).open() as lines:
        ran = subprocess.run(launcher, stdin=lines, capture_output=True, text=True, env=env)
    if ran.returncode:
        raise RuntimeError(f"{command}: exit status {ran.returncode}: {ran.stderr[-600:]}")
    return int(ran.stdout) / 1024  # kB on Linux


def tag(side: str, directory: Path, file: Path) -> None:
    """The sentences of a file, one a line, by the fastest way each side has."""
    if side == "minibert":
        from minibert import Tagger

        with file.open() as lines:
            for _ in Tagger.from_pretrained(directory).tag_texts(lines):
                pass
        return
    import torch
    import transformers

    from minibert.machine import choose_dtype

    model = transformers.AutoModelForTokenClassification.from_pretrained(
        directory, dtype=choose_dtype("auto", torch.device("cpu")).value
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = sorted(file.read_text().splitlines(), key=len)
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, return_tensors="pt")
            model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)


def train(side: str, plan_name: str) -> None:
    """Two turns of the training benchmark, without its ceiling."""
    from benchmarks import bench_training
    from benchmarks.stage import Place

    subject = next(
        name for name in bench_training.subjects(Place(plan_name, Path(), None).plan)
        if name.startswith(side) and (side == "minibert" or "fused" in name)
    )  # fmt: skip
    run = bench_training.build(subject, Place(plan_name, Path(), None))
    run()
    run()


if __name__ == "__main__":
    side, what, *rest = sys.argv[1:]
    if what == "tag":
        tag(side, Path(rest[0]), Path(rest[1]))
    else:
        train(side, rest[0])
