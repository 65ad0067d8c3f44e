"""The T4 notebook's cells run on a CPU with a tiny model, and come without output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minibert import BertConfig, BertForMaskedLM

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "notebooks" / "t4.ipynb").read_text())["cells"]


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


def test_cells_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MINIBERT_TINY", str(tiny))
    names: dict[str, object] = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "FasterTransformer, padding removed" in printed
    assert isinstance(names["report"], dict)


def test_nothing_is_stored_that_was_not_run() -> None:
    assert all(not cell["outputs"] for cell in CELLS if cell["cell_type"] == "code")
