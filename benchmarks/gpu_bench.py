"""Times on the GPU at hand: attention alone, then BERT-base inference and training in float16.

    python -m benchmarks.gpu_bench                      everything
    python -m benchmarks.gpu_bench --only attention     without the models

Ceiling first: the tensor cores' float16 rate and the memory's bandwidth are measured by one large
product and one large copy, and every attention time is also given as TFLOP/s. Useful operations are
counted: 4 K a score forward, 10 K more backward, nothing for padding. The result is one JSON file
under benchmarks/results, named by date and device, with driver, versions and clocks in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minibert.kernels import ladder

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD_SIZE = 12, 64  # BERT-base


def milliseconds(step: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a step, by CUDA events; nothing in between waits for the GPU."""
    for _ in range(5):
        step()
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events)


def short_queries(count: int) -> list[int]:
    """Lengths in word pieces like those of a search query corpus: 3 to 40, about 12 on average."""
    generator = random.Random(0)
    return [min(40, max(3, round(generator.gammavariate(6, 2)))) for _ in range(count)]


BATCHES = {
    "about 12, mixed": short_queries(256),
    "128": [128] * 32,
    "512": [512] * 8,
}


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        query: seen.splitlines()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def ceiling() -> dict[str, float]:
    """Float16 TFLOP/s of a 4096 x 4096 x 4096 product; GB/s of a 256 MB copy, read and written."""
    a, b = torch.randn(2, 4096, 4096, device="cuda").half()
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "product_tflops": 2 * 4096**3 / milliseconds(lambda: a @ b) / 1e9,
        "copy_gb_s": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6,
    }


def attention_alone() -> list[dict[str, Any]]:
    """Forward, and forward with backward, by every path that runs here."""
    rows = []
    for batch, lengths in BATCHES.items():
        operations = 4 * HEADS * HEAD_SIZE * sum(n * n for n in lengths)
        for dropout_p in (0.0, 0.1):
            for name, step in _paths(lengths, dropout_p).items():
                row: dict[str, Any] = {"batch": batch, "path": name, "dropout": dropout_p}
                try:
                    row["forward_ms"] = milliseconds(lambda step=step: step(False))
                    row["both_ms"] = milliseconds(lambda step=step: step(True))
                except RuntimeError as error:  # a backend this GPU does not have
                    row["not_available"] = str(error).splitlines()[0]
                else:
                    row["forward_tflops"] = operations / row["forward_ms"] / 1e9
                    row["both_tflops"] = 3.5 * operations / row["both_ms"] / 1e9
                rows.append(row)
                print(row, file=sys.stderr)
    return rows


def _paths(lengths: list[int], dropout_p: float) -> dict[str, Callable[[bool], None]]:
    """By name: a function that runs attention once, with the gradient if asked."""
    tokens, longest = sum(lengths), max(lengths)
    qkv = torch.randn(tokens, 3, HEADS, HEAD_SIZE, device="cuda").half().requires_grad_()
    d_context = torch.randn(tokens, HEADS, HEAD_SIZE, device="cuda").half()
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    shape = (3, len(lengths), HEADS, longest, HEAD_SIZE)
    padded = torch.randn(shape, device="cuda").half().requires_grad_()
    d_padded = torch.randn(shape[1:], device="cuda").half()
    mask = None
    if min(lengths) < longest:
        position, ends = torch.arange(longest, device="cuda"), torch.tensor(lengths, device="cuda")
        mask = (position < ends[:, None])[:, None, None, :]

    def packed(attend: ladder.Attend) -> Callable[[bool], None]:
        def step(gradient: bool) -> None:
            with torch.set_grad_enabled(gradient):
                context = attend(*qkv.unbind(1), starts, longest, dropout_p)
            if gradient:
                torch.autograd.grad(context, qkv, d_context)

        return step

    def sdpa(backend: SDPBackend, mask: torch.Tensor | None) -> Callable[[bool], None]:
        def step(gradient: bool) -> None:
            with torch.set_grad_enabled(gradient), sdpa_kernel(backend):
                context = F.scaled_dot_product_attention(*padded, mask, dropout_p)
            if gradient:
                torch.autograd.grad(context, padded, d_padded)

        return step

    paths = {name: packed(attend) for name, attend in ladder.RUNGS.items()}
    paths["sdpa efficient, padded"] = sdpa(SDPBackend.EFFICIENT_ATTENTION, mask)
    # Flash takes no mask: on a mixed batch it also attends to padding.
    paths["sdpa flash, padded"] = sdpa(SDPBackend.FLASH_ATTENTION, None)
    return paths


def models() -> list[dict[str, Any]]:
    """BERT-base, random weights, float16: tokens/s that are not padding, ours and transformers'."""
    import transformers

    from minibert import BertConfig, BertForTokenClassification
    from minibert.layout import Packed

    labels = tuple(f"L{i}" for i in range(25))
    with torch.device("cuda"):
        theirs = transformers.BertForTokenClassification._from_config(
            transformers.BertConfig(vocab_size=28996, num_labels=25), attn_implementation="sdpa"
        )
        ours = BertForTokenClassification(BertConfig(labels=labels), "fused")
    rows = []
    for batch, lengths in {"32 of about 12": short_queries(32), **BATCHES}.items():
        tokens, longest = sum(lengths), max(lengths)
        packed = torch.randint(28996, (tokens,), device="cuda")
        layout = Packed.from_lengths(lengths, "cuda")
        padded = torch.randint(28996, (len(lengths), longest), device="cuda")
        ends = torch.tensor(lengths, device="cuda")
        mask = (torch.arange(longest, device="cuda") < ends[:, None]).long()
        calls = {
            "minibert fused": (ours, {"input_ids": packed, "layout": layout}),
            "transformers sdpa": (theirs, {"input_ids": padded, "attention_mask": mask}),
        }
        for name, (model, inputs) in calls.items():
            row: dict[str, Any] = {"batch": batch, "model": name}
            row["infer_tokens_s"] = 1000 * tokens / milliseconds(_inference(model, inputs))
            row["train_tokens_s"] = 1000 * tokens / milliseconds(_training(model, inputs))
            rows.append(row)
            print(row, file=sys.stderr)
    return rows


def _inference(model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    def step() -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            model(**inputs)

    return step


def _training(model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler()
    labels = torch.zeros_like(inputs["input_ids"])

    def step() -> None:
        model.train()
        with torch.autocast("cuda", torch.float16):
            loss = model(**inputs, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("attention", "models"))
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        sys.exit("gpu_bench: no CUDA device here, nothing is measured")
    result: dict[str, Any] = {"environment": environment(), "ceiling": ceiling()}
    print(result, file=sys.stderr)
    if only != "models":
        result["attention"] = attention_alone()
    if only != "attention":
        result["models"] = models()
    seen = result["environment"]
    device = seen["device"].lower().replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{seen['date']}-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"written": str(path), **result["ceiling"]}))


if __name__ == "__main__":
    main()
