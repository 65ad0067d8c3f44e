"""BERT-base end to end: this project's packed batches against transformers' padded ones.

Both sides get the same weights and the same sentences, collated beforehand and on the device before
the clock starts. Inference is in the half format itself, training under autocast with a loss scaler
(dropout, clipping and AdamW included, by the fastest way each side has).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timing import Step, interleaved
from minibert import BertConfig, BertForTokenClassification
from minibert.files import MinibertError
from minibert.pretrained import config_json, hub, weights
from minibert.pretrained.tokenizer import Tokenizer
from minibert.speed import fused
from minibert.speed.cuda_graphs import Graphs, Recorder
from minibert.text import bio, demo
from minibert.text.batches import Batch, Example, chunks, epoch_batches, examples_of, packed, padded
from minibert.training.adamw import Group, choose_adamw
from minibert.training.schedule import LossScaler

BATCH = 32
LR, CLIP, DECAY = 5e-5, 1.0, 0.01


class Plan(NamedTuple):
    """What is run: everything on a GPU, or a rehearsal of it on next to nothing."""

    device: torch.device
    dtype: torch.dtype  # inference in it, training under autocast to it
    attn: str  # of our side
    corpus: str  # "mit_movie" or "demo"
    checkpoint: str | None  # taken if it is on this machine
    shape: dict[str, int]  # what is not BERT-base about random weights
    test_sentences: int | None  # None: all
    steps: int  # training steps in a round
    lengths: dict[str, list[int]]  # further batches, of random tokens
    rounds: int


class Trainer(NamedTuple):
    """How a side trains."""

    adamw: str  # which, in words
    step: Callable[[Batch], Tensor]  # forward and backward pass, clipping, AdamW; gives the loss


class Side(NamedTuple):
    """One of those that are compared."""

    model: nn.Module  # float32, on the device
    collate: Callable[[Sequence[Example]], Batch]
    trainer: Callable[[nn.Module, Plan], Trainer]


class Ceiling(NamedTuple):
    """What the device does at best, measured on the spot."""

    product_tflops: float
    copy_gb_s: float


def models(plan: Plan, ceiling: Ceiling) -> dict[str, Any]:
    """Tokens a second (padding not counted) on the corpus and on batches of fixed lengths."""
    train, test = sentences(plan.corpus)
    labels = bio.labels_of(train)
    ours, tokenizer, origin = checkpoint(plan, labels)
    theirs = like(ours)
    path = fused.choose(plan.attn, plan.device, plan.dtype, ours.config.head_size)
    name = f"minibert {plan.attn}, packed"
    sides = {
        name: Side(ours.to(plan.device), lambda e: packed(e, plan.device), _our_trainer),
        "transformers sdpa, padded": Side(
            theirs.to(plan.device),
            lambda e: padded(e, tokenizer.pad_id, None, plan.device),
            _their_trainer,
        ),
    }
    limit = ours.config.max_position_embeddings
    words = [sentence.words for sentence in test[: plan.test_sentences]]
    examples = examples_of(words, tokenizer, limit)
    # Within a batch by length, as packing does it, so that both sides' results lie alike.
    in_order = [sorted(b, key=lambda e: len(e.ids)) for b in chunks(examples, BATCH)]
    rows = inference(sides, plan, ceiling, f"{plan.corpus} test", in_order)
    for title, lengths in plan.lengths.items():
        batches = [_random_examples(lengths, ours.config)] * 4
        rows += inference(sides, plan, ceiling, title, batches)

    examples = examples_of(
        [sentence.words for sentence in train], tokenizer, limit,
        bio.label_ids(train, labels, plan.corpus),
    )  # fmt: skip
    drawn = epoch_batches([len(e.ids) for e in examples], BATCH, seed=0, epoch=1)
    in_order = [[examples[i] for i in batch] for batch in drawn[: plan.steps]]
    if plan.device.type == "cuda":
        sides[f"{name}, CUDA graphs"] = Side(
            copy.deepcopy(ours),
            lambda e: packed(e, plan.device, tokenizer.pad_id),
            _graphs_trainer,
        )
    rows += training(sides, plan, ceiling, f"{plan.corpus} training", in_order)
    return {
        "weights": origin,
        "dtype": str(plan.dtype),
        "batch_size": BATCH,
        "minibert_attention": f"{path.value}: {path.reason}",
        "rows": rows,
    }


def sentences(corpus: str) -> tuple[list[bio.Sentence], list[bio.Sentence]]:
    """Those to train on and those to test on."""
    if corpus == "demo":
        return demo.generate()
    folder = hub.locate_corpus(corpus)
    return bio.read_bio(folder / "engtrain.bio"), bio.read_bio(folder / "engtest.bio")


def checkpoint(
    plan: Plan, labels: tuple[str, ...]
) -> tuple[BertForTokenClassification, Tokenizer, str]:
    """Our model in float32, its tokenizer, and in words where the weights are from."""
    directory = hub.find_model(plan.checkpoint) if plan.checkpoint else None
    if directory is not None:
        model = BertForTokenClassification.from_pretrained(
            directory, labels=labels, attn_implementation=plan.attn, device=plan.device, seed=0
        )
        return model, Tokenizer.from_pretrained(directory), f"{plan.checkpoint}, new classifier"
    directory = hub.locate_model("minilm")
    config = config_json.read(directory / "config.json")
    config = BertConfig(vocab_size=config.vocab_size, labels=labels, **plan.shape)
    torch.manual_seed(0)
    model = BertForTokenClassification(config, plan.attn)
    origin = f"random (seed 0), {config.num_hidden_layers} layers of {config.hidden_size}"
    return model, Tokenizer.from_pretrained(directory), f"{origin}, minilm's tokenizer"


@torch.no_grad()
def like(ours: BertForTokenClassification) -> nn.Module:
    """transformers' model with the same weights."""
    import transformers

    raw = config_json.to_dict(ours.config, "BertForTokenClassification")
    config = transformers.config_json.parse(raw)
    theirs = transformers.AutoModelForTokenClassification.from_config(
        config, attn_implementation="sdpa"
    )
    parameters = dict(theirs.named_parameters())
    for mine, name in weights.names_of(ours).items():
        parameters.pop(name).copy_(ours.get_parameter(mine))
    if parameters:
        raise MinibertError(f"transformers has parameters that ours has not: {list(parameters)}")
    return theirs.float()


