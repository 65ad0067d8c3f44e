"""Inference on the test set, in real tokens per second (padding not counted)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from benchmarks import peers, workload
from benchmarks.peers import Predict
from benchmarks.workload import LeftOutError, Workload
from minibert.text.batches import Batch, packed, padded

NAMES = (
    "ceiling fp32",
    "ceiling bf16",
    "ceiling fp16w",
    "ceiling int8",
    "minibert fp32, packed",
    "minibert bf16, packed",
    "minibert fp16w, packed",
    "minibert int8, packed",
    "transformers sdpa fp32, padded to 128",
    "transformers eager fp32, padded to longest",
    "transformers sdpa fp32, padded to longest",
    "transformers sdpa fp32, sorted by length",
    "transformers sdpa bf16, padded to longest",
    "transformers sdpa bf16, sorted by length",
    f"transformers compiled {workload.NATIVE}, sorted by length",
    "onnxruntime fp32, padded to longest",
    "onnxruntime fp32, sorted by length",
    "onnxruntime int8, padded to longest",
    "onnxruntime int8, sorted by length",
    "OpenVINO fp32, padded to longest",
    "OpenVINO fp32, sorted by length",
    "OpenVINO bf16, padded to longest",
    "OpenVINO bf16, sorted by length",
    "OpenVINO int8, padded to longest",
    "OpenVINO int8, sorted by length",
)
PAUSE = 0.1  # onnxruntime's threads spin on for about 50 ms and would slow the next contender
# Largest error of the logits against minibert's in fp32, relative to the largest logit. int8
# changes the model, so its bound only catches wrong inputs.
NEAR = {"fp32": 1e-4, "fp16w": 1e-2, "bf16": 0.1, "int8": 1.0}


@torch.inference_mode()
def test_inference(race: Callable, work: Workload) -> None:
    names = filter(workload.runs_here, NAMES)
    race(names, lambda name: build(name, work), work.plan.turns, pause=PAUSE)


def build(name: str, work: Workload) -> Callable[[], dict]:
    kind, _, layout = name.partition(", ")
    dtype = kind.split()[-1]
    examples = work.test_examples
    if kind.startswith("ceiling"):
        products = workload.prepacked_products(work.tagger(dtype).model, work.plan.tokens)
        return lambda: products() or {"tokens": work.plan.tokens}
    if kind.startswith("minibert"):
        tagger = work.tagger(dtype)
        packed = work.packed(tagger)
        check(tagger.model(**packed[0].inputs).logits, packed[0], work, NEAR[dtype])

        def ours() -> dict:
            for batch in packed:
                tagger.model(**batch.inputs)
            return {"tokens": workload.tokens_of(examples)}

        return ours
    if layout == "padded to 128":
        examples = examples[: max(workload.BATCH, len(examples) // 8)]  # a tenth as fast
    if layout == "sorted by length":
        examples = workload.by_length(examples)
    # With one batch after another OpenVINO's int8 is slower; its fp32 is not.
    streams = torch.get_num_threads() if kind == "OpenVINO int8" else 1
    predict = predictor(kind, work, streams)
    threads = ThreadPoolExecutor(streams)
    batches = work.padded(examples, 128 if layout == "padded to 128" else None)
    first = padded(examples[: workload.BATCH], 0, batches[0]["input_ids"].shape[1])
    apart = check(predict(batches[0]).flatten(0, 1), first, work, NEAR[dtype])

    def theirs() -> dict:
        for _ in threads.map(predict, batches) if streams > 1 else map(predict, batches):
            pass
        return {"tokens": workload.tokens_of(examples), "apart": apart}

    return theirs


def predictor(kind: str, work: Workload, streams: int = 1) -> Predict:
    """A peer by name, such as "transformers sdpa bf16" or "onnxruntime int8".

    ``streams``: of OpenVINO.
    """
    library, dtype = kind.split()[0], kind.split()[-1]
    if library == "onnxruntime":
        return peers.onnxruntime_model(work.theirs(), work.folder, dtype == "int8")
    if library == "OpenVINO":
        return peers.openvino_model(work.theirs(), work.folder, dtype, work.calibration, streams)
    if "eager" in kind:
        return peers.eager(work.theirs(dtype))
    if "compiled" in kind:
        if not work.plan.compiles:
            raise LeftOutError("compiling takes minutes: run make bench-full")
        return peers.torch_model(torch.compile(work.theirs(dtype), dynamic=True))
    return peers.torch_model(work.theirs(dtype))


def check(logits_NL: Tensor, batch: Batch, work: Workload, bound: float) -> float:
    """Relative error against minibert's fp32 logits at the first piece of every word."""
    mine = packed(batch.examples)
    exact_NL = work.ours(**mine.inputs).logits
    exact = {id(e): part for e, part in zip(mine.examples, _by_example(exact_NL, mine))}
    found = zip(batch.examples, _by_example(logits_NL.float(), batch))
    apart = max(float((part - exact[id(e)]).abs().max()) for e, part in found)
    apart /= float(exact_NL.abs().max())
    assert apart <= bound, f"the logits differ by {apart}"
    return apart


def _by_example(logits_NL: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return logits_NL[batch.first_W].split([len(example.firsts) for example in batch.examples])
