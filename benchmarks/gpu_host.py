"""What the host does for a pass of BERT with minibert's own kernels: measured without a GPU.

    python -m benchmarks.gpu_host

NVIDIA's own cuda-core launches on the stand-in for its driver (``tests/fake_driver``), so a launch
costs the host what it costs beside a GPU, and takes no time there. The tensors are on the CPU and
tiny. "Kernels" is minibert's part of a pass: attention, add-norm, their autograd nodes. "Whole"
adds torch's operators, which here are those of the CPU: they compute, and those of CUDA launch. So
only the counts of "whole" carry over to a GPU, where `make gpu-bench` measures the host's time.

"Replayed" is all of a step but the graph's own launch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minibert import BertConfig, BertForTokenClassification
from minibert.files import MinibertError
from minibert.model.layout import Packed
from minibert.speed import fused
from minibert.speed.cuda import ladder, launch, obstacles
from minibert.speed.cuda.seeds import one_draw
from minibert.speed.cuda_graphs import Graphs, Passes, Recording
from minibert.speed.prepacked import JoinedLinear, prepack
from minibert.training.adamw import OnePassAdamW, bert_groups
from tests import fake_driver

LAYERS, LENGTHS = 12, (5, 3)
CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    labels=("O", "B-A", "I-A"),
)
Pass = Callable[[], Any]


class Counts(NamedTuple):
    """What one pass asks of torch and of the driver."""

    launches: int  # of minibert's own kernels
    operators: int  # of torch
    allocations: int  # operators that only allocate
    streams: int  # conversions of a torch stream


class Operators(TorchDispatchMode):
    """Counts torch's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.by_name[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def a_gpu() -> Iterator[None]:
    """The stand-in, which only counts; every check that asks for a GPU is content."""
    rung = ladder.Rung("own kernels", "launched on a stand-in")
    with ExitStack() as stack:
        stack.enter_context(fake_driver.pretend(count_only=True))
        stack.enter_context(patch.object(ladder, "choose", lambda *_: rung))
        stack.enter_context(patch.object(obstacles, "norm", lambda *_: None))
        yield


def batch() -> dict[str, Any]:
    layout = Packed.from_lengths(LENGTHS)
    ids, labels = torch.arange(8), torch.arange(8) % 3
    return {"input_ids": ids, "labels": labels, "layout": layout}


def kernels(training: bool) -> Pass:
    """Attention and twice add-norm in every layer, which share no tensor."""
    layout, width, heads = batch()["layout"], CONFIG.hidden_size, CONFIG.num_attention_heads
    dropout = nn.Dropout(0.1 if training else 0.0).train(training)
    residual = torch.float32 if training else torch.float16
    layers = []
    for _ in range(LAYERS):
        q, k, v = (torch.randn(8, heads, 32).half().requires_grad_(training) for _ in range(3))
        norms = [nn.LayerNorm(width).to(residual) for _ in range(2)]
        x, y = (torch.randn(8, width, dtype=t) for t in (residual, torch.float16))
        layers.append((q, k, v, norms, x.requires_grad_(training), y.requires_grad_(training)))
    leaves = [t for q, k, v, _, x, y in layers for t in (q, k, v, x, y)]
    leaves += [t for *_, norms, _, _ in layers for norm in norms for t in norm.parameters()]
    d_context, d_norm = torch.randn(8, heads, 32).half(), torch.randn(8, width)

    def forward() -> list[Tensor]:
        outputs = []
        for q, k, v, norms, x, y in layers:
            outputs.append(fused.attend(q, k, v, layout, dropout.p).context_NHK)
            outputs += [fused.add_norm(y, x, norm, dropout) for norm in norms]
        return outputs

    def step() -> None:
        with one_draw():
            outputs = forward()
        torch.autograd.grad(outputs, leaves, [d_context, d_norm, d_norm] * LAYERS)

    return step if training else torch.inference_mode()(forward)


def model_of(training: bool) -> BertForTokenClassification:
    torch.manual_seed(0)
    rate = 0.1 if training else 0.0
    config = replace(CONFIG, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    return BertForTokenClassification(config, "fused").train(training)


def whole_inference() -> Pass:
    model, inputs = model_of(False).half(), batch()
    prepack(model, JoinedLinear)
    del inputs["labels"]

    @torch.inference_mode()
    def run() -> None:
        model(**inputs)

    return run


def whole_step() -> Pass:
    model, inputs = model_of(True), batch()

    def run() -> None:
        with one_draw(), torch.autocast("cpu", torch.float16):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()

    return run


def replayed_step() -> Pass:
    """Copy the batch to its places, replay a graph of nothing, update."""
    model, inputs = model_of(True), batch()

    def record(passes: Callable[[], Passes]) -> Recording:
        return Recording(lambda: None, passes())

    graphs = Graphs(model, model.config.max_length, torch.float16, record)
    optimizer = OnePassAdamW(bert_groups(model, 0.01))

    def run() -> None:
        graphs.backward(inputs)
        optimizer.clipped_step(1e-5, 1.0)
        optimizer.zero_grad()

    return run


PASSES: dict[str, Callable[[], Pass]] = {
    "inference, kernels": lambda: kernels(training=False),
    "training step, kernels": lambda: kernels(training=True),
    "training step, replayed": replayed_step,
    "inference, whole": whole_inference,
    "training step, whole": whole_step,
}


def count(run: Pass) -> Counts:
    """What a pass does once everything is warm; within ``a_gpu``."""
    run()
    launches, misses = fake_driver.library().fake_launches, launch._stream.cache_info().misses
    before = launches()
    with Operators() as operators:
        run()
    names = operators.by_name
    return Counts(
        launches() - before,
        sum(names.values()),
        sum(number for name, number in names.items() if "empty" in name or "zeros" in name),
        launch._stream.cache_info().misses - misses,
    )


def best_ms(run: Pass, turns: int = 100) -> float:
    """The least processor time of a pass, which other processes disturb least."""
    times = []
    for _ in range(turns):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def main() -> None:
    if torch.cuda.is_available():
        raise MinibertError("there is a GPU here: `make gpu-bench` measures the host's time on it")
    fake_driver.library()  # before anything looks for the real driver
    torch.set_num_threads(1)
    print(f"{'':26} launches  operators  allocations  streams  host ms  µs a launch")
    for name, make in PASSES.items():
        with a_gpu():
            run = make()
            n, ms = count(run), best_ms(run)
        each = f"{1000 * ms / n.launches:11.1f}" if n.launches else ""
        print(
            f"{name:26} {n.launches:8} {n.operators:10} {n.allocations:12} {n.streams:8} "
            f"{ms:8.2f}  {each}"
        )


if __name__ == "__main__":
    main()
