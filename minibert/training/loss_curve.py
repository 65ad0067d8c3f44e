"""The loss curve, in the terminal, in a notebook and as a PNG.

Curve.of_run("runs/demo")    # the last line of a notebook cell: it is drawn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from minibert.files import parse_json, read_text, replacing

EIGHTHS = " ▁▂▃▄▅▆▇█"
ASCII = str.maketrans("▁▂▃▄▅▆▇█┤│└─", "...::###||+-")


@dataclass(frozen=True)
class Curve:
    """Losses by step, and the entity F1 in percent at the steps that were evaluated."""

    losses: list[float]
    f1s: list[tuple[int, float]]

    @classmethod
    def of_run(cls, output: str | Path) -> Curve:
        """The curve in a run's ``metrics.jsonl``; the F1 is that of the last set.

        Raises:
            MinibertError: the file cannot be read.
        """
        path = Path(output) / "metrics.jsonl"
        text = read_text(path, "name the directory of a run")
        return cls.of_log([parse_json(line, path) for line in text.splitlines()])

    @classmethod
    def of_log(cls, log: Sequence[dict]) -> Curve:
        """The curve in the entries of a ``metrics.jsonl``."""
        sets = [entry["set"] for entry in log if "entity_f1" in entry]
        scores = [entry for entry in log if sets and entry.get("set") == sets[-1]]
        return cls(
            [entry["loss"] for entry in log if entry.get("loss") is not None],
            [(entry["step"], 100 * entry["entity_f1"]) for entry in scores],
        )

    def __str__(self) -> str:
        return text_curve(self.losses)

    def _repr_html_(self) -> str:
        """The losses as an SVG in a box of 600 by 200, and the F1 in words."""
        top, last = max(self.losses, default=0.0) or 1.0, max(1, len(self.losses) - 1)
        points = (
            f"{600 * i / last:.1f},{200 - 200 * y / top:.1f}" for i, y in enumerate(self.losses)
        )
        f1s = ", ".join(f"{f1:.2f} % after step {step}" for step, f1 in self.f1s)
        return (
            '<svg viewBox="-50 -20 660 250" width="660" font-size="12" fill="currentColor" '
            'stroke="none" role="img" aria-label="training loss">'
            f'<polyline fill="none" stroke="#1f77b4" points="{" ".join(points)}"/>'
            '<path fill="none" stroke="currentColor" d="M0 0V200H600"/>'
            f'<text x="-5" y="4" text-anchor="end">{top:.2f}</text>'
            '<text x="-5" y="204" text-anchor="end">0</text><text y="218">1</text>'
            f'<text x="600" y="218" text-anchor="end">{len(self.losses)}</text>'
            '<text x="300" y="218" text-anchor="middle">step</text>'
            '<text x="8" y="-6">training loss</text></svg>'
        ) + (f"<p>entity F1: {f1s}</p>" if f1s else "")


def text_curve(losses: Sequence[float], width: int = 60, height: int = 8) -> str:
    """Draw losses from left to right; each column is the mean of a stretch of them.

    The axis starts at 0, so half the height is half the loss.
    """
    width = min(width, len(losses))
    edges = [len(losses) * i // width for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = max(means) or 1.0
    lines = []
    for row in reversed(range(height)):
        filled = [min(8, max(0, round(8 * (mean / top * height - row)))) for mean in means]
        mark = f"{top * (row + 1) / height:8.3f} ┤" if row % 2 else "         │"
        lines.append(mark + "".join(EIGHTHS[eighths] for eighths in filled))
    lines.append("       0 └" + "─" * width)
    lines.append(f"{'step':>9} 1{len(losses):>{width - 1}}")
    return "\n".join(lines)


def curve_for(stream: TextIO | None, losses: Sequence[float]) -> str:
    """The curve in the characters that the stream's encoding has, or else in ASCII."""
    curve = text_curve(losses)
    try:
        curve.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return curve.translate(ASCII)
    return curve


def write_png(losses: Sequence[float], f1s: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw the loss by step, and the entity F1 at the steps in ``f1s`` if there are any.

    Raises:
        ImportError: matplotlib is not installed; the extra ``plot`` brings it.
        MinibertError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    title = "Training loss and entity F1 by step" if f1s else "Training loss by step"
    axes = figure.add_subplot(
        title=title, xlabel="optimiser step", ylabel="training loss (cross-entropy per token, nats)"
    )
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="loss of a step")
    # A centred mean: a mean of the past alone would lag.
    reach = max(1, len(losses) // 40)
    near = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    axes.plot(steps, [sum(n) / len(n) for n in near], color="C0", label="mean around it")
    axes.set_ylim(bottom=0)
    lines = list(axes.get_lines())
    if f1s:
        right = axes.twinx()
        right.set_ylabel("entity F1, %")
        right.plot(*zip(*f1s), "o-", color="C1", label="entity F1")
        lines += right.get_lines()
    # Below the axes, where it covers no line.
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
