"""The table of docs/baselines.md: every system on MIT Movie.

    make compare                                              all of them, three seeds
    python -m benchmarks.systems --systems bilstm-crf --device cuda

Each system's newest result file counts, so that they can be run on different days and machines.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks import runs
from minibert.study.systems import SEEDLESS, SYSTEMS, Measured, Plan, run, table

PAGE = runs.ROOT / "docs" / "baselines.md"
NOT_RUN = "Not run yet: {}."


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
        runs.replace_section(PAGE, "compare", section(runs.RESULTS))


def section(folder: Path) -> str:
    """The newest results of all systems as a table, and where they are from."""
    measured: list[Measured] = []
    sources, missing = [], []
    for system in SYSTEMS:
        paths = sorted(folder.glob(f"systems-{system}-2*.json"))
        if not paths:
            missing.append(system)
            continue
        found = json.loads(paths[-1].read_text())
        measured += [Measured(**of_seed) for of_seed in found["runs"]]
        sources.append(f"{system} on {found['machine']['device']}, {found['date']}")
    lines = [table(measured), "", f"`make compare`{': ' if sources else ''}{'; '.join(sources)}."]
    if missing:
        lines += ["", NOT_RUN.format(", ".join(missing))]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
