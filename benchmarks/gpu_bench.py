"""Speed on the GPU at hand: the kernels alone, then BERT-base on MIT Movie, in float16.

    make gpu-bench                                      everything
    python -m benchmarks.gpu_bench --only inference     one part
    python -m benchmarks.gpu_bench --tiny               a rehearsal on the CPU that writes nothing

Each part is a pytest-benchmark module in its own process. Contenders alternate within one run;
figures are medians. A large float16 product and a large copy alternate with them: the ceiling, of
which every result is given as a share. The result is one JSON file in benchmarks/results, named by
device and date, written after each part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks import runs
from benchmarks.bench import run_part
from minibert.files import MinibertError

# What pytest gets for each part.
PARTS = {
    "attention": ("gpu_attention",),
    "norm": ("gpu_norm",),
    "inference": ("gpu_models", "-k", "inference"),
    "training": ("gpu_models", "-k", "training"),
}
PACKAGES = (
    "transformers", "tokenizers", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of CUDA and of the packages that matter beside torch; None: not installed."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def gpu() -> dict[str, Any]:
    """Driver, clocks and temperature now, a line for every GPU that nvidia-smi sees.

    Raises:
        MinibertError: nvidia-smi is not there or fails.
    """
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise MinibertError(f"{' '.join(command)}: {error}: it comes with the driver") from None
    return {query: seen.splitlines()}


def add(result: dict[str, Any], part: str, plan: str) -> None:
    """Run a part and add what its tests found."""
    timer = "--benchmark-timer=benchmarks.gpu_plan.clock"
    module, *selection = PARTS[part]
    tests, failure = run_part(module, *selection, "--plan", plan, timer)
    found: dict[str, Any] = {"rows": []}
    for test in tests.values():
        del test["contenders"]
        result.setdefault("ceilings", {})[part] = test.pop("ceiling")
        found = found | test | {"rows": found["rows"] + test["rows"]}
    if found["rows"]:
        result[part] = found
    if failure:
        result.setdefault("left_out", {})[part] = failure
        print(failure, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU, write nothing")
    options = parser.parse_args(arguments)
    parts = (options.only,) if options.only else tuple(PARTS)
    if options.tiny:
        result: dict[str, Any] = {"rehearsal": True, "versions": versions()}
        for part in parts:
            add(result, part, "tiny")
        print(json.dumps(result))
        return 1 if "left_out" in result else 0
    if not torch.cuda.is_available():
        raise MinibertError("no CUDA device here, nothing is measured: --tiny rehearses on a CPU")
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    name = "-".join(filter(None, ["gpu", device, options.only]))
    result = {"versions": versions(), "gpu_before": gpu()}
    result["capability"] = list(torch.cuda.get_device_capability())
    for part in parts:
        print(f"== {part}", flush=True)
        started = time.monotonic()
        add(result, part, "full")
        result.setdefault("seconds", {})[part] = round(time.monotonic() - started)
        result.setdefault("gpu_after", {})[part] = gpu()
        path = runs.keep(name, result)
    print(json.dumps({"written": str(path)} | result.get("ceilings", {})))
    return 1 if "left_out" in result else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MinibertError as problem:
        print(f"gpu_bench: {problem}", file=sys.stderr)
        sys.exit(2)
