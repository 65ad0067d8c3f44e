"""BERT-base end to end on the GPU: minibert's packed batches against transformers' padded ones.

Both sides get the same weights and the same sentences, collated and on the device before the clock
starts. Inference is in float16, training under autocast with a loss scaler; both sides use their
fastest AdamW.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_plan import Ceiling, Plan, ceiling_of, ceiling_steps
from benchmarks.steps import Trainer, our_trainer, our_update, their_trainer
from benchmarks.workload import BATCH, by_length, like, sentences, tokens_of
from minibert import BertConfig, BertForTokenClassification
from minibert.model.attention import Attended
from minibert.model.layout import Packed
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.speed import fused
from minibert.speed.cuda import ladder
from minibert.speed.cuda_graphs import Graphs, Recorder
from minibert.text import bio
from minibert.text.batches import Batch, Example, chunks, epoch_batches, examples_of, packed, padded

Batches = list[list[Example]]

# Estimates from the T4's products at 24 TFLOP/s and memory at 250 GB/s, made before it ran.
PREDICTED_T4_MS = {
    "32 x 128": 35.0, "32 x 384": 108.0, "256 x about 12": 26.0, "mit_movie training": 35.0
}  # fmt: skip


class Side(NamedTuple):
    """A contender."""

    model: nn.Module  # float32, on the device
    collate: Callable[[Sequence[Example]], Batch]
    trainer: Callable[[nn.Module, torch.dtype], Trainer]


@dataclass
class Models:
    """Both sides with their sentences."""

    plan: Plan
    ours: BertForTokenClassification
    tokenizer: Tokenizer
    sides: dict[str, Side]
    train: list[bio.Sentence]
    test: list[bio.Sentence]
    about: dict[str, Any]  # for the result


@pytest.fixture(scope="module")
def models(plan: Plan) -> Models:
    train, test = sentences(plan.corpus)
    ours, tokenizer, origin = checkpoint(plan, bio.labels_of(train))
    path = fused.choose(plan.attn, plan.device, plan.dtype, ours.config.head_size)
    sides = {
        f"minibert {plan.attn}, packed": Side(
            ours.to(plan.device), lambda e: packed(e, plan.device), our_trainer
        ),
        "transformers sdpa, padded": Side(
            like(ours).to(plan.device),
            lambda e: padded(e, tokenizer.pad_id, None, plan.device),
            their_trainer,
        ),
    }
    about = {
        "weights": origin,
        "dtype": str(plan.dtype),
        "batch_size": BATCH,
        "minibert_attention": f"{path.value}: {path.reason}",
    }
    return Models(plan, ours, tokenizer, sides, train, test, about)


def checkpoint(
    plan: Plan, labels: tuple[str, ...]
) -> tuple[BertForTokenClassification, Tokenizer, str]:
    """minibert's model in float32, its tokenizer, and where the weights come from."""
    directory = hub.find_model(plan.checkpoint) if plan.checkpoint else None
    if directory is not None:
        model = BertForTokenClassification.from_pretrained(
            directory, labels=labels, attn_implementation=plan.attn, device=plan.device, seed=0
        )
        return model, Tokenizer.from_pretrained(directory), f"{plan.checkpoint}, new classifier"
    tokenizer = Tokenizer.from_pretrained(hub.locate_model("minilm"))
    config = BertConfig(vocab_size=tokenizer.vocab_size, labels=labels, **plan.shape)
    torch.manual_seed(0)
    model = BertForTokenClassification(config, plan.attn)
    origin = f"random (seed 0), {config.num_hidden_layers} layers of {config.hidden_size}"
    return model, tokenizer, f"{origin}, minilm's tokenizer"


