"""Loss curves for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from minibert.training.loss_curve import text_curve, write_png


def heights(curve: str) -> list[float]:
    """The height of each column in rows, read back from the picture."""
    rows = [line[10:] for line in curve.splitlines()[:-2]]
    return [sum(" ▁▂▃▄▅▆▇█".index(c) for c in column) / 8 for column in zip(*rows)]


def test_the_curve_shows_the_losses() -> None:
    losses = [4.0, 3.0, 2.0, 1.0, 0.0]
    found = heights(text_curve(losses, height=8))
    assert found == pytest.approx([8, 6, 4, 2, 0], abs=1 / 16)


def test_many_losses_share_columns() -> None:
    losses = [1.0] * 500 + [0.5] * 500
    found = heights(text_curve(losses, width=10, height=4))
    assert found == pytest.approx([4] * 5 + [2] * 5)
    assert text_curve(losses, width=10).splitlines()[-1].endswith("1000")


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0]])
def test_the_smallest_runs(losses: list[float], tmp_path: Path) -> None:
    assert "step" in text_curve(losses)
    write_png(losses, [(1, 50.0)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