def _random_examples(lengths: list[int], config: BertConfig) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    return [Example(tuple(x), (0,), i, 0) for i, x in enumerate(ids)]


def inference(
    sides: dict[str, Side],
    plan: Plan,
    ceiling: Ceiling,
    title: str,
    examples: list[list[Example]],
) -> list[dict[str, Any]]:
    """Passes over all batches; and how far the two sides' logits lie apart on the first."""
    steps, logits = {}, []
    for name, side in sides.items():
        model = copy.deepcopy(side.model).to(plan.dtype).eval()
        batches = [side.collate(batch) for batch in examples]
        steps[name] = _pass(model, batches)
        with torch.inference_mode():
            first = model(**batches[0].inputs).logits
        logits.append(first.flatten(0, -2)[batches[0].first_W].float())
    apart = float((logits[0] - logits[1]).abs().max())
    if not apart <= 0.1 * float(logits[1].abs().max()):
        raise MinibertError(f"{title}: the two sides' logits differ by {apart}: nothing compared")
    times = interleaved(steps, plan.rounds, plan.device)
    floor = floor_of(_ours(sides), ceiling, examples, training=False)
    return _rows("infer", title, times, examples, floor, {"logits_apart": apart})


def _pass(model: nn.Module, batches: list[Batch]) -> Step:
    def step() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch.inputs)

    return step


def training(
    sides: dict[str, Side],
    plan: Plan,
    ceiling: Ceiling,
    title: str,
    examples: list[list[Example]],
) -> list[dict[str, Any]]:
    """Steps of the optimiser over the same batches in every round."""
    steps: dict[str, Step] = {}
    losses: dict[str, list[Tensor]] = {name: [] for name in sides}
    adamw = {}
    for name, side in sides.items():
        model = side.model.train()
        batches = [side.collate(batch) for batch in examples]
        adamw[name], step = side.trainer(model, plan)
        steps[name] = _steps(step, batches, losses[name])
    times = interleaved(steps, plan.rounds, plan.device, warm_up=1)
    fell = {name: (float(x[0]), float(torch.stack(x[-10:]).mean())) for name, x in losses.items()}
    for name, (first, last) in fell.items():
        if not last < first:
            raise MinibertError(f"{title}: {name} does not learn: loss {first}, then {last}")
    floor = floor_of(_ours(sides), ceiling, examples, training=True)
    rows = _rows("train", title, times, examples, floor, {})
    for row in rows:
        row["first_loss"], row["last_losses"] = fell[row["model"]]
        row["adamw"] = adamw[row["model"]]
    return rows


