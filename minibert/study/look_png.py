"""Attention maps as a PNG: all of them small, or one large with its word-pieces."""

from __future__ import annotations

import warnings
from pathlib import Path
from textwrap import shorten

from minibert.files import MinibertError, replacing
from minibert.study.look import View

TICKS = 96  # most word-pieces named along a side


def write_png(view: View, path: Path, layer: int | None = None, head: int | None = None) -> None:
    """Draw the maps of all layers and heads, of one layer, of one head, or one map.

    Shades follow the square root of the weight, on one scale for all maps. Each row attends to the
    columns.

    Args:
        view: from ``look``.
        path: of the file.
        layer, head: from 0; None draws all.

    Raises:
        MinibertError: no such layer or head, the file cannot be written, or matplotlib is not
            installed (the extra ``plot``).
    """
    layers = _chosen("layer", layer, len(view.maps))
    heads = _chosen("head", head, len(view.maps[0]))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MinibertError(
            f"matplotlib, which draws the PNG, cannot be imported ({error}): pip install matplotlib"
        ) from None

    one = len(layers) == len(heads) == 1
    S = len(view.pieces)
    cell = min(16.0, max(4.5, 0.19 * min(S, TICKS))) if one else 0.85
    size = (cell * len(heads) + 1.4, cell * len(layers) + (0.9 if one else 1.2))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    norm = PowerNorm(0.5, 0, 1)
    for i, row in zip(layers, grid):
        for j, axes in zip(heads, row):
            image = axes.imshow(view.maps[i][j].numpy(), cmap="Blues", norm=norm)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_linewidth(0.4)
            if i == layers[0] and not one:
                axes.set_title(f"head {j}", fontsize=8)
            if j == heads[0] and not one:
                axes.set_ylabel(f"layer {i}", fontsize=8)
    if one:
        _name_pieces(grid[0, 0], view.pieces)
    else:
        figure.supxlabel("in each map: column = word-piece attended to", fontsize=9)
        figure.supylabel("row = word-piece that attends", fontsize=9)
    what = f"Attention of layer {layers[0]}, head {heads[0]}" if one else "Attention of every head"
    if not one and len(layers) == 1:
        what = f"Attention of layer {layers[0]} by head"
    elif not one and len(heads) == 1:
        what = f"Attention of head {heads[0]} by layer"
    if view.windows > 1:
        what += f" (window {view.window} of {view.windows})"
    # parse_math=False: a dollar sign in the text is not mathematics.
    figure.suptitle(
        f"{what}\n{_quoted(view.text, round(9 * size[0]))}", fontsize=9, parse_math=False
    )
    bar = figure.colorbar(image, ax=grid, shrink=0.5, pad=0.01, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("attention weight (square-root scale)", fontsize=8)
    with replacing(path) as temporary, warnings.catch_warnings():
        # Characters that matplotlib's font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=120)


def _chosen(kind: str, number: int | None, count: int) -> list[int]:
    if number is None:
        return list(range(count))
    if not 0 <= number < count:
        raise MinibertError(f"{kind} {number}: the model has {count}: give 0 to {count - 1}")
    return [number]


def _quoted(text: str, most: int) -> str:
    """The text in one line of at most so many characters."""
    return f"“{shorten(text, max(20, most), placeholder=' …') or text[:20]}”"


def _name_pieces(axes, pieces: list[str]) -> None:
    """Word-pieces along both sides; of more than ``TICKS`` every second, third, ..."""
    places = range(0, len(pieces), -(-len(pieces) // TICKS))
    names = [pieces[i] for i in places]
    axes.set_xlabel("word-piece attended to", fontsize=8)
    axes.set_ylabel("word-piece that attends", fontsize=8)
    axes.set_xticks(places, names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
