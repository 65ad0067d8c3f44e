"""What the benchmarks found, as tables and a plot. Takes the JSON that ``bench.py`` writes.

python -m benchmarks.report     every table and plot anew, from benchmarks/results/speed-*.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import runs
from minibert.files import replacing, write_text

Rows = dict[str, Any]  # subject: its seconds and what else it found

# Ours in each part; where there are several, the first that was run.
OURS = {
    "inference": ("minibert bf16, packed", "minibert fp16w, packed", "minibert fp32, packed"),
    "training": ("minibert, packed",),
    "latency": ("minibert bf16", "minibert fp16w", "minibert fp32"),
    "startup": ("minibert",),
    "adamw": ("minibert",),
    "attention": ("minibert sdpa, packed",),
}
# part, ours, peer, and how many times faster ours was to be on two cores with AMX.
AIMS = (
    ("inference", "minibert bf16, packed", "transformers sdpa fp32, padded to longest", 9.0),
    ("inference", "minibert bf16, packed", "transformers sdpa bf16, padded to longest", 2.4),
    ("inference", "minibert bf16, packed", "transformers sdpa bf16, sorted by length", 1.6),
    ("inference", "minibert bf16, packed", "OpenVINO bf16, sorted by length", 1.3),
    ("inference", "minibert fp32, packed", "transformers sdpa fp32, sorted by length", 1.15),
    ("latency", "minibert fp32", "transformers sdpa fp32", 1.0),
    ("latency", "minibert fp32", "onnxruntime fp32", 1.0),
    ("latency", "minibert fp32", "OpenVINO fp32", 1.0),
    ("latency", "minibert bf16", "transformers sdpa bf16", 1.0),
    ("latency", "minibert bf16", "OpenVINO bf16", 1.0),
    ("training", "minibert, packed", "transformers, padded to longest, AdamW", 3.5),
    ("training", "minibert, packed", "transformers, padded to longest, AdamW(fused=True)", 2.5),
    ("startup", "minibert", "transformers", 1 / 0.45),
)


def ours_of(part: str, rows: Rows) -> str | None:
    """The subject that the others of its part are compared with."""
    return next((name for name in OURS.get(part, ()) if name in rows), None)


def rate(row: dict[str, Any]) -> float:
    """Real tokens a second; processes a second where tokens are not counted."""
    return row.get("tokens", 1) / row["median_s"]


def peak(row: dict[str, Any]) -> float:
    """The same in its fastest turn.

    A ceiling is what the machine can do, and what disturbs a turn only ever makes it slower: with
    medians a disturbed ceiling would lie below what is under it.
    """
    return row.get("tokens", 1) / min(row["seconds"])


def shown(name: str, row: dict[str, Any]) -> float:
    """What a table or a plot says of a subject: a ceiling's fastest turn, of others the median."""
    return peak(row) if name.startswith("ceiling") else rate(row)


def share_of_ceiling(rows: Rows, subject: str) -> str:
    """The fastest turn of a subject over that of its ceiling; "" where it has none."""
    top = ceiling_of(rows, subject)
    return f"{peak(rows[subject]) / peak(top):.0%}" if top else ""


def ceiling_of(rows: Rows, subject: str) -> dict[str, Any] | None:
    """The ceiling of a subject's number format; int8 has none here."""
    if "int8" in subject:
        return None
    dtype = next((name for name in ("bf16", "fp16w") if name in subject), "fp32")
    return rows.get("ceiling") or rows.get(f"ceiling {dtype}")


def ratio(value: float) -> str:
    return f"{value:.2f}×"


