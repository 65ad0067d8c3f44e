"""Fine-tune BERT for named entities: the whole recipe, read top to bottom.

    python train.py --model minilm --corpus mit_movie --output runs/movie
    python train.py --model bert-base-cased --corpus mit_movie --recipe paper --output runs/paper
    python train.py --model minilm --train my.bio --dev 0.1 --test other.bio --output runs/mine

Written to the output directory: ``last/`` (the model after the last epoch), ``best/`` (after the
epoch with the highest entity F1 on the dev set, if there is one), ``metrics.jsonl``,
``report.json`` and ``loss.png``. The test set is only looked at: nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minibert import data, democorpus, hub
from minibert.attention import IMPLEMENTATIONS
from minibert.averaging import WeightAverage
from minibert.curve import text_curve, write_png
from minibert.data import Batch, Example, Sentence
from minibert.evaluation import evaluate
from minibert.files import MinibertError, write_text
from minibert.machine import DTYPES, choose_device, choose_dtype, name_of
from minibert.model import BertForTokenClassification
from minibert.optim import (
    SEMANTICS,
    LossScaler,
    bert_groups,
    choose_adamw,
    linear_schedule,
)
from minibert.tagger import Tagger
from minibert.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """What decides the result, apart from the data, the model and the seed."""

    lr: float  # peak learning rate
    epochs: int
    batch_size: int  # sentences
    warmup: float  # share of all steps in which the rate rises
    weight_decay: float
    eps: float  # of AdamW
    clip: float  # largest joint norm of the gradients
    optimizer: str  # whose AdamW: torch, transformers or google
    layout: str  # packed; longest: padded to the longest of the batch; a number: to that
    bucket: int  # batches that are sorted by length together; 1: none
    average: float  # power of the average of the weights over the steps; inf: the last alone
    decode: str  # best: the most probable well-formed labels; each: of every word by itself
    accumulate: int = 1  # batches to a step of the optimiser

    def __post_init__(self) -> None:
        positive = ("lr", "epochs", "batch_size", "eps", "clip", "bucket", "accumulate")
        for name in positive:
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be above 0, got {vars(self)[name]}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of all steps, in [0, 1), got {self.warmup}")
        for name in ("weight_decay", "average"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}")
        if self.optimizer not in SEMANTICS:
            raise ValueError(f"optimizer must be one of {', '.join(SEMANTICS)}")
        if self.decode not in ("best", "each"):
            raise ValueError(f"decode must be best or each, got {self.decode!r}")
        if self.layout not in ("packed", "longest") and not self.layout.isdecimal():
            raise ValueError(f"layout must be packed, longest or a length, got {self.layout!r}")


RECIPES = {
    # Compared on held-out parts of engtrain, as benchmarks/choose_recipe.py does.
    "default": Recipe(
        lr=3e-4,
        epochs=4,
        batch_size=32,
        warmup=0.1,
        weight_decay=0.01,
        eps=1e-8,
        clip=1.0,
        optimizer="torch",
        layout="packed",
        bucket=1,
        average=1.0,
        decode="best",
    ),
    # The MIT Movie paper's. Its notebook has no warm-up, its text says that the rate rises from 0:
    # --warmup 0.1 gives the second reading.
    "paper": Recipe(
        lr=5e-5,
        epochs=4,
        batch_size=32,
        warmup=0.0,
        weight_decay=0.0,
        eps=1e-8,
        clip=1.0,
        optimizer="torch",
        layout="50",
        bucket=1,
        average=math.inf,
        decode="each",
    ),
}


def train(options: argparse.Namespace, recipe: Recipe) -> None:
    """Fine-tune, evaluate after every epoch, keep the best and the last model."""
    device = choose_device(options.device)
    dtype, reason = choose_dtype(options.dtype, device)
    print(f"{device}, {name_of(dtype)} ({reason})\n{recipe}")

    # Data and model.
    train_set, evaluated = corpus(options)
    labels = data.labels_of(train_set.sentences)
    directory = hub.locate_model(options.model)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = BertForTokenClassification.from_pretrained(
        directory,
        labels=labels,
        attn_implementation=options.attn,
        device=device,
        seed=options.seed,
    )
    print(f"{options.model}: {model.load_report}")
    tagger = Tagger(model, tokenizer, well_formed=recipe.decode == "best")
    max_length = model.config.max_position_embeddings
    if recipe.layout.isdecimal():
        max_length = min(max_length, int(recipe.layout))
    examples = data.examples_of(
        [sentence.words for sentence in train_set.sentences],
        tokenizer,
        max_length,
        data.label_ids(train_set.sentences, labels, train_set.source),
    )
    lengths = [len(example.ids) for example in examples]

    # Optimiser and schedule: the learning rate is a pure function of the step.
    optimizer, reason = choose_adamw(
        bert_groups(model, recipe.weight_decay), recipe.optimizer, recipe.eps, options.plain_adamw
    )
    print(f"attention {model.attn_implementation}, AdamW {reason}")
    average = WeightAverage(model.parameters(), recipe.average)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = LossScaler() if dtype == torch.float16 else None
    batches_per_epoch = math.ceil(len(examples) / recipe.batch_size)
    total_steps = math.ceil(batches_per_epoch / recipe.accumulate) * recipe.epochs
    warmup_steps = int(recipe.warmup * total_steps)

    losses: list[float] = []
    log: list[dict] = []
    best_f1, step = -1.0, 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        batches = data.epoch_batches(lengths, recipe.batch_size, options.seed, epoch, recipe.bucket)
        groups = list(data.chunks(batches, recipe.accumulate))
        bar = tqdm(groups, f"epoch {epoch}", unit="step")
        for group in bar:
            started = time.perf_counter()
            micro_batches = [
                collate([examples[i] for i in batch], recipe.layout, tokenizer.pad_id, device)
                for batch in group
            ]
            words = sum(len(batch.first_W) for batch in micro_batches)
            loss = torch.zeros((), device=device)
            for batch in micro_batches:
                with autocast:
                    # Every word of the step weighs the same, whichever batch it is in.
                    share = model(**batch.inputs).loss * (len(batch.first_W) / words)
                (share * scaler.scale if scaler else share).backward()
                loss += share.detach()
            lr = recipe.lr * linear_schedule(step, total_steps, warmup_steps)
            optimizer.clipped_step(lr, recipe.clip, scaler)
            optimizer.zero_grad()
            step += 1
            average.update(step)

            losses.append(loss.item())
            if not math.isfinite(losses[-1]) and scaler is None:
                raise MinibertError(
                    f"step {step}: the loss is {losses[-1]}: lower --lr or train in --dtype fp32"
                )
            tokens = sum(batch.tokens for batch in micro_batches)
            speed = tokens / (time.perf_counter() - started)
            log.append(
                {"step": step, "epoch": epoch, "loss": losses[-1], "lr": lr, "tokens_per_s": speed}
            )
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:.0f} tokens/s", refresh=False)

        # What the model can do after this epoch.
        model.eval()
        with average.swapped_in():
            for name, part in evaluated.items():
                report = evaluate(tagger, part.sentences, part.source)
                print(f"epoch {epoch}, {name}: {report.summary()}")
                scores = {
                    "entity_f1": report.entity.micro.f1,
                    "token_micro_f1_including_O": report.token.micro_with_o,
                }
                log.append({"step": step, "epoch": epoch, "set": name} | scores)
                if name == "dev" and scores["entity_f1"] > best_f1:
                    best_f1 = scores["entity_f1"]
                    save(model, tokenizer, options.output / "best")
            save(model, tokenizer, options.output / "last")
        write_text(options.output / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in log))

    # What is left behind: the curve, and the scores of the last epoch on the set evaluated last.
    print(f"\ntraining loss\n{text_curve(losses)}")
    f1s: list[tuple[int, float]] = []
    if evaluated:
        print(f"\n{name} set, last epoch: {report.table()}")
        write_text(options.output / "report.json", json.dumps(report.to_dict(), indent=2) + "\n")
        f1s = [
            (entry["step"], 100 * entry["entity_f1"]) for entry in log if entry.get("set") == name
        ]
    try:
        write_png(losses, f1s, options.output / "loss.png")
    except ImportError:
        print("no loss.png: it needs minibert[plot]")
    print(f"\nsaved to {options.output}")


@dataclass(frozen=True)
class Part:
    """Sentences and the file they are from."""

    sentences: list[Sentence]
    source: str


def corpus(options: argparse.Namespace) -> tuple[Part, dict[str, Part]]:
    """The training sentences, and the sets to evaluate on: "dev" and "test", in this order."""
    if options.train is not None:
        train_part = Part(data.read_bio(options.train, options.orphans), str(options.train))
        parts = {}
        if options.test is not None:
            parts["test"] = Part(data.read_bio(options.test, options.orphans), str(options.test))
    elif options.corpus == "demo":
        train_sentences, test_sentences = democorpus.generate()
        train_part = Part(train_sentences, "demo corpus")
        parts = {"test": Part(test_sentences, "demo corpus")}
    else:
        folder = hub.locate_corpus(options.corpus)
        train_file, test_file = folder / "engtrain.bio", folder / "engtest.bio"
        train_part = Part(data.read_bio(train_file), str(train_file))
        parts = {"test": Part(data.read_bio(test_file), str(test_file))}
    if options.dev is None:
        return train_part, parts
    if Path(options.dev).is_file():
        dev = data.read_bio(Path(options.dev), options.orphans)
        return train_part, {"dev": Part(dev, options.dev)} | parts
    try:
        share = float(options.dev)
    except ValueError:
        share = 0.0
    count = round(share * len(train_part.sentences))
    if not 0 < count < len(train_part.sentences):
        raise MinibertError(
            f"--dev {options.dev}: neither a file nor a share of the training sentences: "
            "give a BIO file or a number such as 0.1"
        )
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(train_part.sentences), generator=generator).tolist()
    held_out = [train_part.sentences[i] for i in order[:count]]
    kept = [train_part.sentences[i] for i in order[count:]]
    dev_part = Part(held_out, train_part.source)
    return Part(kept, train_part.source), {"dev": dev_part} | parts


def collate(examples: list[Example], layout: str, pad_id: int, device: torch.device) -> Batch:
    """A batch in the layout of the recipe."""
    if layout == "packed":
        return data.packed(examples, device)
    length = None if layout == "longest" else int(layout)
    return data.padded(examples, pad_id, length, device)


def save(model: BertForTokenClassification, tokenizer: Tokenizer, directory: Path) -> None:
    """A directory that ``Tagger.from_pretrained`` and transformers open."""
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def parse() -> tuple[argparse.Namespace, Recipe]:
    """The command line, and the recipe with whatever it changes."""
    parser = argparse.ArgumentParser(description="Fine-tune BERT for named entities.")
    parser.add_argument("--model", default="bert-base-cased", help="name or directory")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--corpus", choices=("mit_movie", "demo"), default="mit_movie")
    parser.add_argument("--train", type=Path, metavar="FILE", help="BIO file instead of a corpus")
    parser.add_argument("--test", type=Path, metavar="FILE", help="BIO file to look at")
    parser.add_argument("--dev", metavar="FILE|SHARE", help="choose the best epoch on this")
    parser.add_argument("--orphans", choices=("refuse", "repair"), default="refuse")
    parser.add_argument("--attn", choices=("auto", *IMPLEMENTATIONS), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of autocast")
    parser.add_argument(
        "--plain-adamw", action="store_true", help="one operation at a time: the reference's bits"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    changes = parser.add_argument_group("changes to the recipe")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        changes.add_argument(flag, type=type(getattr(RECIPES["paper"], field.name)))
    options = parser.parse_args()
    given = {f.name: vars(options)[f.name] for f in fields(Recipe)}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        return options, replace(RECIPES[options.recipe], **changed)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    try:
        train(*parse())
    except MinibertError as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
