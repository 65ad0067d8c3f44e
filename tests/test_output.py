"""The output directory of a run has one owner, and nothing in it is lost without a word."""

from __future__ import annotations

import importlib
import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_resume import arguments, error_line, files, finished, stopped, whole
from training_runs import KILL_POINTS, ROOT, Run, assert_same_tree, tree

from minibert import Tagger
from minibert.files import MinibertError, write_text
from minibert.machine import choose_device
from minibert.processes import Team
from minibert.tagging.evaluate import evaluate
from minibert.text import demo
from minibert.text.bio import Sentence, write_bio
from minibert.training.adamw import AdamW, bert_groups
from minibert.training.averaging import WeightAverage
from minibert.training.corpus import Part
from minibert.training.loss_curve import curve_for
from minibert.training.output import LOCK, MODEL_FILES, Output, owned
from minibert.training.results import evaluate_and_save
from minibert.training.resume import TENSORS, Training, list_of

__all__ = ["files", "whole"]  # fixtures

WRITER = Team(0, 1, torch.device("cpu"))


def test_a_shorter_recipe_does_not_replace_an_unfinished_run(files: Path, tmp_path: Path) -> None:
    output = stopped(files, tmp_path / "run")
    before = tree(output)
    run = Run(arguments(files, output, "--epochs", "1", "--batch-size", "60"), tmp_path / "said")
    assert "unfinished run" in error_line(run)
    assert tree(output) == before


def test_a_lack_of_memory_is_one_line(files: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Of train.py itself, without the command line of minibert around it."""

    def refuse(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    loop = importlib.import_module("train")
    monkeypatch.setattr(loop, "train", refuse)
    assert loop.main([str(x) for x in arguments(files, tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("train.py: out of memory (DefaultCPUAllocator: can't")


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
    earlier = tmp_path / "earlier"  # a run, whose model is trained on
    shutil.copytree(files / "model", earlier / "last")
    said = finished(files, tmp_path / "run", *("--test", test, "--epochs", "1", "--model", earlier))
    assert f"{earlier}: a run's directory: taking {earlier / 'last'}\n" in said
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
    run = Run([*bare, "--epochs", "1", "--output", output, "--overwrite"], tmp_path / "said")
    assert run.wait() == 0, run.text()
    assert not (output / "best" / "config.json").exists()
    assert not (output / "report.json").exists()
    assert (output / "last" / "config.json").is_file()


def test_a_finished_run_keeps_no_checkpoints(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    finished(files, output, "--keep", "0")
    done = tree(output)
    names = {"best", "last", "finished.json", "loss.png", "metrics.jsonl", "report.json"}
    assert {path.name for path in output.iterdir()} == names
    said = finished(files, output, "--keep", "0", "--resume")
    assert f"{output}: the run is done, nothing to resume" in said
    assert tree(output) == done
    run = Run(arguments(files, output, "--resume", "--seed", "1"), tmp_path / "said")
    assert "holds a finished run, seed was 0 and is 1: give another --output" in error_line(run)
    assert tree(output) == done


@pytest.mark.slow
def test_checkpoints_go_last_and_the_newest_at_the_end(files: Path, tmp_path: Path) -> None:
    """Killed at each change to the disk while the run finishes: it can always be resumed."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    finished(files, whole, "--keep", "0")
    finished(files, tmp_path / "kept")
    for call in range(1, 200):
        shutil.copytree(tmp_path / "kept", output)
        (output / "finished.json").unlink()
        given = arguments(files, output, "--keep", "0", "--resume")
        run = Run(given, tmp_path / "killed", ("disk", call))
        if run.wait() == 0:
            break
        assert list_of(output / "checkpoints") or (output / "finished.json").exists()
        finished(files, output, "--keep", "0", "--resume")
        assert_same_tree(output, whole)
        shutil.rmtree(output)
    assert call > 10, "too few changes to the disk"
    assert_same_tree(output, whole)


def test_a_finished_run_is_not_overwritten_without_a_word(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for keep in ("0", "2"):
        finished(files, output, "--keep", keep, "--overwrite")
        done = tree(output)
        run = Run(arguments(files, output), tmp_path / "said")
        assert "holds a finished run: give another --output, or --overwrite" in error_line(run)
        assert tree(output) == done
    run = Run(arguments(files, output, "--overwrite", "--resume"), tmp_path / "said")
    assert run.wait() == 2
    assert "give one of them" in run.text()


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


@pytest.mark.parametrize("arguments_", [["--batch-size", "9" * 30], ["--lr", "inf"]])
def test_numbers_that_cannot_be_used_are_refused(
    files: Path, tmp_path: Path, arguments_: list[str]
) -> None:
    error_line(Run(arguments(files, tmp_path / "run", *arguments_), tmp_path / "said"))


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(MinibertError, match="device 'meta': it holds shapes, not numbers"):
        choose_device("meta")


# The directory itself


def test_an_owner_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    with owned(path, WRITER):
        with pytest.raises(MinibertError, match=rf"^{path}: process {os.getpid()} on .* training"):
            with owned(path, WRITER):
                pass
        with owned(path, Team(1, 2, WRITER.device)) as other:  # of the same run
            assert other.at("x") == path / "x"
    assert not (tmp_path / "runs").exists(), "it was made for nothing"


def test_the_lock_of_a_killed_run_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{os.getppid()} on this machine\n")
    with owned(tmp_path, WRITER):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / LOCK).symlink_to("victim")
    with pytest.raises(MinibertError, match="cannot be written"), owned(tmp_path, WRITER):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_directory_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MinibertError, match=r"cannot be written \(.*: give --output a directory"):
        with owned(tmp_path / name, WRITER):
            pass
    assert tree(tmp_path) == {"file": b""}


