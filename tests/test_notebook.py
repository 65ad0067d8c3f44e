"""The notebooks run on a CPU, the T4 one with a small model, and are committed without output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import small_checkpoint

from minibert import BertForMaskedLM

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(name: str) -> dict:
    """Run all cells; returns their variables."""
    names: dict = {}
    for number, cell in enumerate(code(ROOT / "notebooks" / name)):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), names)
    return names


def test_the_t4_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MINIBERT_TINY", str(small_checkpoint(tmp_path, BertForMaskedLM)))
    names = run("t4.ipynb")
    printed = capsys.readouterr().out
    assert "FasterTransformer, padding removed" in printed
    assert isinstance(names["report"], dict)


def test_inside_bert_runs_and_shows_what_it_says(
    minilm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    monkeypatch.chdir(tmp_path)  # it must run without a checkout
    names = run("inside_bert.ipynb")
    plt.close("all")
    assert names["equal"] == {"logits": True, "loss": True, "every gradient": True}
    assert len(figures) == 5
    # The heads that it draws do what it claims.
    place = {(0, 2): "the piece before", (1, 8): "the piece after", (2, 4): "[CLS]"}
    for (layer, head), name in place.items():
        assert names["found"][layer][name][head] > 0.5
    assert names["losses"][-1] < names["losses"][0] / 3
    assert (names["rise"] != 0).all(), "every head has an effect when silenced"
    # The information is in the word at first, and in the piece that it describes at the end.
    share, pieces = names["share"], names["pieces"]
    called, asked = pieces.index("called"), names["asked_at"]
    expected = torch.zeros(2, len(pieces))
    expected[0, called] = expected[1, asked] = 1
    torch.testing.assert_close(share[[0, -1]], expected, rtol=0, atol=1e-4)
    assert share[3, asked] > share[1, asked] + 0.1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_no_output_is_committed(notebook: Path) -> None:
    assert code(notebook)
    assert all(not cell["outputs"] and not cell["execution_count"] for cell in code(notebook))
