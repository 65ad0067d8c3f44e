"""Comparisons with transformers as one HTML page: how the error grows from layer to layer.

The page is one file without scripts, fonts or requests. Sentences and directory are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from minibert.study.parity.judge import Comparison, Row, table

WIDTH, HEIGHT, LEFT, TOP = 920, 300, 60, 20  # size and margins of a picture, in CSS pixels
LINES = (  # attribute of Row, its name in the legend, style
    ("reference_error", "transformers", "stroke:var(--theirs);stroke-width:5"),
    ("error", "minibert", "stroke:var(--ours);stroke-width:2"),
)
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1c2330; --soft: #596274;
  --line: #dcdad3; --theirs: #a9a9a9; --ours: #1756a9; --broken: #b00020 }
@media (prefers-color-scheme: dark) { :root { --paper: #11151c; --ink: #e7eaf0; --soft: #a2acbd;
  --line: #313947; --theirs: #66707f; --ours: #86b8f7; --broken: #ff8a8a } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif;
  max-width: 960px; margin: 2em auto; padding: 0 1em }
pre { overflow-x: auto; font-size: 12px } h1 { overflow-wrap: anywhere }
.picture { overflow-x: auto } svg { width: 100%; min-width: 640px; height: auto; display: block }
svg text { font-size: 12px; fill: var(--soft) } svg path { stroke: var(--line) }
polyline { fill: none } .broken { color: var(--broken) }
"""


def page(title: str, texts: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    """The HTML of the whole page.

    Args:
        title: the model, say its directory.
        texts: the sentences.
        comparisons: from ``compare``.
    """
    kept = all(comparison.kept for comparison in comparisons)
    sentences = "".join(f"<li>{escape(text)}</li>" for text in texts)
    sections = "".join(_section(comparison) for comparison in comparisons)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity of {escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Parity of {escape(title)}</h1>
<p>minibert and transformers: {_verdict(kept, "every promise kept", "a promise is broken")}.
Errors are relative to transformers in float64 with the same weights. Where the bits are equal, the
two lines coincide.</p>
<ol>{sentences}</ol>
{sections}</body></html>
"""


def _section(c: Comparison) -> str:
    heading = escape(c.title)
    return (
        f"<h2>{heading}</h2><p>{escape(c.promise)}: {_verdict(c.kept, 'kept', 'broken')}</p>"
        f'<div class="picture" tabindex="0">{picture(c)}</div>'
        f"<details><summary>Every tensor</summary><pre>{escape(table(c, full=True))}"
        "</pre></details>"
    )


def _verdict(kept: bool, yes: str, no: str) -> str:
    return yes if kept else f'<b class="broken">{no}</b>'


def picture(comparison: Comparison) -> str:
    """SVG: the relative error of every intermediate, on a log scale, in the order of computation.

    An error that is zero or not finite leaves a gap in the line.
    """
    rows = [row for row in comparison.rows if ":" not in row.name]
    errors = [_log(getattr(row, line)) for row in rows for line, _, _ in LINES]
    finite = [error for error in errors if error is not None]
    low, high = math.floor(min(finite, default=-1)), math.ceil(max(finite, default=0))
    high = max(high, low + 1)
    step = (WIDTH - LEFT - 10) / max(1, len(rows) - 1)

    def x(index: int) -> float:
        return LEFT + index * step

    def y(log: float) -> float:
        return TOP + (HEIGHT - 2 * TOP) * (high - log) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="error by layer">']
    for power in range(low, high + 1):
        parts.append(
            f'<path d="M{LEFT} {y(power):.1f}H{WIDTH - 10}"/>'
            f'<text x="8" y="{y(power) + 4:.1f}">1e{power}</text>'
        )
    for index, row in enumerate(rows):
        if row.operation == "q":  # the first of its layer
            parts.append(
                f'<path d="M{x(index):.1f} {TOP}V{HEIGHT - TOP}"/>'
                f'<text x="{x(index):.1f}" y="{HEIGHT - 4}">layer {row.name.split(".")[1]}</text>'
            )
    for number, (attribute, name, style) in enumerate(LINES):
        logs = [_log(getattr(row, attribute)) for row in rows]
        for _, run in groupby(enumerate(logs), lambda point: point[1] is not None):
            points = " ".join(
                f"{x(index):.1f},{y(log):.1f}" for index, log in run if log is not None
            )
            if points:
                parts.append(f'<polyline points="{points}" style="{style};stroke-linecap:round"/>')
        at = LEFT + 10 + 140 * number
        parts.append(
            f'<path d="M{at} 10h20" style="{style}"/><text x="{at + 26}" y="14">{name}</text>'
        )
    for index, row in enumerate(rows):
        log = _log(row.error)
        if log is not None:
            parts.append(_dot(x(index), y(log), row))
    return "".join([*parts, "</svg>"])


def _dot(x: float, y: float, row: Row) -> str:
    """A point with a tooltip, red and large where the promise is broken."""
    colour, radius = ("ours", 2.5) if row.kept else ("broken", 4.5)
    tooltip = f"{row.name}: {row.error:.1e}, transformers {row.reference_error:.1e}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:var(--{colour})">'
        f"<title>{escape(tooltip)}</title></circle>"
    )


def _log(error: float | None) -> float | None:
    return math.log10(error) if error is not None and 0 < error < math.inf else None
