"""Training in several processes: the same curve and scores, one writer, no lost work."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from builders import write_bio
from training_runs import ROOT, assert_same_tree, run_team, tiny_model

from minibert import processes
from minibert.files import MinibertError
from minibert.text import demo
from minibert.training.resume import list_of, read

# A sum over processes adds in another order: an ulp or two of a loss around 3 in every step, which
# the optimiser carries on.
ROUNDING = 20 * torch.finfo(torch.float32).eps
LAYOUTS = {
    "padded": ("--layout", "longest"),
    "packed": ("--layout", "packed"),
    "accumulated": ("--accumulate", "3", "--batch-size", "3", "--r-drop", "1"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """57 sentences: the last batch of 8 has a single one, none for a second process.

    No dropout, because each process draws masks for its own sentences.
    """
    folder = tmp_path_factory.mktemp("files")
    train, test = demo.generate()
    tiny_model(folder / "model", train[:57] + test[:12], dropout=0.0)
    write_bio(folder / "train.bio", train[:57])
    write_bio(folder / "test.bio", train[:12])
    return folder


def arguments(files: Path, output: Path, *more: str) -> list:
    return [
        *("--model", files / "model", "--train", files / "train.bio", "--dev", files / "test.bio"),
        *("--device", "cpu", "--dtype", "fp32", "--epochs", "4", "--batch-size", "8"),
        *("--lr", "1e-2", "--average", "inf", "--checkpoint-every", "4"),
        *("--output", output, *more),
    ]


def finish(size: int, files: Path, output: Path, *more: str) -> list[str]:
    """Train to the end; returns what each process printed."""
    runs = run_team(size, arguments(files, output, *more), output.parent)
    assert [run.wait() for run in runs] == [0] * size, [run.text() for run in runs]
    return [run.text() for run in runs]


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_to_rounding(output: Path, expected: Path) -> None:
    """The loss of every step to rounding, every score exactly."""
    for ours, theirs in zip(log_of(output), log_of(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name == "loss":
                assert abs(ours[name] - value) <= ROUNDING * value, theirs
            else:
                assert ours[name] == value, theirs
    assert (output / "report.json").read_bytes() == (expected / "report.json").read_bytes()


@pytest.mark.parametrize(
    "layout", ["packed", "accumulated", pytest.param("padded", marks=pytest.mark.slow)]
)
def test_two_processes_have_the_curve_and_the_scores_of_one(
    files: Path, tmp_path: Path, layout: str
) -> None:
    finish(1, files, tmp_path / "one", *LAYOUTS[layout])
    scores = [entry.get("entity_f1", 0) for entry in log_of(tmp_path / "one")]
    assert max(scores) > 0, "the scores must say something"
    writer, other = finish(2, files, tmp_path / "two", *LAYOUTS[layout])
    assert_same_to_rounding(tmp_path / "two", tmp_path / "one")
    assert "saved to" in writer
    assert other == "", "only the writer prints"


@pytest.mark.slow
def test_three_processes_are_killed_and_go_on_to_the_same_bits(files: Path, tmp_path: Path) -> None:
    """Three, because a sum of two numbers does not depend on their order."""
    finish(3, files, tmp_path / "whole")
    output = tmp_path / "run"
    runs = run_team(3, arguments(files, output), tmp_path)
    runs[0].wait_until(lambda: len(list_of(output / "checkpoints")) >= 2)
    for run in runs:
        run.process.kill()
    assert [run.wait() for run in runs] == [-signal.SIGKILL] * 3
    finish(3, files, output, "--resume")
    assert_same_tree(output, tmp_path / "whole")


@pytest.mark.parametrize(("killed", "size"), [(0, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_a_process_dies_and_others_go_on(
    files: Path, tmp_path: Path, killed: int, size: int
) -> None:
    """The others end with one line; the run resumes with another number of processes."""
    finish(1, files, tmp_path / "whole")
    output = tmp_path / "run"
    runs = run_team(2, arguments(files, output), tmp_path)
    runs[0].wait_until(lambda: list_of(output / "checkpoints"))
    runs[killed].process.kill()
    assert runs[killed].wait() == -signal.SIGKILL
    survivor = runs[1 - killed]
    assert survivor.wait() == 2, survivor.text()
    assert "Traceback" not in survivor.text()
    line = survivor.text().splitlines()[-1]
    assert "another process of this run has ended" in line
    text = finish(size, files, output, "--resume")[0]
    assert f"the number of processes was 2 and is {size}: the run continues" in text
    assert_same_to_rounding(output, tmp_path / "whole")


def test_a_signal_to_one_process_stops_all_after_the_same_step(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    runs = run_team(2, arguments(files, output, "--epochs", "200"), tmp_path)
    runs[0].wait_until(lambda: list_of(output / "checkpoints"))  # then the other is in its loop too
    runs[1].send(signal.SIGTERM)
    assert [run.wait() for run in runs] == [143, 143]
    assert "the same command with --resume continues" in runs[0].text()
    (*_, last) = list_of(output / "checkpoints")
    assert len(read(last).tensors["generator.cpu"]) == 2, "both generators are in it"


def test_the_writer_cannot_write(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    runs = run_team(2, arguments(files, output), tmp_path)
    runs[0].wait_until(lambda: list_of(output / "checkpoints"))
    for run in runs:
        run.send(signal.SIGSTOP)
    output.rename(tmp_path / "elsewhere")
    for run in runs:
        run.send(signal.SIGCONT)
    assert [run.wait() for run in runs] == [2, 2]
    assert "cannot be written (No such file or directory)" in runs[0].text()
    assert not any("Traceback" in run.text() for run in runs)


@pytest.mark.parametrize(("rank", "others"), [(0, "RANK 1, 2"), (1, "RANK 0")])
def test_processes_that_do_not_come_are_named(
    rank: int, others: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 3, "RANK": rank}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "NOTICE", timedelta(seconds=0.1))
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    with pytest.raises(MinibertError, match=f"cannot connect to {others} "):
        with processes.connected(torch.device("cpu")):
            pass
    said = f"RANK {rank} of 3, 127.0.0.1:{port}: waiting for {others}, 0:00:01 at most\n"
    assert capfd.readouterr().err == said


def test_a_port_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": other.getsockname()[1]}
        for name, value in (variables | {"WORLD_SIZE": 2, "RANK": 0}).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(MinibertError, match=r"address already in use.*a free MASTER_PORT"):
            with processes.connected(torch.device("cpu")):
                pass


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a number from 1 to"),
        ({"WORLD_SIZE": "2"}, r"RANK=\(not set\): must be"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK=x: must be a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2: must be a number from 0 to 1"),
        ({"RANK": "1"}, "RANK=1: must be a number from 0 to 0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"MASTER_PORT=\(not set\)"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "abc"}, "MASTER_PORT=abc"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "80"}, "MASTER_ADDR is not set"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ],
)
def test_the_environment_is_checked_in_one_place(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert processes.launched() == (0, 1, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MinibertError, match=message):
        processes.launched()


def test_torchrun(files: Path, tmp_path: Path) -> None:
    """The command as typed; torchrun names the process that was killed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", str(ROOT / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output: Path, *more: str) -> subprocess.Popen:
        command = [*launcher, *map(str, arguments(files, output, *more))]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    output = tmp_path / "run"
    started = start(output, "--epochs", "2000")
    try:
        while not list_of(output / "checkpoints"):
            assert started.poll() is None, started.communicate()
        children = f"/proc/{started.pid}/task/{started.pid}/children"
        victim = int(Path(children).read_text().split()[-1])
        os.kill(victim, signal.SIGKILL)
        _, errors = started.communicate(timeout=120)
    finally:
        started.kill()
    assert started.returncode == 1
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in errors
    assert read(list_of(output / "checkpoints")[-1])
