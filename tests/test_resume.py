"""Interrupted training resumes and ends in the same bytes, whatever interrupted it."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from builders import write_bio
from training_runs import KILL_POINTS, Run, assert_same_tree, demo_files, tree

from minibert.files import TEMPORARY
from minibert.processes import Team
from minibert.text import demo
from minibert.training.output import LOCK
from minibert.training.resume import list_of, read, write
from minibert.training.stop import STOPPING, Stop

MODES = {
    "padded": ("--layout", "longest", "--dtype", "fp32", "--seed", "1"),
    "packed": ("--layout", "packed", "--dtype", "bf16", "--seed", "2", "--bucket", "3"),
    # An average, a scaler, two passes a batch, a cost, and a last step of a single batch.
    "accumulated": (
        *("--accumulate", "3", "--batch-size", "3", "--dtype", "fp16", "--seed", "3"),
        *("--r-drop", "1", "--hide", "0.2", "--entity-cost", "0.5"),
    ),
    "crf": ("--head", "crf", "--dtype", "bf16", "--seed", "4"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    demo_files(folder)
    assert Run(["--help"], folder / "help.txt").wait() == 0  # starts the server
    return folder


def arguments(files: Path, output: Path, *more: str) -> list:
    return [
        *("--model", files / "model", "--train", files / "train.bio", "--dev", files / "test.bio"),
        *("--device", "cpu", "--epochs", "2", "--batch-size", "8", "--checkpoint-every", "2"),
        *("--keep", "2", "--output", output, *more),
    ]


def finished(files: Path, output: Path, *more: str) -> str:
    """Train to the end; returns what was printed."""
    run = Run(arguments(files, output, *more), output.with_name(output.name + ".txt"))
    assert run.wait() == 0, run.text()
    return run.text()


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finished(files, output)
    return output


@pytest.mark.parametrize(
    ("mode", "kills_wanted"),
    [
        ("accumulated", 6),
        ("crf", 3),
        *(pytest.param(mode, 25, marks=pytest.mark.slow) for mode in MODES),
        pytest.param("accumulated", 200, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_it_ends_in_the_same_bytes(
    files: Path, tmp_path: Path, mode: str, kills_wanted: int
) -> None:
    """SIGKILL at a random time, at a random change to the disk, or while a checkpoint is written.

    A run is killed again and again on its way to the end; then the next one begins.
    """
    chance = random.Random(mode)
    started = time.monotonic()
    finished(files, tmp_path / "whole", *MODES[mode])
    seconds = time.monotonic() - started
    kills = in_a_checkpoint = ends = 0
    output = tmp_path / "killed"
    while kills < kills_wanted or output.exists():
        fatal = None
        if kills < kills_wanted:
            fatal = (None, ("disk", chance.randint(1, 40)), ("checkpoint", chance.randint(1, 20)))[
                kills % 3
            ]
        run = Run(arguments(files, output, *MODES[mode], "--resume"), tmp_path / "printed", fatal)
        if kills < kills_wanted and fatal is None:
            run.process.join(chance.uniform(0, seconds))
            run.process.kill()
        status = run.wait()
        if status == -signal.SIGKILL:
            kills += 1
            in_a_checkpoint += bool(list(output.glob(f"checkpoints/.step-*{TEMPORARY}")))
            continue
        assert status == 0, run.text()
        assert_same_tree(output, tmp_path / "whole")
        shutil.rmtree(output)
        ends += 1
    assert ends > 0
    assert in_a_checkpoint >= kills_wanted // 5, "too few kills while a checkpoint was written"


def test_every_kill_point_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function that a kill is aimed at runs when a checkpoint is written."""
    counts = dict.fromkeys(KILL_POINTS["checkpoint"], 0)

    def counted(point: tuple[str, str], function):
        def wrapped(*arguments, **options):
            counts[point] += 1
            return function(*arguments, **options)

        return wrapped

    for module, name in counts:
        home = importlib.import_module(module)
        monkeypatch.setattr(home, name, counted((module, name), getattr(home, name)))
    write(tmp_path / "step-000001", {"x": torch.ones(2)}, {})
    assert all(counts.values()), counts


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_says_how_to_go_on(
    files: Path, whole: Path, tmp_path: Path, number: int, status: int
) -> None:
    output = tmp_path / "run"
    run = Run(arguments(files, output, "--checkpoint-every", "1000"), tmp_path / "printed")
    run.wait_until(lambda: "epoch 1:" in run.text())
    run.send(number)
    assert run.wait() == status, run.text()
    last = run.text().splitlines()[-1]
    assert "the same command with --resume continues" in last
    (only,) = list_of(output / "checkpoints")
    assert str(only) in last
    assert "Traceback" not in run.text()
    assert f"resumed from {only}" in finished(files, output, "--resume")
    assert_same_tree(output, whole)


