"""README.md's short table and docs/speed.md, from the results of ``bench.py``.

python -m benchmarks.report     regenerates both
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import runs

Row = dict[str, Any]  # a contender's seconds and what else was found
Result = dict[str, Any]

PARTS = (
    "inference", "latency", "training", "startup", "memory", "accuracy", "profile", "adamw",
    "curves",
)  # fmt: skip
# minibert's contender in a part; of several, the first that was run is Tagger's default.
OURS = {
    "inference": ("minibert bf16, packed", "minibert fp16w, packed", "minibert fp32, packed"),
    "latency": ("minibert bf16", "minibert fp16w", "minibert fp32"),
    "training": ("minibert, packed",),
    "startup": ("minibert",),
    "adamw": ("minibert",),
}
# part, minibert, peer, speed-up: the targets for two cores with AMX.
TARGETS = (
    ("inference", "minibert bf16, packed", "transformers sdpa fp32, padded to longest", 9.0),
    ("inference", "minibert bf16, packed", "transformers sdpa bf16, padded to longest", 2.4),
    ("inference", "minibert bf16, packed", "transformers sdpa bf16, sorted by length", 1.6),
    ("inference", "minibert bf16, packed", "OpenVINO bf16, sorted by length", 1.3),
    ("inference", "minibert fp32, packed", "transformers sdpa fp32, sorted by length", 1.15),
    ("inference", "minibert int8, packed", "onnxruntime int8, sorted by length", 1.25),
    ("inference", "minibert int8, packed", "OpenVINO int8, sorted by length", 1.25),
    ("latency", "minibert fp32", "transformers sdpa fp32", 1.0),
    ("latency", "minibert fp32", "onnxruntime fp32", 1.0),
    ("latency", "minibert fp32", "OpenVINO fp32", 1.0),
    ("latency", "minibert bf16", "transformers sdpa bf16", 1.0),
    ("latency", "minibert bf16", "OpenVINO bf16", 1.0),
    ("latency", "minibert int8", "onnxruntime int8", 1.1),
    ("latency", "minibert int8", "OpenVINO int8", 1.1),
    ("training", "minibert, packed", "transformers, padded to longest, AdamW", 3.5),
    ("training", "minibert, packed", "transformers, padded to longest, AdamW(fused=True)", 2.5),
    ("startup", "minibert", "transformers", 1 / 0.45),
)
# README.md's rows: title, part, and what names of peers contain; the fastest of them counts.
CHOICES = (
    ("inference: transformers fp32, padded", "inference", "transformers sdpa fp32, padded to long"),
    ("inference: fastest fp32 peer", "inference", " fp32"),
    ("inference: fastest bf16 peer", "inference", " bf16"),
    ("inference: fastest int8 peer", "inference", " int8"),
    ("one sentence: fastest fp32 peer", "latency", " fp32"),
    ("one sentence: fastest bf16 peer", "latency", " bf16"),
    ("one sentence: fastest int8 peer", "latency", " int8"),
    ("training: transformers", "training", "transformers"),
    ("start-up: transformers", "startup", "transformers"),
)
FORMATS = {"fp16w": "fp16 weights"}


class Part:
    """One part of a result; a figure that was not measured is "".

    Args:
        result: as in the JSON file.
        name: of ``PARTS``.
    """

    def __init__(self, result: Result, name: str):
        self.name = name
        self.rows: dict[str, Row] = result["parts"].get(name, {})
        self.ours = next((ours for ours in OURS.get(name, ()) if ours in self.rows), None)
        self.peers = [name for name in self.rows if not name.startswith(("ceiling", "minibert"))]

    def rate(self, name: str) -> float:
        """Median real tokens per second; runs per second in a part without tokens."""
        return self.rows[name].get("tokens", 1) / self.rows[name]["median_s"]

    def peak(self, name: str) -> float:
        """The same of the fastest turn.

        Shares of a ceiling compare fastest turns: a disturbance only makes a turn slower, so the
        median of a disturbed ceiling could lie below what it bounds.
        """
        return self.rows[name].get("tokens", 1) / min(self.rows[name]["seconds"])

    def ceiling_of(self, name: str) -> str | None:
        """The ceiling of a contender's number format; None if it was not measured."""
        dtype = next((d for d in ("bf16", "fp16w", "int8") if d in name), "fp32")
        return next((c for c in ("ceiling", f"ceiling {dtype}") if c in self.rows), None)

    def speed_up(self, peer: str, ours: str | None = None) -> str:
        """Of Tagger's default, or against a peer in int8 of int8; of ``ours`` if that is given."""
        of_int8 = [name for name in self.rows if name.startswith("minibert int8")]
        ours = ours or (of_int8[0] if "int8" in peer and of_int8 else self.ours)
        if ours not in self.rows or peer not in self.rows:
            return ""
        return times(self.rate(ours) / self.rate(peer))

    def share(self, name: str | None) -> str:
        """Of the ceiling."""
        if name is None or (top := self.ceiling_of(name)) is None:
            return ""
        return f"{self.peak(name) / self.peak(top):.0%}"

    def against(self, wanted: str) -> str:
        """The speed-up over the fastest peer whose name contains ``wanted``, and its library."""
        peers = [name for name in self.peers if wanted in name]
        if self.ours is None or not peers:
            return ""
        best = max(peers, key=self.rate)
        library = "" if wanted.startswith("transformers") else f" ({best.split()[0]})"
        return self.speed_up(best) + library

    def table(self) -> str:
        """All contenders."""
        if self.name == "accuracy":
            return "\n".join(accuracy(*named) for named in self.rows.items())
        if self.name == "profile":
            kinds = dict.fromkeys(kind for row in self.rows.values() for kind in row["shares"])
            shares = [row["shares"] for row in self.rows.values()]
            found = [[kind, *(f"{s.get(kind, 0):.1%}" for s in shares)] for kind in kinds]
            return markdown(["share of the time", *self.rows], found)
        if self.name == "memory":
            found = [
                [name, f"{row['peak_mb']:.0f}", f"{row['median_s']:.1f}"]
                for name, row in self.rows.items()
            ]
            return markdown(["process", "peak MB", "s"], found)
        in_tokens = all("tokens" in row for row in self.rows.values())
        found = []
        for name in self.rows:
            is_ceiling = name.startswith("ceiling")
            speed = self.peak(name) if is_ceiling else self.rate(name)
            shown = f"{speed:.0f}" if in_tokens else f"{1000 / speed:.0f}"
            speed_up = "" if is_ceiling else self.speed_up(name)
            found.append([name, shown, speed_up, self.share(name)])
        unit = "tokens/s" if in_tokens else "ms"
        return markdown([self.name, unit, "speed-up of minibert", "share of the ceiling"], found)


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def accuracy(name: str, row: Row) -> str:
    trained = "" if row["trained"] else " (its classifier is untrained, so this says little)"
    fast = name.removeprefix("minibert ").replace(",", "")
    return (
        f"MiniLM{trained}, {fast} against fp32 padded: {row['words_apart']} of "
        f"{row['words']} words differ, entity F1 {100 * row['f1']:.2f} and "
        f"{100 * row['f1_fp32_padded']:.2f}."
    )


