"""How train.py's recipes were chosen: candidates on a held-out tenth of engtrain.

    python -m benchmarks.choose_recipe [--seeds 0 1 2] [--only 0 3]

Each run trains MiniLM on nine sentences of ten and is scored on the tenth after the last epoch.
engtest is not read. The newest results are kept; a new run replaces the one with its candidate and
seed. The table of docs/reproducing-the-paper.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import markdown
from benchmarks.runs import RESULTS, ROOT, keep, replace_section, train
from benchmarks.scores import cell
from minibert.pretrained import hub
from minibert.text.bio import read_bio, write_bio

# Changes to the default recipe; "pretrain": epochs of masked-LM training on the same words before.
CANDIDATES = (
    {},
    {"average": "inf"},
    {"average": "3"},
    {"lr": "2e-4"},
    {"lr": "4e-4"},
    {"epochs": "6"},
    {"head": "crf"},
    {"pretrain": "10"},
    {"r-drop": "1"},
    {"r-drop": "2"},
    {"r-drop": "3"},
    {"r-drop": "1", "epochs": "6"},
    {"r-drop": "2", "epochs": "6"},
    {"r-drop": "1", "hide": "0.15", "epochs": "6"},
    {"entity-cost": "1"},
    {"r-drop": "1", "entity-cost": "1"},
    *({"r-drop": "1", "epochs": "6", "entity-cost": x} for x in ("0.5", "1")),
    *(
        {"r-drop": "1", "hide": "0.15", "epochs": "6", "entity-cost": x}
        for x in ("0.5", "1", "1.5")
    ),
)
PAGE = ROOT / "docs" / "reproducing-the-paper.md"
SCORES = ("entity_f1", "token_micro_f1_including_O")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare recipes on held-out training sentences.")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0,))
    parser.add_argument(
        "--only", type=int, nargs="*", default=range(len(CANDIDATES)), help="candidates, by number"
    )
    options = parser.parse_args()
    _, runs = newest(RESULTS)
    for candidate in (CANDIDATES[number] for number in options.only):
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                log, seconds = run(candidate, seed, Path(scratch))
            last = [entry for entry in log if entry.get("set") == "dev"][-1]
            scores = {name: last[name] for name in SCORES}
            runs = [run for run in runs if (run["recipe"], run["seed"]) != (candidate, seed)]
            runs.append({"recipe": candidate, "seed": seed, "seconds": round(seconds)} | scores)
            print(runs[-1], flush=True)
            keep("recipe-minilm", {"held_out": "every tenth sentence", "runs": runs})
    replace_section(PAGE, "recipes", table(RESULTS))


def table(folder: Path) -> str:
    """The candidates of the newest result file."""
    name, runs = newest(folder)
    rows = []
    for candidate in CANDIDATES:
        if found := [run for run in runs if run["recipe"] == candidate]:
            flags = " ".join(f"--{flag} {value}" for flag, value in candidate.items())
            scores = [cell([100 * run[score] for run in found]) for score in SCORES]
            rows.append([f"`{flags}`" if flags else "none", *scores, str(len(found))])
    head = ["change to the default recipe", "entity F1", "token micro-F1 with O", "seeds"]
    return f"{markdown(head, rows)}\n\nFrom `benchmarks/results/{name}`."


def newest(folder: Path) -> tuple[str, list[dict]]:
    """The name of the newest result file, and its runs."""
    path = sorted(folder.glob("recipe-minilm-2*.json"))[-1]
    return path.name, json.loads(path.read_text())["runs"]


def run(candidate: dict[str, str], seed: int, scratch: Path) -> tuple[list[dict], float]:
    """Train a candidate; returns its ``metrics.jsonl`` and the seconds of fine-tuning."""
    sentences = read_bio(hub.locate_corpus("mit_movie") / "engtrain.bio")
    held_out = write_bio(scratch / "held-out.bio", sentences[::10])
    training = write_bio(scratch / "training.bio", [s for i, s in enumerate(sentences) if i % 10])
    model, changes = "minilm", dict(candidate)
    if epochs := changes.pop("pretrain", None):
        command = [sys.executable, "-m", "minibert", "pretrain", "--model", model]
        command += ["--bio", training, "--output", scratch / "language", "--epochs", epochs]
        subprocess.run([*command, "--lr", "3e-4", "--average", "1"], check=True)
        model = str(scratch / "language" / "last")
    flags = [part for name, value in changes.items() for part in (f"--{name}", value)]
    return train(
        scratch / "run",
        *("--model", model, "--train", str(training), "--dev", str(held_out)),
        *("--seed", str(seed), *flags),
    )


if __name__ == "__main__":
    main()