def test_a_second_ctrl_c_ends_at_once() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        stop = Stop(Team(0, 1, torch.device("cpu")))
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = Stop(Team(0, 1, torch.device("cpu")))
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.status == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_resuming_what_is_done_or_not_begun(files: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    text = finished(files, output, "--resume")
    assert f"{output}/checkpoints: nothing to resume, starting from step 0" in text
    assert_same_tree(output, whole)
    (output / "report.json").unlink()
    text = finished(files, output, "--resume")
    assert "resumed from" in text
    assert_same_tree(output, whole)
    # A run that is done may be done again.
    finished(files, output, "--overwrite")
    assert_same_tree(output, whole)


def test_an_unfinished_run_is_not_begun_anew(files: Path, tmp_path: Path) -> None:
    output = stopped(files, tmp_path / "run")
    before = tree(output)
    run = Run(arguments(files, output), tmp_path / "printed")
    assert run.wait() == 2
    assert "belongs to an unfinished run: continue it with --resume, or delete" in run.text()
    assert tree(output) == before


def stopped(files: Path, output: Path) -> Path:
    """A run that was killed after some checkpoints."""
    run = Run(arguments(files, output), output.with_name("stopped.txt"))
    run.wait_until(lambda: len(list_of(output / "checkpoints")) >= 2)
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    (output / LOCK).unlink()  # of no consequence: the system has released the lock
    return output


def test_other_arguments_are_refused_by_name(files: Path, tmp_path: Path) -> None:
    output = stopped(files, tmp_path / "run")
    before = tree(output)
    other = tmp_path / "other"
    shutil.copytree(files, other)
    sentences, _ = demo.generate()
    write_bio(other / "train.bio", [*sentences[:59], sentences[60]])
    pieces = (other / "model" / "vocab.txt").read_text().splitlines()
    (other / "model" / "vocab.txt").write_text("\n".join([*pieces[:-1], "another"]) + "\n")
    cased = tmp_path / "cased"
    shutil.copytree(files / "model", cased / "model")
    (cased / "model" / "tokenizer_config.json").write_text('{"model_max_length": 9}')
    same = [files, files / "train.bio"]
    for changed, message in (
        ([*same, "--lr", "1e-4"], "lr was 0.0003 and is 0.0001"),
        ([*same, "--seed", "9", "--epochs", "3"], "epochs was 2 and is 3; seed was 0 and is 9"),
        ([*same, "--dtype", "fp16"], "and is fp16"),
        ([*same, "--attn", "eager"], "attention was sdpa and is eager"),
        ([files, other / "train.bio"], "the training data differs"),
        ([other, files / "train.bio"], "the model's vocab.txt differs"),
        ([cased, files / "train.bio"], "the model's tokenizer_config.json differs"),
    ):
        where, train, *flags = changed
        more = ["--model", where / "model", "--train", train, *flags, "--resume"]
        run = Run([*arguments(files, output), *more], tmp_path / "printed")
        assert run.wait() == 2, run.text()
        (line,) = [line for line in run.text().splitlines() if line.startswith("train.py")]
        assert "cannot be resumed" in line
        assert message in line
        assert tree(output) == before


@pytest.mark.parametrize("victim", ["tensors.safetensors", "state.json", "manifest.json", None])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    files: Path, whole: Path, tmp_path: Path, victim: str | None
) -> None:
    output = stopped(files, tmp_path / "run")
    before, newest = list_of(output / "checkpoints")[-2:]
    if victim is None:
        (newest / "tensors.safetensors").unlink()
    else:
        content = bytearray((newest / victim).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / victim).write_bytes(content)
    text = finished(files, output, "--resume")
    assert f"{newest}" in text
    assert "trying the checkpoint before it" in text
    assert f"resumed from {before}" in text
    damaged = newest.with_suffix(".damaged")
    assert damaged.is_dir()
    shutil.rmtree(damaged)
    assert_same_tree(output, whole)


