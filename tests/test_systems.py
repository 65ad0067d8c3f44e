"""Baselines on the command line: tagged, evaluated, compared with BERT in one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from builders import python, small_checkpoint, write_bio
from training_runs import tiny_model

from benchmarks.systems import section
from minibert.baselines.hmm import HMM
from minibert.study.systems import REPORTED, Measured, Plan, measure, table, write_png
from minibert.tagging.saved import kind_of
from minibert.text.demo import generate

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN, TEST = (sentences[:count] for sentences, count in zip(generate(), (40, 10)))


@pytest.fixture(scope="module")
def hmm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hmm")
    HMM.fit(TRAIN).save_pretrained(folder)
    return folder


def test_a_baseline_tags_and_is_evaluated(
    hmm: Path, command: Callable, refused: Callable, tmp_path: Path
) -> None:
    text = " ".join(TRAIN[0].words)
    status, out, _ = command("tag", hmm, text)
    assert status == 0
    assert "[" in out
    status, out, _ = command("tag", hmm, "--json", text)
    assert json.loads(out)["entities"]
    status, out, _ = command("evaluate", hmm, write_bio(tmp_path / "test.bio", TRAIN), "--json")
    assert status == 0
    assert json.loads(out)["entity_f1"] > 0.5
    assert "is a hmm, not a BERT" in refused("tag", hmm, text, "--dtype", "fp32")
    assert "is a hmm: trace shows the layers of a BERT" in refused("trace", hmm, text)
    (hmm / "vocabulary.json").rename(hmm / "elsewhere")
    try:
        assert "vocabulary.json" in refused("tag", hmm, text)
    finally:
        (hmm / "elsewhere").rename(hmm / "vocabulary.json")


def test_tagging_with_a_bert_imports_no_baseline(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path)
    assert kind_of(folder) is None
    assert kind_of(tmp_path / "missing") is None
    code = (
        "import sys; from minibert import cli; cli.main(sys.argv[1:]); "
        "print([name for name in sys.modules if 'baselines' in name])"
    )
    assert python("-c", code, "tag", folder, "a b").splitlines()[-1] == "[]"


def test_one_command_compares(tmp_path: Path, command: Callable) -> None:
    """Each in its own process; the saved systems can be used."""
    files = write_bio(tmp_path / "train.bio", TRAIN), write_bio(tmp_path / "test.bio", TEST)
    chart = tmp_path / "chart.png"
    flags = ("--train", files[0], "--test", files[1], "--plot", chart, "--output", tmp_path / "out")
    status, out, _ = command("compare", "--systems", "hmm", *flags)
    assert status == 0
    assert out.startswith("| system | parameters | entity F1 |")
    assert "| hmm | " in out
    assert "| ERNIE, in the paper |" in out
    assert "2002.08902" in out
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert kind_of(tmp_path / "out" / "hmm-0") == "hmm"


def test_missing_files_are_refused_before_training(tmp_path: Path, refused: Callable) -> None:
    train = write_bio(tmp_path / "train.bio", TRAIN)
    assert "needs --test" in refused("compare", "--systems", "hmm", "--train", train)
    assert "no.bio" in refused("compare", "--systems", "hmm", "--train", tmp_path / "no.bio")


@pytest.mark.slow
def test_a_killed_process_is_an_error_in_one_line(
    tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be loaded, so it dies before it answers."""
    files = write_bio(tmp_path / "train.bio", TRAIN), write_bio(tmp_path / "test.bio", TEST)
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ("--train", files[0], "--test", files[1])
    assert "the process was killed" in refused("compare", "--systems", "hmm", *flags)


@pytest.mark.parametrize(
    "system",
    ["bert-crf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bilstm-crf", "bert"))],
)
def test_every_system_is_measured(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minibert.baselines.bilstm_crf.EPOCHS", 1)
    tiny_model(tmp_path / "model", [*TRAIN, *TEST])
    options = argparse.Namespace(
        train=write_bio(tmp_path / "train.bio", TRAIN),
        test=write_bio(tmp_path / "test.bio", TEST),
        corpus="demo",
        orphans="refuse",
        model=str(tmp_path / "model"),
        device="cpu",
    )
    found = measure(system, 3, Plan([system], [3], options, tmp_path))
    assert (found.system, found.seed) == (system, 3)
    assert 0 <= found.entity_f1 <= 100
    assert 0 < found.token_f1 <= 100
    assert found.parameters > 1000
    assert min(found.seconds, found.words_per_second, found.memory_mb) > 0
    assert list((tmp_path / f"{system}-3").rglob("config.json"))


def test_the_table_and_the_chart(tmp_path: Path) -> None:
    one = Measured("hmm", 0, 2_500_000, 78.0, 88.5, 75.0, 3.2, 41000.4, 300.0)
    runs = [one, *(Measured("bert", s, 22_000_000, 88.0 + s, 94.0, 89.0, 60 + s, 900.0, 800.0 + s)
                   for s in (0, 1))]  # fmt: skip
    lines = table(runs).splitlines()
    assert lines[2] == "| hmm | 2.50 M | 78.00 | 88.50 | 75.00 |  | 3 | 41000 | 300 | 1 |"
    assert "| bert | 22.00 M | 88.50 ± 0.71 | 94.00 ± 0.00 |" in lines[3]
    assert "| 801 | 2 |" in lines[3]
    for line, (name, f1) in zip(lines[4:], REPORTED.items()):
        assert line.startswith(f"| {name}, in the paper |")
        assert f"| {f1:.2f} |" in line
    result = {"date": "2026-11-28", "machine": {"device": "x86_64", "threads": 1}}
    result["runs"] = [asdict(one)]
    for date, f1 in (("2026-11-27", 1.0), ("2026-11-28", 78.0)):
        result["runs"][0]["entity_f1"] = f1
        (tmp_path / f"systems-hmm-{date}.json").write_text(json.dumps(result))
    kept = section(tmp_path)
    assert "`make compare`: hmm on x86_64, 1 thread, 2026-11-28." in kept
    assert "| hmm | 2.50 M | 78.00 |" in kept
    assert kept.endswith("Not run yet: crf, bilstm-crf, bert, bert-crf.")
    write_png(runs, tmp_path / "chart.png")
    write_png([replace(one, system="crf")], tmp_path / "one.png")
    assert (tmp_path / "chart.png").stat().st_size > 5000
