"""Times on the GPU at hand: attention alone, then BERT-base on MIT Movie, float16.

    make gpu-bench                                      everything
    python -m benchmarks.gpu_bench --only attention     without the models
    python -m benchmarks.gpu_bench --tiny               a rehearsal on the CPU that writes nothing

Ceiling first: the tensor cores' float16 rate and the memory's bandwidth are measured by one large
product and one large copy, and every time is also given as TFLOP/s or as a share of that ceiling.
What is compared runs by turns in one process; the figures are medians. The result is one JSON file
under benchmarks/results, named by device and date, with driver, versions and clocks in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from benchmarks import runs
from benchmarks.gpu_attention import BATCHES, attention_alone
from benchmarks.gpu_models import Ceiling, Plan, models
from benchmarks.timing import interleaved
from minibert.files import MinibertError


def full() -> Plan:
    """Everything, on the GPU."""
    return Plan(
        device=torch.device("cuda", torch.cuda.current_device()),
        dtype=torch.float16,
        attn="fused",
        corpus="mit_movie",
        checkpoint="bert-base-cased",
        shape={},
        test_sentences=None,
        steps=40,
        lengths={name: lengths for name, lengths in BATCHES.items() if name.isdecimal()},
        rounds=9,
    )


def tiny() -> Plan:
    """The same code on next to nothing, in float32 on a CPU."""
    shape = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64
    }  # fmt: skip
    return Plan(
        device=torch.device("cpu"),
        dtype=torch.float32,
        attn="sdpa",
        corpus="demo",
        checkpoint=None,
        shape=shape,
        test_sentences=40,
        steps=6,
        lengths={"8": [8] * 4},
        rounds=2,
    )


def versions() -> dict[str, str | None]:
    """Of what the numbers depend on, beside torch and Python; None: not installed."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for name in ("transformers", "tokenizers", "cuda-core"):
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


def ceiling(plan: Plan, side: int, copied: int) -> Ceiling:
    """TFLOP/s of a side x side x side product; GB/s of a copy, read and written."""
    a, b = torch.randn(2, side, side, device=plan.device).to(plan.dtype)
    source = torch.empty(copied, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    steps = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = interleaved(steps, 4 * plan.rounds, plan.device, warm_up=5)
    return Ceiling(
        product_tflops=2 * side**3 / median(times["product"]) / 1e9,
        copy_gb_s=2 * copied / median(times["copy"]) / 1e6,
    )


def measure(plan: Plan, batches: dict[str, list[int]], only: str | None) -> dict[str, Any]:
    """The parts asked for, ceiling first."""
    large = plan.device.type == "cuda"
    top = ceiling(plan, 4096 if large else 64, 2**28 if large else 2**16)
    result: dict[str, Any] = {"ceiling": top._asdict()}
    print(result, file=sys.stderr)
    if only != "models":
        result["attention"] = attention_alone(batches, plan.device, plan.dtype, plan.rounds)
    if only != "attention":
        result["models"] = models(plan, top)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("attention", "models"))
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU, write nothing")
    options = parser.parse_args(arguments)
    if options.tiny:
        rehearsed = measure(tiny(), {"mixed": [3, 9, 5], "8": [8, 8]}, options.only)
        print(json.dumps({"rehearsal": True, "versions": versions()} | rehearsed))
        return
    if not torch.cuda.is_available():
        raise MinibertError("no CUDA device here, nothing is measured: --tiny rehearses on a CPU")
    result: dict[str, Any] = {"versions": versions(), "gpu_before": gpu()}
    result |= {"capability": list(torch.cuda.get_device_capability())}
    result |= measure(full(), BATCHES, options.only)
    result["gpu_after"] = gpu()
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    part = f"-{options.only}" if options.only else ""
    path = runs.keep(f"gpu-{device}{part}", result)
    print(json.dumps({"written": str(path)} | result["ceiling"]))


if __name__ == "__main__":
    try:
        main()
    except MinibertError as problem:
        print(f"gpu_bench: {problem}", file=sys.stderr)
        sys.exit(2)