def test_names_that_only_look_temporary_are_not_swept(tmp_path: Path) -> None:
    own = (".last.unfinished/config.json", ".metrics.jsonl.abcd1234.unfinished")
    own += ("checkpoints/.step-000012.unfinished/x", "checkpoints/.step-000003.old.unfinished/x")
    others = (".mine.unfinished/x", "best/.notes.unfinished", ".last.backup.unfinished/x")
    others += ("deep/er/.last.unfinished/x", "checkpoints/.step-x.unfinished", "notes.unfinished")
    for name in own + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with owned(tmp_path, WRITER) as output:
        output.sweep()
    left = {name for name, content in tree(tmp_path).items() if content == name.encode()}
    assert left == set(others)
    assert not list(tmp_path.glob("checkpoints/.step-0*"))


def write_model(output: Output, content: str) -> None:
    with output.replacing("last") as directory:
        for name in MODEL_FILES:
            write_text(directory / name, content)


def contents(path: Path) -> set[bytes]:
    return {(path / name).read_bytes() for name in MODEL_FILES}


class KilledError(BaseException):
    """Nothing that handles errors handles this."""


def killed_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """From the ``call``-th change to the disk on, before it or after it, no other is made."""
    count = 0

    def deadly(function):
        def wrapped(*given, **options):
            nonlocal count
            count += 1
            if count > call or (count == call and call % 2):
                raise KilledError
            try:
                return function(*given, **options)
            finally:
                if count == call:
                    raise KilledError

        return wrapped

    for module, name in KILL_POINTS["disk"]:
        patch.setattr(f"{module}.{name}", deadly(getattr(importlib.import_module(module), name)))


def test_a_model_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Killed before or after any change to the disk, the old one or the new one is there."""
    kills, seen = 0, set()
    while True:
        path = tmp_path / str(kills)
        path.mkdir()
        write_model(Output(path, None), "old")
        (path / "last" / "notes").write_text("mine")
        try:
            with pytest.MonkeyPatch.context() as patch:
                killed_at(kills + 1, patch)
                write_model(Output(path, None), "new")
            break
        except KilledError:
            kills += 1
        if (path / "last").exists():
            assert contents(path / "last") in ({b"old"}, {b"new"})
        with owned(path, WRITER) as output:
            output.sweep()
        found = contents(path / "last")
        assert found in ({b"old"}, {b"new"})
        assert (path / "last" / "notes").read_text() == "mine"
        assert [entry.name for entry in path.iterdir()] == ["last"]
        seen |= found
    assert kills > 15
    assert seen == {b"old", b"new"}


def test_what_is_replaced_keeps_its_mode_and_its_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").symlink_to("../elsewhere")
    write_model(Output(tmp_path / "run", None), "new")
    assert (tmp_path / "run" / "last").is_symlink()
    assert contents(tmp_path / "elsewhere") == {b"new"}
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o700


def test_a_renamed_directory_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with owned(path, WRITER) as output:
        path.rename(tmp_path / "elsewhere")
        for action in (lambda: write_model(output, "new"), lambda: output.at("report.json")):
            with pytest.raises(MinibertError, match="renamed or removed: move it back"):
                action()
        assert not path.exists()
        path.mkdir()  # another one in its place
        with pytest.raises(MinibertError, match="renamed or removed"):
            output.discard("best")
    assert list(path.iterdir()) == []


def test_an_output_that_is_renamed_during_evaluation(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written in its place, and nothing is said to be saved."""
    tagger = Tagger.from_pretrained(files / "model", device="cpu", prepack=False)
    average = WeightAverage(tagger.model.parameters(), math.inf)
    run = Training(tagger.model, AdamW(bert_groups(tagger.model, 0.0)), average, None, step=1)
    part = Part(demo.generate()[1][:4], "test.bio")

    def rename(*given):
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        return evaluate(*given)

    monkeypatch.setattr("minibert.training.results.evaluate", rename)
    with owned(tmp_path / "run", WRITER) as output:
        with pytest.raises(MinibertError, match="run was renamed or removed: move it back"):
            evaluate_and_save(1, run, tagger, {"dev": part}, output, 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


# The standard streams and the environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("$TRAIN >&- 2>&- <&-", 0, ""),
        ("$TRAIN 2>&-", 0, ""),
        ("$TRAIN >/dev/full", 2, "train.py: standard output: No space left on device"),
        ("$TRAIN --device nonsense 2>/dev/full", 2, ""),
        ("set -o pipefail; $TRAIN | head -1", 141, ""),
        ("set -o pipefail; $TRAIN 2>&1 | head -1", 141, ""),
        ("PYTHONIOENCODING=latin-1 $TRAIN", 0, ""),
        ("PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=POSIX $TRAIN", 0, ""),
        ("MPLBACKEND=nonsense $TRAIN", 0, ""),
    ],
)
def test_whatever_the_streams_are_the_run_ends_well(
    files: Path, tmp_path: Path, shell: str, status: int, said: str
) -> None:
    output = tmp_path / "caf\udce9"  # a name that is not UTF-8
    train = [sys.executable, ROOT / "train.py", *arguments(files, output)]
    ran = subprocess.run(
        ["bash", "-c", shell.replace("$TRAIN", '"$@"'), "bash", *map(str, train)],
        capture_output=True,
        timeout=300,
    )
    errors = ran.stderr.decode(errors="replace")
    assert ran.returncode == status, errors
    assert "Traceback" not in errors
    assert said in errors
    if status == 0:
        assert (output / "report.json").is_file()
