"""Which learning rate, and may batches be of like length? Tried on a held-out tenth of engtrain.

    python -m benchmarks.choose_recipe        one training run a candidate, MiniLM, four epochs

engtest is not read. The best dev entity F1 becomes the default recipe of train.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.runs import keep, train
from minibert import hub

CANDIDATES = (
    {"lr": "3e-4", "bucket": "1"},
    {"lr": "3e-4", "bucket": "50"},
    {"lr": "2e-4", "bucket": "1"},
)


def main() -> None:
    training_file = hub.locate_corpus("mit_movie") / "engtrain.bio"
    tried: list[dict] = []
    for candidate in CANDIDATES:
        flags = [part for name, value in candidate.items() for part in (f"--{name}", value)]
        with tempfile.TemporaryDirectory() as scratch:
            log, seconds = train(
                Path(scratch) / "run",
                *("--model", "minilm", "--train", str(training_file), "--dev", "0.1", *flags),
            )
        epochs = [entry for entry in log if entry.get("set") == "dev"]
        tried.append(candidate | {"seconds": round(seconds), "epochs": epochs})
        print(candidate, [f"{entry['entity_f1']:.2%}" for entry in epochs], flush=True)
        keep("recipe-minilm", {"held_out": 0.1, "seed": 0, "tried": tried})


if __name__ == "__main__":
    main()
