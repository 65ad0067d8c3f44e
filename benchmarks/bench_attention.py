"""Attention alone, one layer in the fastest native format over the test sentences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import stage
from benchmarks.stage import Place, Plan, Run
from minibert.machine import DTYPES
from minibert.model import encoder, layout
from minibert.tagging.tagger import Tagger

INFERENCE, TURNS, WARM_UP = True, 5, 1


def subjects(plan: Plan) -> Sequence[str]:
    return (
        "ceiling",
        "minibert sdpa, packed",
        "sdpa, padded to longest",
        "sdpa, sorted by length",
        "eager, padded to longest",
    )


def test_attention(found: dict) -> None:
    assert found["tokens"] > 0


def build(subject: str, place: Place) -> Run:
    model = stage.ours(place.plan_name)
    examples = stage.test_examples(place.plan_name)
    dtype = DTYPES[stage.NATIVE]
    tokens, width = stage.tokens_of(examples), model.config.hidden_size
    if subject == "ceiling":  # q, k, v read and the context written
        run = stage.moved(4 * dtype.itemsize * width * tokens)
        return lambda: run() or {"tokens": tokens}
    layouts: list[layout.Layout]
    if subject.startswith("minibert"):
        tagger = Tagger(model, stage.tokenizer())
        layouts = [batch.inputs["layout"] for batch in tagger._batches(examples)]
    else:
        examples = stage.by_length(examples) if "sorted" in subject else examples
        layouts = [layout.Padded.from_mask(*batch) for batch in stage.padded(examples)]
    attend = encoder.implementation("eager" if "eager" in subject else "sdpa")
    inputs = []
    for where in layouts:
        count = sum(block.rows * block.length for block in where.blocks)
        qkv = torch.randn(3, count, width // model.config.head_size, model.config.head_size)
        inputs.append((*qkv.to(dtype), where))

    def run_all() -> dict:
        for q, k, v, where in inputs:
            attend(q, k, v, where, 0.0)
        return {"tokens": tokens}

    return run_all
