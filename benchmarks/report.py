"""What the benchmarks found, as tables and a plot. Takes the JSON that ``bench.py`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minibert.files import replacing

Rows = dict[str, Any]  # subject: its seconds and what else it found

OURS = {
    "inference": "minibert bf16, packed",
    "training": "minibert, packed",
    "latency": "minibert bf16",
    "startup": "minibert",
    "adamw": "minibert",
    "attention": "minibert sdpa, packed",
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


def rate(row: dict[str, Any]) -> float:
    """Real tokens a second; processes a second where tokens are not counted."""
    return row.get("tokens", 1) / row["median_s"]


def ceiling_of(rows: Rows, subject: str) -> dict[str, Any] | None:
    """The ceiling of a subject's number format; int8 has none here."""
    if "int8" in subject:
        return None
    exact = "ceiling fp32" if "fp32" in subject else "ceiling bf16"
    return rows.get("ceiling") or rows.get(exact)


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
        return "\n".join(accuracy(row) for row in rows.values())
    tokens = "tokens" in next(iter(rows.values()))
    ours = rows.get(OURS.get(part, ""))
    head = f"| {part} | {'tokens/s' if tokens else 'ms'} | minibert is | share of the ceiling |"
    lines = [head, "|---|---|---|---|"]
    for name, row in rows.items():
        shown = f"{rate(row):.0f}" if tokens else f"{1000 * row['median_s']:.0f}"
        faster = ratio(rate(ours) / rate(row)) if ours and not name.startswith("ceiling") else ""
        top = ceiling_of(rows, name)
        share = f"{rate(row) / rate(top):.0%}" if top else ""
        lines.append(f"| {name} | {shown} | {faster} | {share} |")
    return "\n".join(lines)


def accuracy(row: dict[str, Any]) -> str:
    """In a sentence."""
    trained = "" if row["trained"] else " (the classifier is not trained: this says little)"
    return (
        f"bf16 packed against fp32 padded, MiniLM{trained}: {row['words_apart']} of "
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
            limit = ratio(rate(top) / rate(rows[peer])) if top else ""
            measured = ratio(rate(rows[ours]) / rate(rows[peer]))
            lines.append(f"| {part}: {peer} | {ratio(wanted)} | {measured} | {limit} |")
    return "\n".join(lines)


def origin(result: dict[str, Any], file: str) -> str:
    cpu = result["cpu"]
    return (
        f"{cpu['model']}, {cpu['threads']} threads; {cpu['bf16']}. BERT-base's shape, medians over "
        f"turns taken side by side in one run; load average {result['load_before'][0]:.1f} before "
        f"and {result['load_after'][0]:.1f} after it. Every time is in "
        f"`benchmarks/results/{file}`, written by `make bench`."
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


def section(result: dict[str, Any], file: str) -> str:
    """The README's part of it."""
    parts = result["parts"]
    shown = [
        part_table(p, parts[p])
        for p in ("inference", "latency", "training", "memory")
        if p in parts
    ]
    stem = file.removesuffix(".json")
    rest = f"More, and the curves: `benchmarks/results/{stem}.md`, `benchmarks/results/{stem}.png`."
    accurate = part_table("accuracy", parts["accuracy"]) if "accuracy" in parts else ""
    blocks = [*shown, accurate, aims(parts), origin(result, file) + " " + rest, left_out(result)]
    return "\n\n".join(block for block in blocks if block)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the inference, the two curves, and memory against the corpus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = result["parts"]
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))
    bars = list(parts.get("inference", {}).items())[::-1]
    colours = ["C0" if "minibert" in name else "0.6" for name, _ in bars]
    axes[0, 0].barh([name for name, _ in bars], [rate(row) for _, row in bars], color=colours)
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
        axis.set(xscale="log", xlabel=label, title="tokens/s, bf16")
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
