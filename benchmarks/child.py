"""Child processes with their peak memory, and what runs in them.

python -m benchmarks.child tag DIR FILE                     with transformers
python -m benchmarks.child train minibert|transformers PLAN
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs import ROOT

# A process inherits the peak of the one that forked it, so a small process must fork.
LAUNCH = (
    "import resource, subprocess, sys; "
    "ran = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(ran.returncode)"
)


def run_child(command: Sequence[str | Path], stdin: Path | None = None) -> float:
    """Run a command; return its peak resident memory in MB.

    Raises:
        RuntimeError: it failed; with the end of its standard error.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, *command]
    with (stdin or Path(os.devnull)).open() as lines:
        ran = subprocess.run(launcher, stdin=lines, capture_output=True, text=True, env=env)
    if ran.returncode:
        raise RuntimeError(f"{command}: exit status {ran.returncode}: {ran.stderr[-600:]}")
    return int(ran.stdout) / 1024  # kB on Linux


def tag(directory: Path, file: Path) -> None:
    """Tag a file with one sentence a line with transformers, sorted by length."""
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
    """Two turns of the training benchmark."""
    from benchmarks import bench_training
    from benchmarks.workload import Workload

    names = {"minibert": bench_training.OURS, "transformers": bench_training.THEIRS_FUSED}
    run = bench_training.build(names[side], Workload(plan_name, Path(), None))
    run()
    run()


if __name__ == "__main__":
    what, first, second = sys.argv[1:]
    if what == "tag":
        tag(Path(first), Path(second))
    else:
        train(first, second)
