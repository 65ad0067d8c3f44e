"""The loss curve, in the terminal and as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from minibert.files import replacing

EIGHTHS = " ▁▂▃▄▅▆▇█"
ASCII = str.maketrans("▁▂▃▄▅▆▇█┤│└─", "...::###||+-")


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
