"""Speed and memory on this CPU, beside the libraries one would use instead.

    make bench                                              ten to twenty minutes
    make bench-full                                         long curves, compiled peers: hours
    python -m benchmarks.bench --plan tiny --output DIR     a rehearsal
    make bench BENCH="--model-dir runs/movie/last"          with the accuracy of a trained model

Each part is a pytest-benchmark module ``bench_*.py`` in its own process, in which contenders and
the machine's ceiling alternate. The result is ``results/speed-INSTRUCTIONS-DATE.json`` with every
time, written after each part; README.md and docs/speed.md are generated from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import report, runs, workload
from benchmarks.report import PARTS
from minibert.files import MinibertError
from minibert.machine import choose_dtype, native_bf16


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", choices=workload.PLANS, default="usual")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--model-dir", type=Path, help="a trained MiniLM, as train.py saves it")
    parser.add_argument("--output", type=Path, help="write here, and change no document")
    options = parser.parse_args(arguments)
    whole = options.plan != "tiny" and set(options.only) == set(PARTS)
    if not whole and options.output is None:
        raise MinibertError("a rehearsal or a part is not a result: give --output DIR")
    if options.model_dir is not None and not (options.model_dir / "config.json").is_file():
        raise MinibertError(f"{options.model_dir}: no config.json: give a directory of train.py")
    began = time.monotonic()
    result: dict[str, Any] = {
        "plan": options.plan,
        "cpu": cpu(),
        "load_before": os.getloadavg(),
        "model": options.model_dir.name if options.model_dir else None,
        "parts": {},
        "left_out": {},
    }
    flags = ["--plan", options.plan]
    if options.model_dir is not None:
        flags += ["--model-dir", str(options.model_dir.resolve())]
    for part in options.only:
        print(f"\n== {part}", flush=True)
        tests, failure = run_part(f"bench_{part}", *flags)
        if tests:
            result["parts"][part] = tests[f"test_{part}"]["contenders"]
            print(report.Part(result, part).table(), flush=True)
        if failure:
            result["left_out"][part] = failure
            print(failure, file=sys.stderr, flush=True)
        result["load_after"] = os.getloadavg()
        result["minutes"] = round((time.monotonic() - began) / 60, 1)
        if result["parts"]:
            name = "speed-" + result["cpu"]["instructions"].lower().replace(" ", "-")
            runs.keep(name, result, options.output or runs.RESULTS)
    if result["parts"] and options.output is None:
        report.refresh()
    return 1 if result["left_out"] else 0


def run_part(module: str, *flags: str) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Run a module with pytest; what each test found, and why it failed if it did."""
    with TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        command = [
            sys.executable, "-m", "pytest", f"benchmarks/{module}.py", "-q", "-s", "--tb=short",
            "-p", "no:cacheprovider", "--benchmark-quiet", f"--benchmark-json={found}", *flags,
        ]  # fmt: skip
        ran = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
        for line in ran.stdout.splitlines():
            if line.startswith("left out: "):
                print(line, file=sys.stderr)
        text = found.read_text() if found.exists() else ""
    tests = json.loads(text)["benchmarks"] if text else []
    said = ran.stdout[-1500:] + ran.stderr[-500:]
    failure = f"exit status {ran.returncode}: {said}" if ran.returncode else None
    return {test["name"]: test["extra_info"] for test in tests}, failure


def cpu() -> dict[str, Any]:
    """The CPU, its widest instructions, and minibert's default format on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(": ")[2] for line in lines if "model name" in line), "unknown")
    return {
        "model": model,
        "instructions": native_bf16() or torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": workload.OURS,
        "why": choose_dtype("auto", workload.CPU).reason,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MinibertError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        sys.exit(2)
