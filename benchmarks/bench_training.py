"""A training step: 32 sentences forward and backward, clipping, AdamW.

Under bf16 autocast where the CPU multiplies bf16 natively, else in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

from benchmarks import stage
from benchmarks.stage import Place, Plan, Run
from minibert.text.batches import packed, padded
from minibert.training.adamw import Group, choose_adamw

INFERENCE, TURNS, WARM_UP = False, 5, 1
LR, CLIP, DECAY = 5e-5, 1.0, 0.01


def subjects(plan: Plan) -> Sequence[str]:
    return (
        "ceiling",
        "minibert, packed",
        "transformers, padded to longest, AdamW",
        "transformers, padded to longest, AdamW(fused=True)",
    )


def test_training(found: dict) -> None:
    assert found["tokens"] > 0


def build(subject: str, place: Place) -> Run:
    name = place.plan_name
    examples = stage.train_batches(name)
    tokens = sum(stage.tokens_of(batch) for batch in examples)
    if subject == "ceiling":
        run = ceiling(name, [stage.tokens_of(batch) for batch in examples])
        return lambda: run() or {"tokens": tokens}
    if subject.startswith("minibert"):
        model = copy.deepcopy(stage.ours(name)).train()
        batches = [packed(batch) for batch in examples]
        update = _our_update(model)
    else:
        model = copy.deepcopy(stage.theirs(name)).train()
        batches = [padded(batch, stage.tokenizer().pad_id) for batch in examples]
        update = _their_update(model, "fused" in subject)

    def run_all() -> dict:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=stage.NATIVE == "bf16"):
                loss = model(**batch.inputs).loss
            loss.backward()
            update()
        return {"tokens": tokens, "steps": len(batches), "loss": float(loss.detach())}

    return run_all


def ceiling(plan_name: str, tokens: Sequence[int]) -> Callable[[], None]:
    """The least that steps of so many tokens can be: their products, and the bytes they must move.

    Products: the forward pass three times (the backward pass takes two products for each). Bytes: a
    linear layer's weight, for bf16, is read in float32, written and twice read in bf16 (10); of
    every parameter the gradient is written and read for the norm, and AdamW reads four numbers and
    writes three (36).
    """
    model = stage.in_dtype(stage.ours, plan_name, stage.NATIVE)
    cast = 10 if stage.NATIVE == "bf16" else 0
    linear = sum(layer.weight.numel() for layer in stage.linears(model))
    parameters = sum(p.numel() for p in model.parameters())
    products = [stage.products(model, count) for count in tokens]
    bytes_of_a_step = stage.moved(cast * linear + 36 * parameters)

    def run() -> None:
        for product in products:
            for _ in range(3):
                product()
            bytes_of_a_step()

    return run


def _our_update(model: torch.nn.Module) -> Callable[[], None]:
    chosen = choose_adamw([Group(list(model.parameters()), DECAY)], "torch")
    assert "fused CPU kernel" in chosen.reason
    optimizer = chosen.value

    def update() -> None:
        optimizer.clipped_step(LR, CLIP)
        optimizer.zero_grad()

    return update


def _their_update(model: torch.nn.Module, fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY, fused=fused)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return update