def test_inference(race: Callable, benchmark: Any, models: Models) -> None:
    """Tokens per second (padding not counted) on the test set and on batches of fixed lengths."""
    plan = models.plan
    words = [sentence.words for sentence in models.test[: plan.test_sentences]]
    examples = examples_of(words, models.tokenizer, models.ours.config.max_length)
    # Each batch sorted by length, as packing sorts it, so that the logits are in the same order.
    batches: dict[str, Batches] = {
        f"{plan.corpus} test": [by_length(batch) for batch in chunks(examples, BATCH)]
    }
    for title, lengths in plan.lengths.items():
        batches[title] = [random_examples(lengths, models.ours.config)] * 4
    low = {
        name: copy.deepcopy(side.model).to(plan.dtype).eval() for name, side in models.sides.items()
    }
    sides = dict(models.sides)
    if plan.attn == "fused" and "own kernels" not in models.about["minibert_attention"]:
        # A newer GPU gets other kernels; these are the path of a T4.
        name = "minibert own kernels, packed"
        sides[name] = models.sides["minibert fused, packed"]
        low[name] = copy.deepcopy(low["minibert fused, packed"])
        for layer in low[name].bert.layers:
            layer.attention.attend = own_kernels
    steps = ceiling_steps(plan)
    apart = {}
    for title, group in batches.items():
        logits = []
        for name, side in sides.items():
            collated = [side.collate(batch) for batch in group]
            steps[title, name] = forward_pass(low[name], collated)
            with torch.inference_mode():
                first = low[name](**collated[0].inputs).logits
            logits.append(first.flatten(0, -2)[collated[0].first_W].float())
        apart[title] = max(float((x - logits[1]).abs().max()) for x in logits)
        largest = float(logits[1].abs().max())
        assert apart[title] <= 0.1 * largest, f"{title}: the logits differ by {apart[title]}"
    times = race(steps, steps.__getitem__, plan.turns, warm_up=2)
    ceiling = ceiling_of(times, plan)
    rows = []
    for (title, name), timed in ((key, t) for key, t in times.items() if isinstance(key, tuple)):
        found = row("infer", title, name, timed, batches[title], models.ours, ceiling)
        rows.append(found | {"logits_apart": apart[title]})
    benchmark.extra_info |= models.about | {"rows": rows, "ceiling": ceiling._asdict()}


def random_examples(lengths: list[int], config: BertConfig) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    return [Example(tuple(x), (0,), i, 0) for i, x in enumerate(ids)]


def own_kernels(q: Tensor, k: Tensor, v: Tensor, layout: Packed, dropout_p: float) -> Attended:
    """minibert's own kernels, whatever the ladder takes here."""
    context = ladder.own_kernels(q, k, v, layout.starts, max(layout.lengths), dropout_p)
    return Attended(context, None)


def watched(passes: Callable[[], None]) -> Callable[[], dict[str, Any]]:
    """The same passes; gives the host's time, until all is launched, and the peak of memory."""

    def step() -> dict[str, Any]:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        passes()
        host_s = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return {"host_s": host_s, "peak_bytes": peak}

    return step


def forward_pass(model: nn.Module, batches: list[Batch]) -> Callable[[], dict[str, Any]]:
    def passes() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch.inputs)

    return watched(passes)


def test_training(race: Callable, benchmark: Any, models: Models) -> None:
    """Optimiser steps over the same batches in every turn."""
    plan, ours = models.plan, models.ours
    examples = examples_of(
        [sentence.words for sentence in models.train],
        models.tokenizer,
        ours.config.max_length,
        bio.label_ids(models.train, ours.config.labels, plan.corpus),
    )
    drawn = epoch_batches([len(e.ids) for e in examples], BATCH, seed=0, epoch=1)
    batches = [[examples[i] for i in batch] for batch in drawn[: plan.steps]]
    sides = dict(models.sides)
    if plan.device.type == "cuda":
        sides[f"minibert {plan.attn}, packed, CUDA graphs"] = Side(
            copy.deepcopy(ours),
            lambda e: packed(e, plan.device, models.tokenizer.pad_id),
            graphs_trainer,
        )
    steps = ceiling_steps(plan)
    losses: dict[str, list[Tensor]] = {name: [] for name in sides}
    adamw = {}
    for name, side in sides.items():
        adamw[name], step = side.trainer(side.model.train(), plan.dtype)
        steps[name] = train_pass(step, [side.collate(batch) for batch in batches], losses[name])
    times = race(steps, steps.__getitem__, plan.turns)
    ceiling = ceiling_of(times, plan)
    rows = []
    title = f"{plan.corpus} training"
    for name in sides:
        first, last = float(losses[name][0]), float(torch.stack(losses[name][-10:]).mean())
        assert last < first, f"{name} does not learn: loss {first}, then {last}"
        found = row("train", title, name, times[name], batches, ours, ceiling)
        rows.append(found | {"first_loss": first, "last_losses": last, "adamw": adamw[name]})
    benchmark.extra_info |= models.about | {"rows": rows, "ceiling": ceiling._asdict()}


