"""The tables of docs/baselines.md and README.md: every system on MIT Movie.

    make compare                                              all of them, three seeds
    python -m benchmarks.systems --systems bilstm-crf --device cuda

Each system's newest result file counts, so that they can be run on different days and machines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import runs
from minibert.study.systems import SEEDLESS, SYSTEMS, Measured, Plan, run, table

PAGE = runs.ROOT / "docs" / "baselines.md"
NOT_RUN = "Not run yet: {}."
README = runs.ROOT / "README.md"
SHORT = ("system", "parameters", "entity F1", "token micro-F1 with O", "reported", "seeds")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    corpus = {"train": None, "test": None, "corpus": "mit_movie", "orphans": "refuse"}
    chosen = argparse.Namespace(**corpus, model="minilm", device=options.device)
    for system in options.systems:
        seeds = (0,) if system in SEEDLESS else tuple(options.seeds)
        measured = [asdict(found) for found in run(Plan([system], seeds, chosen))]
        runs.keep(f"systems-{system}", {"runs": measured})
        refresh(runs.RESULTS)


def refresh(folder: Path) -> None:
    """Regenerate both tables."""
    runs.replace_section(PAGE, "compare", section(folder))
    runs.replace_section(README, "compare", section(folder, SHORT))


def section(folder: Path, only: Sequence[str] = ()) -> str:
    """The newest results of all systems as a table with these columns, and where they are from."""
    measured: list[Measured] = []
    sources: dict[str, list[str]] = {}
    missing = []
    for system in SYSTEMS:
        paths = sorted(folder.glob(f"systems-{system}-2*.json"))
        if not paths:
            missing.append(system)
            continue
        found = json.loads(paths[-1].read_text())
        measured += [Measured(**of_seed) for of_seed in found["runs"]]
        threads = found["machine"]["threads"]
        source = f"{found['machine']['device']}, {threads} thread{'s' * (threads > 1)}, "
        sources.setdefault(source + found["date"], []).append(system)
    ran = "; ".join(f"{', '.join(systems)} on {source}" for source, systems in sources.items())
    lines = [table(measured, only), "", f"`make compare`{': ' if ran else ''}{ran}."]
    if missing:
        lines += ["", NOT_RUN.format(", ".join(missing))]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
