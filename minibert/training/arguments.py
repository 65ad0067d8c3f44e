"""The command lines of train.py, ``minibert train`` and ``minibert pretrain``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_type_hints

from minibert.machine import DTYPES
from minibert.model.heads import TOKEN_HEADS
from minibert.training.recipe import (
    PRETRAINING,
    RECIPES,
    PretrainingRecipe,
    Recipe,
    TaggingRecipe,
)

R = TypeVar("R", bound=Recipe)
CHECKPOINT = (
    "the directory of a model or a run (its best model, else its last), a name that "
    "`minibert download` knows, or OWNER/NAME on the Hugging Face hub"
)
LARGEST_SEED = 10**12  # torch takes 64 bits, and epochs take the seed times 1,000,003


def parse(
    argv: Sequence[str] | None = None, program: str = "train.py"
) -> tuple[argparse.Namespace, TaggingRecipe]:
    """The options, and the recipe with the changes that the command line makes to it.

    Args:
        argv: the arguments; None takes those of the process.
        program: its name in usage and errors.

    A command line that is wrong ends the process with status 2.
    """
    parser = argparse.ArgumentParser(program, description="Fine-tune BERT for named entities.")
    add = parser.add_argument
    add(
        "--model",
        default="bert-base-cased",
        metavar="MODEL",
        help=f"the checkpoint to start from: {CHECKPOINT} (default: bert-base-cased)",
    )
    add(
        "--corpus",
        choices=("mit_movie", "demo"),
        default="mit_movie",
        help="train and test on MIT Movie, or on a small generated corpus (default: mit_movie)",
    )
    add("--train", type=Path, metavar="FILE", help="train on this BIO file instead of --corpus")
    add(
        "--test",
        type=Path,
        metavar="FILE",
        help="with --train: evaluate on this BIO file after every epoch; nothing is chosen by it",
    )
    add(
        "--dev",
        metavar="FILE|SHARE",
        help="save the epoch with the highest entity F1 on this BIO file, or on this share (such "
        "as 0.1) of the training sentences, which are then held out (default: save only the last)",
    )
    add(
        "--orphans",
        choices=("refuse", "repair"),
        default="refuse",
        help="what to do with an I- tag that continues no entity in your files: stop, or read it "
        "as B- (default: refuse)",
    )
    add(
        "--head",
        choices=TOKEN_HEADS,
        default="linear",
        help="what labels the words: linear, each on its own; crf: a chain of labels on top of it, "
        "trained with it (default: linear)",
    )
    add(
        "--recipe",
        choices=RECIPES,
        default="default",
        help="where the values below come from: ours; accurate, ours for better scores by three "
        "times as many passes; or those of the MIT Movie paper (default: default)",
    )
    _add_running(parser)
    options = _parsed(parser, argv, RECIPES)
    if options.graphs and options.head != "linear":
        parser.error("--graphs needs --head linear: a chain of labels has no fixed length")
    recipe = _recipe(parser, options, RECIPES[options.recipe])
    if recipe.r_drop and options.head != "linear":
        parser.error(
            f"--head {options.head} needs --r-drop 0 --hide 0: R-Drop compares the probabilities "
            "of each word alone"
        )
    return options, recipe


def parse_pretraining(
    argv: Sequence[str] | None = None, program: str = "minibert pretrain"
) -> tuple[argparse.Namespace, PretrainingRecipe]:
    """The same for ``minibert pretrain``."""
    parser = argparse.ArgumentParser(program, description="Train BERT to fill in hidden words.")
    add = parser.add_argument
    add(
        "--model",
        default="bert-base-cased",
        metavar="MODEL",
        help=f"the checkpoint to continue from: {CHECKPOINT} (default: bert-base-cased)",
    )
    add(
        "--from-scratch",
        action="store_true",
        help="take only config.json and the tokenizer from --model, and draw new weights",
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, metavar="FILE", help="train on this text, line by line")
    text.add_argument(
        "--bio",
        type=Path,
        metavar="FILE",
        help="train on the words of this BIO file; its entities are the wholes of --masking whole",
    )
    add(
        "--phrases",
        type=Path,
        metavar="FILE",
        help="with --text: a phrase per line; the wholes of --masking whole",
    )
    add(
        "--dev",
        metavar="FILE|SHARE",
        help="measure loss and accuracy after every epoch on this file of the same kind, or on "
        "this share (such as 0.1) of the training lines, which are then held out",
    )
    _add_running(parser)
    options = _parsed(parser, argv, {"default": PRETRAINING})
    recipe = _recipe(parser, options, PRETRAINING)
    if options.phrases is not None and options.text is None:
        parser.error("--phrases goes with --text")
    if recipe.masking == "whole" and options.bio is None and options.phrases is None:
        parser.error("--masking whole needs --bio, or --text with --phrases")
    return options, recipe


def _add_running(parser: argparse.ArgumentParser) -> None:
    """The options of every training run besides its recipe."""
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where models, scores and checkpoints are written (required)",
    )
    add(
        "--attn",
        choices=("auto", "eager", "sdpa", "fused"),
        default="auto",
        help="attention implementation; auto takes the fastest that runs here (default: auto)",
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype of autocast, weights stay fp32; auto takes what the hardware multiplies "
        "natively (default: auto)",
    )
    add(
        "--plain-adamw",
        action="store_true",
        help="run AdamW one torch operation at a time, for the bits of torch.optim.AdamW",
    )
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="replay forward and backward pass as CUDA graphs, which saves launch time with small "
        "batches; needs --attn fused, --layout packed, --accumulate 1 and one process (default: "
        "where they run)",
    )
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the new classifier, the order of the sentences and dropout (default: 0)",
    )
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add(
        "--checkpoint-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="optimiser steps between checkpoints; every epoch also ends with one (default: 500)",
    )
    add(
        "--keep",
        type=int,
        default=0,
        metavar="N",
        help="how many checkpoints to keep when the run is done, the newest ones (default: 0); "
        "while it lasts, at least two are kept",
    )
    add("--overwrite", action="store_true", help="replace the finished run in --output")


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, recipes: Mapping[str, Recipe]
) -> argparse.Namespace:
    """The options, after a flag for each field of a recipe has been added."""
    changes = parser.add_argument_group("changes to the recipe")
    for name, field in _fields(next(iter(recipes.values()))).items():
        values = ", ".join(f"{recipe}: {vars(recipes[recipe])[name]}" for recipe in recipes)
        changes.add_argument(
            "--" + name.replace("_", "-"),
            type=field.__origin__,
            metavar={int: "N", float: "X", str: "NAME"}[field.__origin__],
            help=f"{field.__metadata__[0]} ({values})",
        )
    options = parser.parse_args(argv)
    if options.checkpoint_every < 1 or options.keep < 0:
        parser.error("--checkpoint-every must be above 0, and --keep not below")
    if options.resume and options.overwrite:
        parser.error("--resume continues a run and --overwrite replaces one: give one of them")
    if abs(options.seed) > LARGEST_SEED:
        parser.error(f"--seed must be between -{LARGEST_SEED} and {LARGEST_SEED}")
    return options


def _recipe(parser: argparse.ArgumentParser, options: argparse.Namespace, recipe: R) -> R:
    """The recipe with the changes of the command line."""
    given = {name: vars(options)[name] for name in _fields(recipe)}
    try:
        return replace(
            recipe, **{name: value for name, value in given.items() if value is not None}
        )
    except ValueError as error:
        parser.error(str(error))


def _fields(recipe: Recipe) -> dict:
    return get_type_hints(type(recipe), include_extras=True)
