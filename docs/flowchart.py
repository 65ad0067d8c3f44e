"""Draw the paper's process with the files that do each step: docs/_static/process.svg.

python docs/flowchart.py
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

TARGET = Path(__file__).parent / "_static" / "process.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y, EDGE = 240, 84, 58, 34, 22

# Column, row: title, what happens, files in minibert/ (the second one in the folder of the first).
BOXES = {
    (0, 1): ("MIT Movie", "words with BIO tags", "text/bio.py"),
    (0, 2): ("Word-pieces", "[CLS], [SEP]; a label per word", "pretrained/tokenizer.py"),
    (0, 3): ("Batches", "padded with a mask, or packed", "text/batches.py"),
    (0, 4): ("Sentence vector", "mean of the word vectors", "tagging/embedder.py"),
    (1, 0): ("Pretraining", "fill in hidden words", "training/pretrain.py"),
    (1, 1): ("Weights", "pretrained, then fine-tuned", "pretrained/load.py"),
    (1, 2): ("Embeddings", "word + segment + position", "model/encoder.py"),
    (1, 3): ("Encoder", "12 times attention, feed-forward", "model/encoder.py, attention.py"),
    (1, 4): ("Classifier", "a score for every label", "model/heads.py"),
    (2, 1): ("Update", "clip, AdamW, rate linear to 0", "training/step.py, adamw.py"),
    (2, 2): ("Loss", "cross-entropy with the tags", "model/heads.py"),
    (2, 3): ("Labels and entities", "best label of each word", "model/labels.py, tagging/"),
    (2, 4): ("Scores", "token micro-F1, entity F1", "text/metrics.py"),
}


def left(column: int) -> int:
    """X of a column's left edge."""
    return EDGE + column * (WIDTH + GAP_X)


def middle(row: int) -> float:
    """Y of a row's middle."""
    return EDGE + row * (HEIGHT + GAP_Y) + HEIGHT / 2


def arrow(*points: tuple[float, float]) -> str:
    """A line through these points with a head at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" marker-end="url(#head)"/>'


def down(column: int, row: int, up: bool = False) -> str:
    """From a box to the one below it, or above."""
    x, half = left(column) + WIDTH / 2, HEIGHT / 2
    if up:
        return arrow((x, middle(row) - half), (x, middle(row - 1) + half + 2))
    return arrow((x, middle(row) + half), (x, middle(row + 1) - half - 2))


def arrows() -> list[str]:
    """All arrows; long ones run in the gaps between columns."""
    data, model, use = (left(column) for column in range(3))
    first, second = model - GAP_X / 2 - 8, model - GAP_X / 2 + 10
    third = use - GAP_X / 2
    return [
        *(down(0, 1), down(0, 2), down(1, 0), down(1, 1), down(1, 2), down(1, 3)),
        *(down(2, 2, up=True), down(2, 3)),
        # batches to embeddings
        arrow(
            *((data + WIDTH, middle(3)), (first, middle(3)), (first, middle(2))),
            (model - 2, middle(2)),
        ),
        # encoder to sentence vector
        arrow(
            *((model, middle(3)), (second, middle(3)), (second, middle(4))),
            (data + WIDTH + 2, middle(4)),
        ),
        # classifier to loss, and to labels
        arrow(
            *((model + WIDTH, middle(4)), (third, middle(4)), (third, middle(2))),
            (use - 2, middle(2)),
        ),
        arrow((third, middle(3)), (use - 2, middle(3))),
        # update to weights
        arrow((use, middle(1)), (model + WIDTH + 2, middle(1))),
    ]


def box(column: int, row: int, lines: Sequence[str]) -> str:
    """A step: title, what happens, files."""
    x, y = left(column), middle(row) - HEIGHT / 2
    center = x + WIDTH / 2
    shape = f'<rect x="{x}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
    texts = [
        f'<text x="{center:g}" y="{y + dy}" class="{kind}">{escape(line)}</text>'
        for line, dy, kind in zip(lines, (27, 48, 69), ("title", "what", "file"))
    ]
    kind = 2 if (column, row) == (0, 4) else column  # data, model, use
    return "\n".join([f'<g class="c{kind}">', shape, *texts, "</g>"])


def drawing() -> str:
    """The SVG."""
    width = left(2) + WIDTH + EDGE
    foot = middle(4) + HEIGHT / 2 + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {foot + 20:g}" role="img"',
        'aria-labelledby="t">',
        '<title id="t">The process of the paper, with the files that do each step</title>',
        "<style>",
        "text { font-family: system-ui, sans-serif; text-anchor: middle; fill: #1c2330 }",
        ".title { font-size: 16px; font-weight: 600 }",
        ".what { font-size: 13px }",
        ".file { font-size: 12px; font-family: ui-monospace, monospace; fill: #4a5568 }",
        "rect { stroke-width: 1.5 }",
        ".c0 rect { fill: #eef6ee; stroke: #5a8f5c }",
        ".c1 rect { fill: #eaf1fb; stroke: #4d78b3 }",
        ".c2 rect { fill: #fdf3e4; stroke: #b9863b }",
        "polyline { fill: none; stroke: #4a5568; stroke-width: 1.5 }",
        "</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"',
        'markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#4a5568"/></marker>',
        "</defs>",
        f'<path d="M0 0 H{width} V{foot + 20:g} H0 z" fill="#ffffff"/>',
        *arrows(),
        *(box(*place, lines) for place, lines in BOXES.items()),
        f'<text x="{width / 2:g}" y="{foot:g}" class="what">train.py runs it: every epoch goes '
        "through the batches, updates the weights, then labels and scores the held-out words"
        "</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