def part_table(part: str, rows: Rows) -> str:
    """A part as a markdown table, its ceiling first."""
    if part == "memory":
        lines = ["| process | peak MB | s |", "|---|---|---|"]
        found = ((name, row["peak_mb"], row["median_s"]) for name, row in rows.items())
        return "\n".join([*lines, *(f"| {n} | {mb:.0f} | {s:.1f} |" for n, mb, s in found)])
    if part == "profile":
        kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["shares"]))
        lines = [f"| share of the time | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
        for kind in kinds:
            cells = " | ".join(f"{row['shares'].get(kind, 0):.1%}" for row in rows.values())
            lines.append(f"| {kind} | {cells} |")
        return "\n".join(lines)
    if part == "accuracy":
        return "\n".join(accuracy(*found) for found in rows.items())
    tokens = "tokens" in next(iter(rows.values()))
    ours = ours_of(part, rows)
    unit = "tokens/s" if tokens else "ms"
    head = f"| {part} | {unit} | minibert is | share of the ceiling, by fastest turns |"
    lines = [head, "|---|---|---|---|"]
    for name, row in rows.items():
        speed = f"{shown(name, row):.0f}" if tokens else f"{1000 / shown(name, row):.0f}"
        compared = ours and not name.startswith("ceiling")
        faster = ratio(rate(rows[ours]) / rate(row)) if compared else ""
        lines.append(f"| {name} | {speed} | {faster} | {share_of_ceiling(rows, name)} |")
    return "\n".join(lines)


def accuracy(subject: str, row: dict[str, Any]) -> str:
    """In a sentence."""
    trained = "" if row["trained"] else " (the classifier is not trained: this says little)"
    fast = subject.removeprefix("minibert ").replace(",", "")
    return (
        f"{fast} against fp32 padded, MiniLM{trained}: {row['words_apart']} of "
        f"{row['words']} words differ, entity F1 {100 * row['f1']:.2f} and "
        f"{100 * row['f1_fp32_padded']:.2f}."
    )


def aims(parts: dict[str, Rows]) -> str:
    """What was to be reached with AMX, what was, and what the ceiling here would allow."""
    lines = ["| minibert against | aim with AMX | measured | limit here |", "|---|---|---|---|"]
    for part, ours, peer, wanted in AIMS:
        rows = parts.get(part, {})
        if ours in rows and peer in rows:
            top = ceiling_of(rows, ours)
            limit = ratio(peak(top) / peak(rows[peer])) if top else ""
            measured = ratio(rate(rows[ours]) / rate(rows[peer]))
            lines.append(f"| {part}: {peer} | {ratio(wanted)} | {measured} | {limit} |")
    return "\n".join(lines)


def machine(result: dict[str, Any]) -> str:
    """The processor in a few words, and the format in which ours runs on it."""
    cpu = result["cpu"]
    return f"{cpu['model']} with {cpu['instructions']}, in {cpu['dtype']}"


def origin(result: dict[str, Any], file: str) -> str:
    stem = file.removesuffix(".json")
    return (
        f"{machine(result)} ({result['cpu']['why']}), {result['cpu']['threads']} threads, "
        f"{result['date']}. BERT-base's shape, medians over turns taken side by side in one "
        f"run; load average {result['load_before'][0]:.1f} before and "
        f"{result['load_after'][0]:.1f} after it. Every time is in "
        f"`benchmarks/results/{file}`, written by `make bench`; as tables and curves: "
        f"`benchmarks/results/{stem}.md`, `benchmarks/results/{stem}.png`."
    )


def left_out(result: dict[str, Any]) -> str:
    return "\n".join(
        f"Left out: {part} ({why.splitlines()[0]})" for part, why in result["left_out"].items()
    )


def page(result: dict[str, Any], file: str) -> str:
    """Everything, for ``results/speed-DATE.md``."""
    parts = result["parts"]
    tables = [f"## {part}\n\n{part_table(part, rows)}" for part, rows in parts.items()]
    blocks = [origin(result, file), aims(parts), *tables, left_out(result)]
    return "# Speed\n\n" + "\n\n".join(block for block in blocks if block) + "\n"


def section(results: dict[str, dict[str, Any]]) -> str:
    """The README's part of it: a column for every kind of processor, from the newest run on each.

    Args:
        results: by the names of their files.
    """
    found = list(results.values())
    head = "| minibert is so many times as fast as | " + " | ".join(map(machine, found)) + " |"
    lines = [head, "|---" * (1 + len(found)) + "|"]
    for part in ("inference", "latency", "training", "startup"):
        names = dict.fromkeys(name for r in found for name in r["parts"].get(part, {}))
        peers = [n for n in names if not n.startswith(("ceiling", "minibert"))]
        rows = [(f"{part}: {peer}", [_times(r, part, peer) for r in found]) for peer in peers]
        rows.append((f"{part}: share of the ceiling", [_share(r, part) for r in found]))
        lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows if any(cells)]
    memory = dict.fromkeys(name for r in found for name in r["parts"].get("memory", {}))
    table = ["| peak memory of a process, MB | " + " | ".join(map(machine, found)) + " |", lines[1]]
    for name in memory:
        rows_of = [r["parts"].get("memory", {}) for r in found]
        cells = [f"{rows[name]['peak_mb']:.0f}" if name in rows else "" for rows in rows_of]
        table.append(f"| {name} | {' | '.join(cells)} |")
    blocks = ["\n".join(lines), "\n".join(table)]
    for file, result in results.items():
        accurate = result["parts"].get("accuracy")
        blocks += [origin(result, file)]
        blocks += [part_table("accuracy", accurate)] if accurate else []
        blocks += [left_out(result)]
    return "\n\n".join(block for block in blocks if block)


