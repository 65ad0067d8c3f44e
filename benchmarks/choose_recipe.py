"""How train.py's default recipe was chosen: candidates on held-out tenths of engtrain.

    python -m benchmarks.choose_recipe [--seeds 0 1 2] [--only 0 3] [--add A.json]

Each run trains MiniLM for four epochs. The seed also decides which tenth is held out. engtest is
not read. The default is the candidate with the best entity F1 after the last epoch, averaged over
the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.runs import keep, train
from minibert.pretrained import hub

CANDIDATES = (
    {"lr": "3e-4", "average": "1"},
    {"lr": "3e-4", "average": "inf"},
    {"lr": "2e-4", "average": "1"},
    {"lr": "4e-4", "average": "1"},
    {"lr": "3e-4", "average": "3"},
)
SCORES = ("entity_f1", "token_micro_f1_including_O")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare recipes on held-out training sentences.")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0,))
    parser.add_argument(
        "--only", type=int, nargs="*", default=range(len(CANDIDATES)), help="candidates, by number"
    )
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="results of other runs")
    options = parser.parse_args()
    training_file = hub.locate_corpus("mit_movie") / "engtrain.bio"
    runs = [run for path in options.add for run in json.loads(path.read_text())["runs"]]
    for seed in options.seeds:
        for candidate in (CANDIDATES[number] for number in options.only):
            flags = [part for name, value in candidate.items() for part in (f"--{name}", value)]
            with tempfile.TemporaryDirectory() as scratch:
                log, seconds = train(
                    Path(scratch) / "run",
                    *("--model", "minilm", "--train", str(training_file), "--dev", "0.1"),
                    *("--seed", str(seed), *flags),
                )
            last = [entry for entry in log if entry.get("set") == "dev"][-1]
            scores = {name: last[name] for name in SCORES}
            runs.append({"recipe": candidate, "seed": seed, "seconds": round(seconds)} | scores)
            print(runs[-1], flush=True)
            keep("recipe-minilm", {"held_out": 0.1, "runs": runs})
    for candidate in CANDIDATES:
        found = [run for run in runs if run["recipe"] == candidate]
        if found:
            means = [f"{statistics.mean(run[name] for run in found):.2%}" for name in SCORES]
            print(f"{candidate}: {' '.join(means)} ({len(found)} seeds)")


if __name__ == "__main__":
    main()
