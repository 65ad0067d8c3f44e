"""The notebooks' cells run on a CPU, that for the T4 with a tiny model, and come without output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minibert import BertConfig, BertForMaskedLM

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(name: str) -> dict:
    """All cells from top to bottom; the names they leave behind."""
    names: dict = {}
    for number, cell in enumerate(code(ROOT / "notebooks" / name)):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), names)
    return names


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint of two layers with a vocabulary of a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "directed", "the", "matrix"]
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    folder = tmp_path / "tiny"
    folder.mkdir()
    BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def test_the_t4_notebook_runs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MINIBERT_TINY", str(tiny))
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
    monkeypatch.chdir(tmp_path)  # it needs the package and no checkout around it
    names = run("inside_bert.ipynb")
    plt.close("all")
    assert names["equal"] == {"logits": True, "loss": True, "every gradient": True}
    assert len(figures) == 5
    # The heads that it draws do what it says of them.
    place = {(0, 2): "the piece before", (1, 8): "the piece after", (2, 4): "[CLS]"}
    for (layer, head), name in place.items():
        assert names["found"][layer][name][head] > 0.5
    assert names["losses"][-1] < names["losses"][0] / 3
    assert (names["rise"] != 0).all(), "every head has an effect when silenced"
    # What the word says is in the word first, in the piece it describes last, and nowhere else.
    share, pieces = names["share"], names["pieces"]
    called, asked = pieces.index("called"), names["asked_at"]
    expected = torch.zeros(2, len(pieces))
    expected[0, called] = expected[1, asked] = 1
    torch.testing.assert_close(share[[0, -1]], expected, rtol=0, atol=1e-4)
    assert share[3, asked] > share[1, asked] + 0.1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_nothing_is_stored_that_was_not_run(notebook: Path) -> None:
    assert code(notebook)
    assert all(not cell["outputs"] and not cell["execution_count"] for cell in code(notebook))