def test_all_are_damaged(files: Path, whole: Path, tmp_path: Path) -> None:
    output = stopped(files, tmp_path / "run")
    for path in list_of(output / "checkpoints"):
        (path / "manifest.json").write_text("{}")
    text = finished(files, output, "--resume")
    assert "nothing to resume, starting from step 0" in text
    for path in (output / "checkpoints").glob("*.damaged"):
        shutil.rmtree(path)
    assert_same_tree(output, whole)


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount a small file system."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() or subprocess.run(["mount", *options, folder]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def error_line(run: Run) -> str:
    assert run.wait() == 2, run.text()
    assert "Traceback" not in run.text()
    return run.text().splitlines()[-1]


def test_a_full_disk(files: Path, whole: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        (disk / "ballast").write_bytes(b"0" * (600 << 10))  # room for two checkpoints
        output = disk / "run"
        line = error_line(Run(arguments(files, output), tmp_path / "printed"))
        last = list_of(output / "checkpoints")[-1]
        assert "cannot be written (No space left on device): free 1 MB there" in line
        assert line.startswith(f"train.py: {output}/checkpoints/step-")
        assert line.endswith(f"then continue with --resume from {last}")
        assert not list(output.rglob(".*")), "nothing half-written is left"
        assert read(last)
        (disk / "ballast").unlink()
        finished(files, output, "--resume")
        assert_same_tree(output, whole)


def test_a_directory_that_turns_read_only(files: Path, whole: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as disk:
        output = disk / "run"
        run = Run(arguments(files, output), tmp_path / "printed")
        run.wait_until(lambda: list_of(output / "checkpoints"))
        run.send(signal.SIGSTOP)
        # No file may be open for writing while the disk turns read-only.
        while subprocess.run(["mount", "-o", "remount,ro", disk], stderr=-3).returncode:
            run.send(signal.SIGCONT)
            time.sleep(0.002)
            run.send(signal.SIGSTOP)
        run.send(signal.SIGCONT)
        line = error_line(run)
        assert "cannot be written (Read-only file system)" in line
        last = list_of(output / "checkpoints")[-1]
        assert str(last) in line
        assert read(last)
        assert "cannot be written" in error_line(
            Run([*arguments(files, output), "--resume"], tmp_path / "printed")
        )
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        finished(files, output, "--resume")
        assert_same_tree(output, whole)


def test_a_directory_that_vanishes(files: Path, whole: Path, tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run = Run(arguments(files, output), tmp_path / "printed")
    run.wait_until(lambda: list_of(output / "checkpoints"))
    run.send(signal.SIGSTOP)
    output.rename(elsewhere)
    run.send(signal.SIGCONT)
    line = error_line(run)
    assert f"{output}/checkpoints/step-" in line
    assert "cannot be written (No such file or directory)" in line
    assert not output.exists(), "nothing is written in its place"
    elsewhere.rename(output)
    finished(files, output, "--resume")
    assert_same_tree(output, whole)


# Small batches for fp16: it gives up within the first epoch, before the model is evaluated.
@pytest.mark.parametrize(("dtype", "batch_size"), [("fp32", 8), ("fp16", 1)])
def test_numbers_that_go_wrong_stop_the_run(
    files: Path, tmp_path: Path, dtype: str, batch_size: int
) -> None:
    output = tmp_path / "run"
    more = ("--dtype", dtype, "--lr", "1e38", "--epochs", "5", "--keep", "100", "--average", "inf")
    more += ("--batch-size", str(batch_size))
    line = error_line(Run(arguments(files, output, *more), tmp_path / "printed"))
    step = int(line.partition("step ")[2].partition(":")[0])
    assert "the loss is nan" in line or "the loss is inf" in line or "norm inf" in line
    last = list_of(output / "checkpoints")[-1]
    assert line.endswith(f"last good checkpoint: {last}")
    saved = read(last)
    assert saved.state["step"] < step
    if dtype == "fp32":
        assert all(x.isfinite().all() for x in saved.tensors.values())
    else:
        assert saved.state["scaler"][2] > 10, "many steps were skipped before it gave up"
        assert any(entry["loss"] is None for entry in saved.state["log"])
    # The sentences named are those that the step has read.
    numbers = line.partition("train.bio, sentences at lines ")[2].partition(";")[0].split(", ")
    sentences, _ = demo.generate()
    starts = {sentence.line for sentence in sentences[:60]}
    assert {int(number) for number in numbers} <= starts
    assert len(numbers) in (batch_size, 60 % batch_size)


def test_the_same_twice_and_metrics_are_json(whole: Path, files: Path, tmp_path: Path) -> None:
    finished(files, tmp_path / "again")
    assert_same_tree(tmp_path / "again", whole)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (whole / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
