"""Speed and memory on the CPU at hand, side by side with what people would use instead.

    make bench                                   the usual size, ten to twenty minutes
    make bench-full                              long curves, compiled peers: hours
    python -m benchmarks.bench --plan tiny --output DIR     a rehearsal
    make bench BENCH="--model-dir runs/movie/last"          accuracy of this model, trained

Each part is a module ``bench_*.py`` on pytest-benchmark, run in a process of its own; what it found
is written before the next one begins: ``results/speed-INSTRUCTIONS-DATE.json`` with every single
time, a table, a plot, and the table in README.md. Each part times its ceiling in the same turns as
the rest. What computes in bf16 is left out where the CPU has no instruction for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import report, runs, stage
from minibert.files import MinibertError
from minibert.machine import choose_dtype, native_bf16

PARTS = (
    "inference", "training", "startup", "accuracy", "latency", "adamw", "memory", "profile",
    "attention", "curves",
)  # fmt: skip
MINUTES = {"tiny": 10.0, "usual": 25.0, "full": 300.0}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", choices=MINUTES, default="usual")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--model-dir", type=Path, help="a trained MiniLM, as train.py leaves it")
    parser.add_argument("--minutes", type=float, help="after which no further part begins")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results and README.md")
    options = parser.parse_args(arguments)
    whole = options.plan != "tiny" and set(options.only) == set(PARTS)
    if not whole and options.output is None:
        raise MinibertError("a rehearsal or a part is no result: give --output DIR")
    if options.model_dir is not None and not (options.model_dir / "config.json").is_file():
        raise MinibertError(f"{options.model_dir}: no config.json: name what train.py saved")
    began = time.monotonic()
    result: dict[str, Any] = {
        "plan": options.plan,
        "cpu": cpu(),
        "load_before": os.getloadavg(),
        "model": str(options.model_dir.name) if options.model_dir else None,
        "parts": {},
        "left_out": {},
    }
    minutes = options.minutes or MINUTES[options.plan]
    for part in options.only:
        spent = (time.monotonic() - began) / 60
        if spent > minutes:
            result["left_out"][part] = f"{spent:.1f} minutes were over"
            continue
        print(f"\n== {part} (after {spent:.1f} minutes)", flush=True)
        rows, failure = run_part(part, options.plan, options.model_dir)
        if rows:
            result["parts"][part] = rows
            print(report.part_table(part, rows), flush=True)
        if failure:
            result["left_out"][part] = failure
            print(failure, file=sys.stderr, flush=True)
        result["load_after"] = os.getloadavg()
        result["minutes"] = round((time.monotonic() - began) / 60, 1)
        write(result, options.output)
    if result["parts"] and result["left_out"]:  # perhaps after the last part was written
        write(result, options.output)
    return 1 if result["left_out"] else 0


def run_part(part: str, plan: str, model_dir: Path | None) -> tuple[dict[str, Any], str | None]:
    """One module: for each subject its seconds and what else it found; and why it failed, if so."""
    with TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        command = [
            sys.executable, "-m", "pytest", f"benchmarks/bench_{part}.py", "-q", "-o", "addopts=",
            "-p", "no:cacheprovider", "-rsf", "--tb=short", "--benchmark-quiet",
            f"--benchmark-json={found}", "--plan", plan,
        ]  # fmt: skip
        if model_dir is not None:
            command += ["--model-dir", str(model_dir.resolve())]
        ran = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
        # Warnings of the libraries are long; what was skipped or failed stands at the end.
        print("\n".join(line for line in ran.stdout.splitlines() if line.startswith("SKIPPED")))
        # Where no test passed there is a file, and nothing in it.
        text = found.read_text() if found.exists() else ""
        rows = collected(json.loads(text)["benchmarks"]) if text else {}
        failure = f"exit status {ran.returncode}: {ran.stdout[-1500:]}" if ran.returncode else None
        return rows, failure


def collected(benchmarks: list[dict[str, Any]]) -> dict[str, Any]:
    """The turns of each subject together."""
    rows: dict[str, Any] = {}
    for entry in benchmarks:
        info = dict(entry["extra_info"])
        if "subject" not in info:  # its turn failed
            continue
        subject, _ = info.pop("subject"), info.pop("turn")
        row = rows.setdefault(subject, {"seconds": []})
        row["seconds"].append(entry["stats"]["median"])
        row |= info
    for row in rows.values():
        row["median_s"] = median(row["seconds"])
    return rows


def cpu() -> dict[str, Any]:
    """The processor, its widest instructions, and the format in which ours runs on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(": ")[2] for line in lines if "model name" in line), "unknown")
    choice = choose_dtype("auto", torch.device("cpu"))
    return {
        "model": model,
        "instructions": native_bf16() or torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": stage.OURS,
        "why": choice.reason,
    }


def write(result: dict[str, Any], output: Path | None) -> None:
    """JSON, table and plot; the README's section unless the output goes elsewhere."""
    name = "speed-" + result["cpu"]["instructions"].lower().replace(" ", "-")
    path = runs.keep(name, result, runs.RESULTS if output is None else output)
    report.write(path, json.loads(path.read_text(encoding="utf-8")))
    if output is None:
        report.refresh_readme()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MinibertError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        sys.exit(2)
