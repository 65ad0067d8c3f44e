"""MIT Movie with MiniLM over five seeds, by the default recipe; refreshes the README's table.

make scores                              the default, with AdamW in one pass
python -m benchmarks.scores --plain      the same with the plain AdamW
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.runs import RESULTS, ROOT, keep, replace_section, train

SHOWN = {
    "entity_f1": "entity F1 (seqeval default)",
    "token_micro_f1_including_O": "token micro-F1 including O",
}
# transformers with the same weights, its own loop, lr 2e-4, seed 0, after four epochs.
TRANSFORMERS = {"entity_f1": 87.79, "token_micro_f1_including_O": 94.23}


def main() -> None:
    parser = argparse.ArgumentParser(description="MIT Movie with MiniLM over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="*", default=range(5))
    parser.add_argument("--plain", action="store_true", help="with the plain AdamW")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="results of other seeds")
    options = parser.parse_args()
    name = "scores-minilm-plain" if options.plain else "scores-minilm"
    runs = [run for path in options.add for run in json.loads(path.read_text())["runs"]]
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = ["--model", "minilm", "--corpus", "mit_movie", "--seed", str(seed)]
            arguments += ["--plain-adamw"] * options.plain
            log, seconds = train(Path(scratch) / "run", *arguments)
        last = [entry for entry in log if entry.get("set") == "test"][-1]
        runs.append({"seed": seed, "seconds": round(seconds)} | {key: last[key] for key in SHOWN})
        print(runs[-1], flush=True)
        keep(name, {"runs": runs})  # what a run that is cut off has measured
    keep(name, {"runs": sorted(runs, key=lambda run: run["seed"])})
    replace_section(ROOT / "README.md", "scores", table())


def table() -> str:
    """The newest results of both, side by side."""
    columns, rows, sources = (
        ["engtest, MiniLM, 4 epochs"],
        [[shown] for shown in SHOWN.values()],
        [],
    )
    for title, name, command in (
        ("minibert", "scores-minilm", "make scores"),
        ("plain AdamW", "scores-minilm-plain", "python -m benchmarks.scores --plain"),
    ):
        if not (found := sorted(RESULTS.glob(f"{name}-2*.json"))):
            continue
        runs = json.loads(found[-1].read_text())["runs"]
        columns.append(f"{title}, {len(runs)} seeds")
        sources.append(f"`{found[-1].relative_to(ROOT)}`, written by `{command}`")
        for row, key in zip(rows, SHOWN):
            values = [100 * run[key] for run in runs]
            row.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
    columns.append("transformers, 1 seed")
    for row, key in zip(rows, SHOWN):
        row.append(f"{TRANSFORMERS[key]:.2f}")
    lines = [" | ".join(row) for row in (columns, ["---"] * len(columns), *rows)]
    origin = f"From {'; '.join(sources)}."
    return "\n".join([*(f"| {line} |" for line in lines), "", origin])


if __name__ == "__main__":
    main()