def _times(result: dict[str, Any], part: str, peer: str) -> str:
    """How many times as fast as the peer ours is, in the fastest native format; "" if not run."""
    rows = result["parts"].get(part, {})
    ours = ours_of(part, rows)
    return ratio(rate(rows[ours]) / rate(rows[peer])) if ours and peer in rows else ""


def _share(result: dict[str, Any], part: str) -> str:
    rows = result["parts"].get(part, {})
    ours = ours_of(part, rows)
    return share_of_ceiling(rows, ours) if ours else ""


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the inference, the two curves, and memory against the corpus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = result["parts"]
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))
    bars = list(parts.get("inference", {}).items())[::-1]
    colours = ["C0" if "minibert" in name else "0.6" for name, _ in bars]
    axes[0, 0].barh([name for name, _ in bars], [shown(*bar) for bar in bars], color=colours)
    axes[0, 0].set_title("inference, real tokens/s")
    axes[0, 0].tick_params(labelsize=7)
    for axis, kind, label in (
        (axes[0, 1], "length", "pieces in a sentence"),
        (axes[1, 0], "batch", "sentences of 16 pieces in a batch"),
    ):
        rows = [row for row in parts.get("curves", {}).values() if row["curve"] == kind]
        for side in ("minibert", "transformers"):
            points = [(row["x"], rate(row)) for row in rows if row["side"] == side]
            axis.plot(*zip(*points), "o-", label=side) if points else None
        axis.set(xscale="log", xlabel=label, title="tokens/s")
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        if rows:
            axis.legend()
        else:
            axis.set_title("not run")
    sized = [row for row in parts.get("memory", {}).values() if "sentences" in row]
    axes[1, 1].plot([r["sentences"] for r in sized], [r["peak_mb"] for r in sized], "o-")
    axes[1, 1].set(xscale="log", xlabel="sentences in the file", title="minibert tag, peak MB")
    axes[1, 1].set_ylim(0, 1.1 * axes[1, 1].get_ylim()[1])
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest run on each kind of processor, by the name of its file; the latest run first."""
    found: dict[tuple, tuple[str, dict[str, Any]]] = {}
    paths = sorted(folder.glob("speed-*.json"), key=lambda path: path.stem[-10:])  # by their dates
    for path in reversed(paths):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((machine(result), result["cpu"]["threads"]), (path.name, result))
    return dict(found.values())


def write(path: Path, result: dict[str, Any]) -> None:
    """The tables and the plot beside a result's JSON."""
    write_text(path.with_suffix(".md"), page(result, path.name))
    plot(result, path.with_suffix(".png"))


def refresh_readme() -> None:
    """The table in README.md, from the newest runs."""
    runs.replace_section(runs.ROOT / "README.md", "speed", section(newest(runs.RESULTS)))


if __name__ == "__main__":
    for path in runs.RESULTS.glob("speed-*.json"):
        write(path, json.loads(path.read_text(encoding="utf-8")))
    refresh_readme()
