"""Training runs as subprocesses, and results as dated files."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from minibert.files import write_text
from minibert.machine import choose_device, choose_dtype, name_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def train(output: Path, *arguments: str) -> tuple[list[dict], float]:
    """Run train.py; returns its ``metrics.jsonl`` and the seconds it took."""
    started = time.perf_counter()
    command = [sys.executable, ROOT / "train.py", "--output", output, *arguments]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], seconds


def machine() -> dict:
    """What a run ran on."""
    device = choose_device()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": name_of(choose_dtype("auto", device).value),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep(name: str, result: dict, folder: Path = RESULTS) -> Path:
    """Write ``NAME-DATE.json`` into the folder."""
    today = datetime.date.today().isoformat()
    path = folder / f"{name}-{today}.json"
    write_text(path, json.dumps({"date": today, "machine": machine()} | result, indent=2) + "\n")
    return path


def replace_section(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a page."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise SystemExit(f"{page}: put <!-- {name} --> and <!-- /{name} --> around the section")
    write_text(page, f"{before}{mark}{text.rstrip()}\n{end}{after}")
