"""Accuracy on MIT Movie: MiniLM fine-tuned by minibert and by transformers over several seeds.

    make scores                                      both, five seeds, and README.md's table
    python -m benchmarks.scores --only accurate      minibert with --recipe accurate
    python -m benchmarks.scores --only plain         minibert with the plain AdamW
    python -m benchmarks.scores --seeds 0 --epochs 1 --train FILE --test FILE --output DIR

transformers trains its own BertForTokenClassification in a plain loop with minibert's recipe: the
same initial weights, batches, learning rate, weight decay, clipping and autocast. Two parts differ:
it pads where minibert packs, which changes the dropout masks, and it does not average the weights.
Both are evaluated by the same code in float32, decoded with Viterbi and with argmax.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import runs
from benchmarks.report import markdown
from minibert import BertForTokenClassification
from minibert.machine import choose_device, choose_dtype
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.tagging.evaluate import evaluate
from minibert.tagging.tagger import Tagger
from minibert.text import bio
from minibert.text.batches import epoch_batches, examples_of, padded
from minibert.training.recipe import RECIPES, Recipe

COLUMNS = {  # of the table: result file and command
    "minibert": ("scores-minilm", "make scores"),
    "accurate recipe": ("scores-minilm-accurate", "python -m benchmarks.scores --only accurate"),
    "plain AdamW": ("scores-minilm-plain", "python -m benchmarks.scores --only plain"),
    "transformers": ("scores-minilm-transformers", "make scores"),
}
FILES = {title.split()[0]: file for title, (file, _) in COLUMNS.items()}
ROWS = {
    "entity_f1": "entity F1, Viterbi",
    "entity_f1_argmax": "entity F1, argmax",
    "token_micro_f1_including_O": "token micro-F1 including O, Viterbi",
    "token_micro_f1_including_O_argmax": "token micro-F1 including O, argmax",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FILES, default=("minibert", "transformers"))
    parser.add_argument("--seeds", type=int, nargs="*", default=range(5), help="none: --add alone")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--train", type=Path, metavar="FILE", help="instead of MIT Movie's")
    parser.add_argument("--test", type=Path, metavar="FILE", help="instead of MIT Movie's")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="results of other seeds")
    parser.add_argument("--output", type=Path, help="write here, and change no document")
    options = parser.parse_args(arguments)
    train_file = options.train or hub.locate_corpus("mit_movie") / "engtrain.bio"
    test_file = options.test or hub.locate_corpus("mit_movie") / "engtest.bio"
    folder = options.output or runs.RESULTS
    for name in options.only:
        added = [path for path in options.add if path.stem[:-11] == FILES[name]]
        found = [run for path in added for run in json.loads(path.read_text())["runs"]]
        recipe_name = name if name in RECIPES else "default"
        recipe = RECIPES[recipe_name]
        recipe = replace(recipe, epochs=recipe.epochs if options.epochs is None else options.epochs)
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                started = time.perf_counter()
                if name == "transformers":
                    model_dir = train_transformers(Path(scratch), train_file, recipe, seed)
                else:
                    flags = ["--model", "minilm", "--train", str(train_file), "--seed", str(seed)]
                    flags += ["--recipe", recipe_name, "--epochs", str(recipe.epochs)]
                    flags += ["--plain-adamw"] * (name == "plain")
                    runs.train(Path(scratch), *flags)
                    model_dir = Path(scratch) / "last"
                seconds = round(time.perf_counter() - started)
                found.append({"seed": seed, "seconds": seconds} | scores(model_dir, test_file))
            print(name, found[-1], flush=True)
            keep(name, recipe, found, folder)
        keep(name, recipe, found, folder)
    if options.output is None:
        runs.replace_section(runs.ROOT / "README.md", "scores", table(folder))
    else:
        print(table(folder))


def keep(name: str, recipe: Recipe, found: list[dict], folder: Path) -> None:
    """Write the runs so far."""
    found.sort(key=lambda run: run["seed"])
    runs.keep(FILES[name], {"epochs": recipe.epochs, "runs": found}, folder)


def train_transformers(output: Path, train_file: Path, recipe: Recipe, seed: int) -> Path:
    """Fine-tune transformers' BertForTokenClassification; returns the directory it is saved to."""
    import transformers

    device = choose_device()
    dtype = choose_dtype("auto", device).value
    sentences = bio.read_bio(train_file)
    labels = bio.labels_of(sentences)
    directory = hub.locate_model("minilm")
    tokenizer = Tokenizer.from_pretrained(directory)
    # minibert draws the new classifier, so that both start from the same weights and go on with the
    # same random numbers.
    start = BertForTokenClassification.from_pretrained(directory, labels=labels, seed=seed)
    start.save_pretrained(output)
    tokenizer.save_pretrained(output)
    with torch.random.fork_rng():
        model = transformers.AutoModelForTokenClassification.from_pretrained(output)
    model.to(device).train()

    words = [sentence.words for sentence in sentences]
    ids = bio.label_ids(sentences, labels, train_file)
    examples = examples_of(words, tokenizer, model.config.max_position_embeddings, ids)
    groups: dict[float, list[torch.nn.Parameter]] = {recipe.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or "LayerNorm" in name
        groups[0.0 if spared else recipe.weight_decay].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()],
        lr=recipe.lr,
        eps=recipe.eps,
    )
    steps = recipe.epochs * math.ceil(len(examples) / recipe.batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, int(recipe.warmup * steps), steps
    )
    lengths = [len(example.ids) for example in examples]
    for epoch in range(1, recipe.epochs + 1):
        batches = epoch_batches(lengths, recipe.batch_size, seed, epoch)
        for chosen in tqdm(batches, f"transformers, epoch {epoch}"):
            batch = padded([examples[i] for i in chosen], tokenizer.pad_id, device=device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(**batch.inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(output)
    return output


def scores(model_dir: Path, test_file: Path) -> dict[str, float]:
    """Of a saved model, in float32 with plain layers, by both decodings."""
    sentences = bio.read_bio(test_file)
    found = {}
    for suffix, well_formed in (("", True), ("_argmax", False)):
        tagger = Tagger.from_pretrained(
            model_dir, dtype="fp32", prepack=False, well_formed=well_formed
        )
        report = evaluate(tagger, sentences, test_file)
        found[f"entity_f1{suffix}"] = report.entity.micro.f1
        found[f"token_micro_f1_including_O{suffix}"] = report.token.micro_with_o
    return found


def table(folder: Path = runs.RESULTS) -> str:
    """The newest results side by side; "not run" where there is none."""
    head, sources = ["MiniLM on engtest"], []
    rows = [[title] for title in ROWS.values()]
    for title, (file, command) in COLUMNS.items():
        paths = sorted(folder.glob(f"{file}-2*.json"))
        result = json.loads(paths[-1].read_text()) if paths else {"runs": []}
        found = result["runs"]
        head.append(f"{title}, {len(found)} seeds" if found else title)
        if paths:
            sources.append(f"`{paths[-1].name}` (`{command}`, {result['machine']['dtype']})")
        for row, key in zip(rows, ROWS):
            row.append(cell([100 * run[key] for run in found if key in run]))
    accurate, default = RECIPES["accurate"], RECIPES["default"]
    return (
        f"{markdown(head, rows)}\n\nAll columns share initial weights, seeds, batches and peak "
        "learning rate; transformers pads and does not average the weights. The accurate recipe "
        f"takes {accurate.epochs} epochs, runs every batch twice and has an entity cost of "
        f"{accurate.entity_cost}; the others take {default.epochs} epochs.\n"
        f"From `benchmarks/results/`: {', '.join(sources)}."
    )


def cell(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not run"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
