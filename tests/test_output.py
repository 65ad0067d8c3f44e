"""The output directory of a run has one owner, and nothing in it is lost without a word."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from test_resume import arguments, error_line, files, finished, stopped, whole
from training_runs import Run, tree

from minibert.text import demo
from minibert.text.bio import Sentence, write_bio
from minibert.training.loss_curve import curve_for
from minibert.training.output import LOCK
from minibert.training.resume import TENSORS, list_of

__all__ = ["files", "whole"]  # fixtures


def test_a_shorter_recipe_does_not_replace_an_unfinished_run(files: Path, tmp_path: Path) -> None:
    output = stopped(files, tmp_path / "run")
    before = tree(output)
    run = Run(arguments(files, output, "--epochs", "1", "--batch-size", "60"), tmp_path / "said")
    assert "unfinished run" in error_line(run)
    assert tree(output) == before


def test_an_unreadable_checkpoint_stops_and_renames_nothing(files: Path, tmp_path: Path) -> None:
    output = stopped(files, tmp_path / "run")
    newest = list_of(output / "checkpoints")[-1] / TENSORS
    newest.unlink()
    newest.symlink_to(newest)  # opening it fails with ELOOP, as with EACCES or EIO
    before = sorted(os.listdir(output / "checkpoints"))
    error_line(Run(arguments(files, output, "--resume"), tmp_path / "said"))
    assert sorted(os.listdir(output / "checkpoints")) == before


def test_tags_unseen_in_training_are_said_first_and_count_as_missed(
    files: Path, tmp_path: Path
) -> None:
    sentences = [*demo.generate()[1][:12], Sentence(("rex",), ("B-DOG",))]
    test = write_bio(tmp_path / "test.bio", sentences)
    said = finished(files, tmp_path / "run", "--test", test, "--epochs", "1")
    line = f"{test}: no label for B-DOG: 1 words count as missed"
    assert said.index(line) < said.index("epoch 1")
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


def test_two_runs_do_not_share_an_output(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = Run(arguments(files, output), tmp_path / "first")
    first.wait_until(lambda: (output / LOCK).is_file() and (output / LOCK).read_text())
    second = Run(arguments(files, output, "--resume"), tmp_path / "second")
    assert f"process {first.process.pid} " in error_line(second)
    assert first.wait() == 0, first.text()
    assert not (output / LOCK).exists()


def test_only_the_runs_own_temporary_files_are_swept(files: Path, tmp_path: Path) -> None:
    output = stopped(files, tmp_path / "run")
    mine = output / ".notes.unfinished"
    mine.mkdir()
    (mine / "idea.txt").write_text("keep me")
    left = output / "checkpoints" / ".step-000099.unfinished"
    left.mkdir()
    finished(files, output, "--resume")
    assert (mine / "idea.txt").read_text() == "keep me"
    assert not left.exists()


def test_a_new_run_leaves_no_results_of_the_old_one(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    finished(files, output)
    assert (output / "best").is_dir()
    bare = ["--model", files / "model", "--train", files / "train.bio", "--device", "cpu"]
    run = Run([*bare, "--epochs", "1", "--output", output], tmp_path / "said")
    assert run.wait() == 0, run.text()
    assert not (output / "best" / "config.json").exists()
    assert not (output / "report.json").exists()
    assert (output / "last" / "config.json").is_file()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_curve_is_printed_in_any_encoding(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print(curve_for(stream, [3.0, 2.0, 1.0]), file=stream, flush=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK=5"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_a_wrong_torchrun_environment_is_one_line(
    files: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    run = Run(arguments(files, tmp_path / "run"), tmp_path / "said", environment=variables)
    assert message in error_line(run)


@pytest.mark.parametrize(
    "wrong", [["--dev", "nan"], ["--layout", "0"], ["--layout", "1000"], ["--seed", "9" * 15]]
)
def test_wrong_arguments_are_one_line(files: Path, tmp_path: Path, wrong: list[str]) -> None:
    error_line(Run(arguments(files, tmp_path / "run", *wrong), tmp_path / "said"))