def train_pass(
    step: Callable[[Batch], Tensor], batches: list[Batch], losses: list[Tensor]
) -> Callable[[], dict[str, Any]]:
    return watched(lambda: losses.extend([step(batch) for batch in batches]))


def graphs_trainer(model: nn.Module, dtype: torch.dtype) -> Trainer:
    """minibert with both passes as a CUDA graph for each batch size."""
    assert isinstance(model, BertForTokenClassification)
    adamw, update, scaler = our_update(model, dtype)
    graphs = Graphs(
        model, model.config.max_length, dtype, Recorder(next(model.parameters()).device)
    )

    def step(batch: Batch) -> Tensor:
        loss = graphs.backward(batch.inputs, scaler.scale if scaler else 1.0).clone()
        update()
        return loss

    return Trainer(adamw, step)


def floor_of(
    model: BertForTokenClassification, ceiling: Ceiling, batches: Batches, training: bool
) -> dict[str, float]:
    """A lower bound on a pass over these batches: its products, and its memory traffic.

    Products: two operations per weight of a linear layer and token, 4 D per pair of tokens of a
    sentence and layer; training takes three times that. Bytes: each batch reads the linear layers'
    float16 weights. A training step reads them twice, after making them from the float32 ones (6
    bytes); for each parameter it writes the gradient, reads it for the norm, and updates (4 + 4 +
    28).
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    pairs = sum(len(example.ids) ** 2 for batch in batches for example in batch)
    layers, D = model.config.num_hidden_layers, model.config.hidden_size
    operations = 2 * linear * sum(map(tokens_of, batches)) + 4 * D * layers * pairs
    traffic = 2 * linear * len(batches)
    if training:
        parameters = sum(p.numel() for p in model.parameters())
        operations *= 3
        traffic = ((2 + 2 + 6) * linear + (4 + 4 + 28) * parameters) * len(batches)
    return {
        "products_ms": operations / ceiling.product_tflops / 1e9,
        "bytes_ms": traffic / ceiling.copy_gb_s / 1e6,
    }


def row(
    what: str,
    title: str,
    name: str,
    timed: dict[str, Any],
    batches: Batches,
    ours: BertForTokenClassification,
    ceiling: Ceiling,
) -> dict[str, Any]:
    """A contender's result on some batches; ``what`` is "infer" or "train"."""
    tokens, ms = sum(map(tokens_of, batches)), 1000 * timed["median_s"]
    is_t4 = torch.cuda.is_available() and "T4" in torch.cuda.get_device_name()
    floor = floor_of(ours, ceiling, batches, training=what == "train")
    return {
        "batch": title,
        "model": name,
        f"{what}_tokens_s": 1000 * tokens / ms,
        f"{what}_ms_a_batch": ms / len(batches),
        "share_of_ceiling": max(floor.values()) / ms,
        "predicted_ms_a_batch": PREDICTED_T4_MS.get(title) if is_t4 else None,
        "host_ms_a_batch": 1000 * timed["host_s"] / len(batches),
        "peak_bytes": timed["peak_bytes"],
        "all_ms": [1000 * s for s in timed["seconds"]],
        "batches": len(batches),
        "tokens": tokens,
        "mean_length": mean(len(e.ids) for batch in batches for e in batch),
        **floor,
    }
