"""Training steps: 32 sentences forward and backward, clipping, AdamW.

Under bf16 autocast where the CPU multiplies bf16 natively, else in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from benchmarks import workload
from benchmarks.steps import our_trainer, their_trainer
from benchmarks.workload import NATIVE, Workload
from minibert.machine import DTYPES
from minibert.text.batches import packed, padded

OURS = "minibert, packed"
THEIRS = "transformers, padded to longest, AdamW"
THEIRS_FUSED = "transformers, padded to longest, AdamW(fused=True)"


def test_training(race: Callable, work: Workload) -> None:
    names = ("ceiling", OURS, THEIRS, THEIRS_FUSED)
    race(names, lambda name: build(name, work), work.plan.turns)


def build(name: str, work: Workload) -> Callable[[], dict]:
    examples = work.train_batches
    tokens = sum(workload.tokens_of(batch) for batch in examples)
    if name == "ceiling":
        least = ceiling(work)
        return lambda: least() or {"tokens": tokens}
    if name == OURS:
        adamw, step = our_trainer(copy.deepcopy(work.ours).train(), DTYPES[NATIVE])
        assert "fused CPU kernel" in adamw
        batches = [packed(batch) for batch in examples]
    else:
        model = copy.deepcopy(work.theirs()).train()
        _, step = their_trainer(model, DTYPES[NATIVE], fused=name == THEIRS_FUSED)
        batches = [padded(batch, work.tokenizer.pad_id) for batch in examples]

    def run() -> dict:
        losses = [step(batch) for batch in batches]
        return {"tokens": tokens, "steps": len(batches), "loss": float(losses[-1])}

    return run


def ceiling(work: Workload) -> Callable[[], None]:
    """A lower bound on the time of these steps: their products and their memory traffic.

    Products: three times the forward pass, since backward takes two products for each. Bytes: bf16
    autocast reads a linear layer's weight in float32, writes it and reads it twice in bf16 (10);
    each parameter's gradient is written and read for the norm, and AdamW reads four numbers and
    writes three (36).
    """
    model = work.ours if NATIVE == "fp32" else copy.deepcopy(work.ours).to(DTYPES[NATIVE])
    cast = 10 if NATIVE == "bf16" else 0
    linear = sum(layer.weight.numel() for layer in workload.linears(model))
    parameters = sum(p.numel() for p in model.parameters())
    products = [workload.products(model, workload.tokens_of(batch)) for batch in work.train_batches]
    bytes_of_a_step = workload.moved(cast * linear + 36 * parameters)

    def run() -> None:
        for product in products:
            for _ in range(3):
                product()
            bytes_of_a_step()

    return run
