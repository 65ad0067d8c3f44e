"""What a training run is asked for: the recipe, the command line, the corpus."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from minibert.files import MinibertError, sha256_of
from minibert.machine import DTYPES
from minibert.pretrained import hub
from minibert.text import bio, demo
from minibert.text.bio import Sentence
from minibert.training.adamw import SEMANTICS


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


@dataclass(frozen=True)
class Part:
    """Sentences and the file they are from."""

    sentences: list[Sentence]
    source: str


def corpus(options: argparse.Namespace) -> tuple[Part, dict[str, Part]]:
    """The training sentences, and the sets to evaluate on: "dev" and "test", in this order."""
    if options.train is not None:
        train_part = Part(bio.read_bio(options.train, options.orphans), str(options.train))
        parts = {}
        if options.test is not None:
            parts["test"] = Part(bio.read_bio(options.test, options.orphans), str(options.test))
    elif options.corpus == "demo":
        train_sentences, test_sentences = demo.generate()
        train_part = Part(train_sentences, "demo corpus")
        parts = {"test": Part(test_sentences, "demo corpus")}
    else:
        folder = hub.locate_corpus(options.corpus)
        train_file, test_file = folder / "engtrain.bio", folder / "engtest.bio"
        train_part = Part(bio.read_bio(train_file), str(train_file))
        parts = {"test": Part(bio.read_bio(test_file), str(test_file))}
    if options.dev is None:
        return train_part, parts
    if Path(options.dev).is_file():
        dev = bio.read_bio(Path(options.dev), options.orphans)
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


def arguments_of(
    recipe: Recipe,
    seed: int,
    dtype: str,
    attention: str,
    adamw: str,
    directory: Path,
    parts: dict[str, Part],
    graphs: bool,
) -> dict[str, str]:
    """What decides the result of a run, by name: a run is resumed with the same only.

    Args:
        recipe, seed, dtype, attention, adamw: as chosen.
        directory: of the model that is trained; its files count, not its name.
        parts: the sentences, by what they are for; they count, not their files' names.
        graphs: batches are filled up, and so draw other dropout masks.
    """
    values = {name: str(value) for name, value in asdict(recipe).items()}
    values |= {"seed": str(seed), "dtype": dtype, "attention": attention, "AdamW": adamw}
    if graphs:
        values["CUDA graphs"] = "on"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt"):
        if (directory / name).is_file():
            values[f"the model's {name}"] = sha256_of(directory / name)
    for name, part in parts.items():
        content = json.dumps([(s.words, s.tags) for s in part.sentences])
        values[f"the {name} data"] = hashlib.sha256(content.encode()).hexdigest()
    return values


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """The command line, and the recipe with whatever it changes."""
    parser = argparse.ArgumentParser(description="Fine-tune BERT for named entities.")
    parser.add_argument("--model", default="bert-base-cased", help="name or directory")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--corpus", choices=("mit_movie", "demo"), default="mit_movie")
    parser.add_argument("--train", type=Path, metavar="FILE", help="BIO file instead of a corpus")
    parser.add_argument("--test", type=Path, metavar="FILE", help="BIO file to look at")
    parser.add_argument("--dev", metavar="FILE|SHARE", help="choose the best epoch on this")
    parser.add_argument("--orphans", choices=("refuse", "repair"), default="refuse")
    parser.add_argument("--attn", choices=("auto", "eager", "sdpa", "fused"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of autocast")
    parser.add_argument(
        "--plain-adamw", action="store_true", help="one operation at a time: the reference's bits"
    )
    parser.add_argument(
        "--graphs", action="store_true", help="CUDA graphs: one launch for the passes of a step"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="the last N checkpoints")
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    changes = parser.add_argument_group("changes to the recipe")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        changes.add_argument(flag, type=type(getattr(RECIPES["paper"], field.name)))
    options = parser.parse_args(argv)
    if options.checkpoint_every < 1 or options.keep < 1:
        parser.error("--checkpoint-every and --keep must be above 0")
    given = {f.name: vars(options)[f.name] for f in fields(Recipe)}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        return options, replace(RECIPES[options.recipe], **changed)
    except ValueError as error:
        parser.error(str(error))