def targets(result: Result) -> str:
    """Speed-ups: the target with AMX, what was measured, and the upper bound of this machine."""
    found = []
    for name, ours, peer, target in TARGETS:
        part = Part(result, name)
        if measured := part.speed_up(peer, ours):
            top = part.ceiling_of(ours)
            bound = times(part.peak(top) / part.peak(peer)) if top else ""
            found.append([f"{name}: {ours} over {peer}", times(target), measured, bound])
    return markdown(["speed-up", "target with AMX", "measured", "upper bound here"], found)


def machine(result: Result) -> str:
    """The CPU in a few words, with minibert's format on it."""
    cpu = result["cpu"]
    return f"{cpu['model']}, {cpu['instructions']}, {FORMATS.get(cpu['dtype'], cpu['dtype'])}"


def summary(results: dict[str, Result]) -> str:
    """README.md's table: the rows one would choose by, a column for each kind of CPU."""
    found = list(results.values())
    rows = [
        [title, *(Part(result, part).against(wanted) for result in found)]
        for title, part, wanted in CHOICES
    ]
    rows.append(["peak memory, tagging", *(memory(result, "tag") for result in found)])
    rows.append(["peak memory, training", *(memory(result, "train") for result in found)])
    body = markdown(["speed-up over", *map(machine, found)], [row for row in rows if any(row[1:])])
    dates = " and ".join(sorted({result["date"] for result in found}))
    return (
        f"{body}\n\nContenders alternate within one run; one column per CPU type; medians. "
        "minibert uses Tagger's defaults, and int8 where a run has it against int8.\n"
        f"`make bench`, {dates}. All rows: [docs/speed.md](docs/speed.md)."
    )


def memory(result: Result, process: str) -> str:
    rows = Part(result, "memory").rows
    if f"minibert, {process}" not in rows or f"transformers, {process}" not in rows:
        return ""
    ours, theirs = (rows[f"{s}, {process}"]["peak_mb"] for s in ("minibert", "transformers"))
    return f"{ours:.0f} MB (transformers {theirs:.0f} MB)"


def page(results: dict[str, Result]) -> str:
    """The generated part of docs/speed.md: one table over all CPUs, then the parts of each CPU."""
    found = list(results.values())
    rows = []
    for name in ("inference", "latency", "training", "startup"):
        parts = [Part(result, name) for result in found]
        for peer in dict.fromkeys(peer for part in parts for peer in part.peers):
            rows.append([f"{name}: {peer}", *(part.speed_up(peer) for part in parts)])
        rows.append([f"{name}: share of the ceiling", *(part.share(part.ours) for part in parts)])
    rows = [row for row in rows if any(row[1:])]
    blocks = ["## All CPUs", markdown(["speed-up over", *map(machine, found)], rows)]
    for file, result in results.items():
        blocks += [f"## {machine(result)}", origin(result, file), targets(result)]
        for part in (Part(result, name) for name in PARTS):
            blocks += [f"### {part.name}", part.table()] if part.rows else []
    return "\n\n".join(blocks)


def origin(result: Result, file: str) -> str:
    """When and how a result was measured, and what is missing from it."""
    cpu = result["cpu"]
    before, after = result["load_before"][0], result["load_after"][0]
    lines = [
        f"{result['date']}, {cpu['threads']} threads, load average {before:.1f} before and "
        f"{after:.1f} after; {cpu['why']}. All times: `benchmarks/results/{file}`."
    ]
    lines += [f"Left out: {p} ({why.splitlines()[0]})." for p, why in result["left_out"].items()]
    return "\n".join(lines)


def newest(folder: Path) -> dict[str, Result]:
    """The newest result of each kind of CPU by file name, the latest first."""
    found: dict[tuple, tuple[str, Result]] = {}
    paths = sorted(folder.glob("speed-*.json"), key=lambda path: path.stem[-10:])  # by date
    for path in reversed(paths):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((machine(result), result["cpu"]["threads"]), (path.name, result))
    return dict(found.values())


def refresh() -> None:
    """Regenerate both documents."""
    results = newest(runs.RESULTS)
    runs.replace_section(runs.ROOT / "README.md", "speed", summary(results))
    runs.replace_section(runs.ROOT / "docs" / "speed.md", "speed", page(results))


if __name__ == "__main__":
    refresh()
