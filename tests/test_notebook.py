"""The notebooks run on a CPU, the T4 one with a small model, and are committed without output."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import small_checkpoint

from minibert import BertForMaskedLM

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(name: str, before: dict[int, str] | None = None) -> dict:
    """Run all cells, and ``before`` a cell of that number more code; returns their variables."""
    names: dict = {}
    for number, cell in enumerate(code(ROOT / "notebooks" / name)):
        exec((before or {}).get(number, ""), names)
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), names)
    return names


def test_the_t4_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts that need no GPU, and one more that fails."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MINIBERT_TINY", str(small_checkpoint(tmp_path / "tiny", BertForMaskedLM)))
    monkeypatch.setenv("MINIBERT_WORK", str(tmp_path / "work"))
    names = run("t4.ipynb", before={4: 'part("broken", "-c", "print(1); raise SystemExit(3)")'})
    printed = capsys.readouterr().out
    assert "NVRTC: " in printed
    assert "auto attn" in printed, "the output of a part is shown"
    assert "FasterTransformer, padding removed" in printed
    assert "130,446  published" in printed
    assert names["report"]
    assert names["failed"].keys() == {"broken"}
    assert "FAILED: broken: exit status 3" in printed
    assert (tmp_path / "work" / "model" / "last" / "model.safetensors").is_file()
    with zipfile.ZipFile(names["archive"]) as files:
        assert {"info.txt", "train.txt", "report.json", "broken.txt"} <= {*files.namelist()}
        assert files.read("broken.txt") == b"1\n"


@pytest.mark.parametrize("where", ["", "minibert", "archive"])
def test_the_t4_notebook_finds_the_project(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout, beside one, or from an uploaded archive; else it says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIBERT_WORK", str(tmp_path / "work"))
    first = "".join(code(ROOT / "notebooks" / "t4.ipynb")[0]["source"])
    with pytest.raises(RuntimeError, match=r"upload minibert-.* or set ADDRESS"):
        exec(first, {})
    folder = tmp_path / ("minibert-0.1.0" if where == "archive" else where)
    folder.mkdir(exist_ok=True)
    (folder / "train.py").touch()
    if where == "archive":
        with tarfile.open("minibert-0.1.0.tar.gz", "w:gz") as files:
            files.add(folder, folder.name)
        shutil.rmtree(folder)
    exec(first, {})
    assert Path.cwd() == folder


@pytest.mark.parametrize("built_for", [None, "12.8"])
def test_the_t4_notebook_stops_without_a_gpu(
    built_for: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nvidia-smi is missing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setenv("PATH", "/bin")
    guard = "".join(code(ROOT / "notebooks" / "t4.ipynb")[1]["source"])
    with pytest.raises(RuntimeError, match="STOP: "):
        exec(guard, {"sys": sys, "subprocess": subprocess, "TINY": "", "distributions": list})


def test_the_t4_notebook_keeps_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On Colab's image cuda-core is too old: it alone is installed, with the rest held."""
    have = {"cuda-core": "0.3.2", "cuda-bindings": "12.9.7", "torch": "2.11.0+cu128"}
    monkeypatch.setattr(metadata, "version", lambda name: have.get(name, "99.0"))
    found = [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in have.items()]
    monkeypatch.setattr(metadata, "distributions", lambda: found)
    cells = ["".join(cell["source"]) for cell in code(ROOT / "notebooks" / "t4.ipynb")]
    ran: list[tuple] = []
    names = {"TINY": "", "WORK": tmp_path, "part": lambda *arguments: ran.append(arguments)}
    names |= {"version": metadata.version, "distributions": metadata.distributions}
    names |= {"PackageNotFoundError": metadata.PackageNotFoundError}
    exec(cells[2], names)
    install = next(arguments for arguments in ran if arguments[0] == "install")
    assert install[-1] == "cuda-core>=1.0,<1.3"
    assert sum(">=" in str(argument) for argument in install) == 1
    kept = (tmp_path / "kept.txt").read_text().split()
    assert kept == ["cuda-bindings==12.9.7", "torch==2.11.0+cu128"]


@pytest.mark.slow
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