def _steps(step: Callable[[Batch], Tensor], batches: list[Batch], losses: list[Tensor]) -> Step:
    def steps() -> None:
        losses.extend([step(batch) for batch in batches])

    return steps


def _our_trainer(model: nn.Module, plan: Plan) -> Trainer:
    adamw, update, scaler = _our_update(model, plan)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(plan.device.type, plan.dtype, enabled=plan.dtype != torch.float32):
            loss = model(**batch.inputs).loss
        (loss * scaler.scale if scaler else loss).backward()
        update()
        return loss.detach()

    return Trainer(adamw, step)


def _graphs_trainer(model: nn.Module, plan: Plan) -> Trainer:
    """Ours with both passes as a CUDA graph for each size of batch."""
    assert isinstance(model, BertForTokenClassification)
    adamw, update, scaler = _our_update(model, plan)
    graphs = Graphs(model, plan.dtype, Recorder(plan.device))

    def step(batch: Batch) -> Tensor:
        loss = graphs.backward(batch.inputs, scaler.scale if scaler else 1.0).clone()
        update()
        return loss

    return Trainer(adamw, step)


def _our_update(model: nn.Module, plan: Plan) -> tuple[str, Callable[[], None], LossScaler | None]:
    """Which AdamW in words, clipping and it, and the scaler of the loss if it needs one."""
    chosen = choose_adamw([Group(list(model.parameters()), DECAY)], "torch")
    scaler = LossScaler() if plan.dtype == torch.float16 else None

    def update() -> None:
        chosen.value.clipped_step(LR, CLIP, scaler)
        chosen.value.zero_grad()

    return chosen.reason, update, scaler


def _their_trainer(model: nn.Module, plan: Plan) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.dtype == torch.float16)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(plan.device.type, plan.dtype, enabled=plan.dtype != torch.float32):
            loss = model(**batch.inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return Trainer("torch.optim.AdamW(fused=True)", step)


def _ours(sides: dict[str, Side]) -> BertForTokenClassification:
    return next(s.model for s in sides.values() if isinstance(s.model, BertForTokenClassification))


def floor_of(
    model: BertForTokenClassification,
    ceiling: Ceiling,
    examples: list[list[Example]],
    training: bool,
) -> dict[str, float]:
    """The least a pass over these batches can take: its products, and its bytes.

    Products: two operations a weight of a linear layer and token, 4 D a pair of tokens of a
    sentence and layer; training three times that. Bytes: every batch reads the linear layers' half
    weights; a step of training reads them twice, having made them from the float32 ones (6 bytes),
    and for every parameter writes the gradient, reads it for the norm, and updates (4 + 4 + 28).
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    pairs = sum(len(example.ids) ** 2 for batch in examples for example in batch)
    layers, D = model.config.num_hidden_layers, model.config.hidden_size
    operations = 2 * linear * _tokens(examples) + 4 * D * layers * pairs
    traffic = 2 * linear * len(examples)
    if training:
        parameters = sum(p.numel() for p in model.parameters())
        operations *= 3
        traffic = ((2 + 2 + 6) * linear + (4 + 4 + 28) * parameters) * len(examples)
    return {
        "products_ms": operations / ceiling.product_tflops / 1e9,
        "bytes_ms": traffic / ceiling.copy_gb_s / 1e6,
    }


def _tokens(examples: list[list[Example]]) -> int:
    return sum(len(example.ids) for batch in examples for example in batch)


def _rows(
    what: str,
    title: str,
    times: dict[str, list[float]],
    examples: list[list[Example]],
    floor: dict[str, float],
    more: dict[str, Any],
) -> list[dict[str, Any]]:
    tokens = _tokens(examples)
    rows = []
    for name, all_ms in times.items():
        ms = median(all_ms)
        rows.append(
            {
                "batch": title,
                "model": name,
                f"{what}_tokens_s": 1000 * tokens / ms,
                f"{what}_ms_a_batch": ms / len(examples),
                "share_of_ceiling": max(floor.values()) / ms,
                "all_ms": all_ms,
                "batches": len(examples),
                "tokens": tokens,
                "mean_length": mean(len(e.ids) for batch in examples for e in batch),
                **floor,
                **more,
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows
