"""Comparisons with transformers as one HTML page: a matrix of promises, and errors by operation.

The page is one file without scripts, fonts or requests. Sentences and directory are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import accumulate, pairwise

from minibert.study.parity.judge import (
    OPERATIONS,
    PARAMETERS,
    Comparison,
    Row,
    legend,
    table,
)

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 330, 78, 12, 128  # a picture and its margins, in CSS pixels
LOWEST, HIGHEST = -4, 6  # powers of ten: errors beyond are drawn at the edge
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1c2330; --soft: #596274;
  --line: #dcdad3; --theirs: #8d8d8d; --ours: #1756a9; --broken: #b00020; --kept-cell: #d8efdc;
  --broken-cell: #f9d6d6 }
@media (prefers-color-scheme: dark) { :root { --paper: #11151c; --ink: #e7eaf0; --soft: #a2acbd;
  --line: #313947; --theirs: #7d8796; --ours: #86b8f7; --broken: #ff8a8a; --kept-cell: #1d3d27;
  --broken-cell: #56232b } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1200px; margin: 2em auto; padding: 0 1em }
pre { overflow-x: auto; font-size: 12px } h1 { overflow-wrap: anywhere }
h2 { font-size: 1.05rem; margin: 0 }
.scroll { overflow-x: auto } table { border-collapse: separate; border-spacing: 4px }
th { font-weight: 600; text-align: start; padding: 2px 8px } caption { text-align: start }
td a { display: block; padding: 4px 12px; color: var(--ink); border-radius: 4px;
  text-decoration: none } td a:hover { text-decoration: underline } td small { display: block }
td.kept a { background: var(--kept-cell) } td.broken a { background: var(--broken-cell) }
.all { display: grid; gap: 2em 1.5em; margin-top: 2em;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)) }
section { min-width: 0 } section:target h2 { text-decoration: underline }
section p { margin: 0.2em 0 } svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: var(--soft) } svg path { stroke: var(--line) }
svg circle { fill: var(--ours) } svg .bad { fill: var(--broken) }
.theirs { stroke: var(--theirs) !important; stroke-width: 5; stroke-linecap: round }
.limit { stroke: var(--broken) !important; stroke-dasharray: 5 4 } b { color: var(--broken) }
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
    scale = span(comparisons)
    sections = "".join(_section(comparison, scale) for comparison in comparisons)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity of {escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><main>
<h1>Parity of {escape(title)}</h1>
<p>minibert and transformers: {_verdict(kept, "every promise kept", "a promise is broken")}.</p>
{_matrix(comparisons)}
<details><summary>The sentences</summary><ol>{sentences}</ol></details>
<p>Below, every dot is a tensor: its error in minibert as a fraction of the permitted one, which is
the dashed line. The errors are relative to transformers in float64 with the same weights. A grey
dot is transformers' own error in the same dtype; where the bits are equal, the two coincide. All
pictures share one scale. Point at a dot to read its name.</p>
<div class="all">{sections}</div>
<details><summary>The columns of the tables</summary>
<pre>{escape(legend(comparisons))}</pre></details>
</main></body></html>
"""


def _matrix(comparisons: Sequence[Comparison]) -> str:
    """Attention and layout by dtype: every cell links to its picture."""
    dtypes = list(dict.fromkeys(c.dtype for c in comparisons))
    cells: dict[tuple[str, str], list[str]] = {}
    for c in comparisons:
        verdict = "kept" if c.kept else "broken"
        cells.setdefault((c.attn, c.layout), []).append(
            f'<td class="{verdict}"><a href="#{_anchor(c)}">{verdict}<small>{escape(c.margin)}'
            "</small></a></td>"
        )
    head = "".join(f'<th scope="col">{escape(dtype)}</th>' for dtype in dtypes)
    rows = "".join(
        f'<tr><th scope="row">{escape(attn)}</th><th scope="row">{escape(layout)}</th>'
        f"{''.join(row)}</tr>"
        for (attn, layout), row in cells.items()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="promises"><table>'
        "<caption>Each promise with its margin: tensors with equal bits, or the largest error as a "
        "fraction of the permitted one.</caption>"
        f'<tr><th scope="col">attention</th><th scope="col">layout</th>{head}</tr>{rows}'
        "</table></div>"
    )


def _anchor(c: Comparison) -> str:
    return f"{c.attn}-{c.dtype}-{c.layout}"


def _section(c: Comparison, scale: tuple[int, int]) -> str:
    return (
        f'<section id="{_anchor(c)}"><h2>{escape(c.title)}</h2>'
        f"<p>{escape(c.promise)}: {_verdict(c.kept, 'kept', 'broken')}, {escape(c.margin)}</p>"
        f"{picture(c, scale)}"
        f"<details><summary>Every tensor</summary><pre>{escape(table(c, full=True))}"
        "</pre></details></section>"
    )


def _verdict(kept: bool, yes: str, no: str) -> str:
    return yes if kept else f"<b>{no}</b>"


def span(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    """The powers of ten between which all ratios of errors to bounds lie; they include 1."""
    ratios = [row.ratio for c in comparisons for row in c.rows]
    logs = [math.log10(ratio) for ratio in ratios if ratio and ratio < math.inf]
    low = math.floor(min(logs, default=-1))
    return max(LOWEST, min(low, -1)), min(HIGHEST, max(1, math.ceil(max(logs, default=0))))


def picture(comparison: Comparison, scale: tuple[int, int]) -> str:
    """SVG: the error of every tensor as a ratio to the permitted one, by operation and layer.

    Args:
        comparison: one combination.
        scale: the powers of ten at the lower and the upper edge, from ``span``. An error of zero is
            drawn at the lower edge, one that is not finite at the upper.
    """
    by_operation: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.ratio is not None:
            by_operation.setdefault(row.operation, []).append(row)
    low, high = scale
    right, bottom = WIDTH - 8, HEIGHT - BOTTOM
    # There are more parameters than layers: their columns are wider.
    shares = {name: 3 if name in PARAMETERS else 1 for name in by_operation}
    unit = (right - LEFT) / max(1, sum(shares.values()))
    edges = [LEFT + unit * share for share in accumulate(shares.values(), initial=0)]

    def y(ratio: float) -> float:
        log = math.log10(ratio) if 0 < ratio < math.inf else (high if ratio else low)
        return bottom - (bottom - TOP) * (min(max(log, low), high) - low) / (high - low)

    title = f"{comparison.title}: error as a ratio to the permitted one, by operation"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for power in range(low, high + 1):
        kind = ' class="limit"' if power == 0 else ""
        name = "bound" if power == 0 else f"{10.0**power:g}×"
        at = y(10.0**power)
        parts.append(
            f'<path{kind} d="M{LEFT} {at:.1f}H{right}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{name}</text>'
        )
    theirs, dots = [], []
    for (operation, rows), (left, end) in zip(by_operation.items(), pairwise(edges)):
        middle = (left + end) / 2
        parts.append(
            f'<path d="M{left:.1f} {TOP}V{bottom}"/>'
            f'<text transform="translate({middle + 4:.1f} {bottom + 6}) rotate(-90)" '
            f'text-anchor="end">{operation}<title>{escape(OPERATIONS[operation])}</title></text>'
        )
        for place, row in enumerate(rows):  # from layer to layer, or parameter to parameter
            x = left + (end - left) * (place + 1) / (len(rows) + 1)
            assert row.ratio is not None
            if row.reference_error is not None and row.bound:
                theirs.append(f"M{x:.1f} {y(row.reference_error / row.bound):.1f}h0")
            dots.append(_dot(x, y(row.ratio), row))
    parts.append(f'<path class="theirs" d="{"".join(theirs)}"/>')
    parts += [
        *dots,
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        "operation; in each, from the first layer on the left to the last</text>",
        f'<text transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "error ÷ permitted error</text></svg>",
    ]
    return "".join(parts)


def _dot(x: float, y: float, row: Row) -> str:
    """A point with a tooltip, red and large where the promise is broken."""
    look = 'r="2"' if row.kept else 'r="4.5" class="bad"'
    tooltip = (
        f"{row.name}: error {row.error:.1e}, permitted {row.bound:.1e}, "
        f"transformers {row.reference_error:.1e}"
    )
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}><title>{escape(tooltip)}</title></circle>'
