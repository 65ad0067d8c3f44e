"""train.py as a user runs it: the main run with real weights, its variants with a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import write_bio
from training_runs import ROOT, Run, tiny_model

from minibert import Tagger, cli
from minibert.files import sha256_of
from minibert.text import demo
from minibert.training.arguments import parse


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """48 training and 16 test sentences."""
    folder = tmp_path_factory.mktemp("bio")
    train, test = demo.generate()
    write_bio(folder / "train.bio", train[:48])
    write_bio(folder / "test.bio", test[:16])
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("small"), demo.generate()[1][:16])


def train(output: Path, *arguments: str | Path) -> tuple[int, str]:
    """The exit status of a run on the CPU and what it printed."""
    run = Run(["--output", output, "--device", "cpu", *arguments], output.with_suffix(".txt"))
    return run.wait(), run.text()


def test_a_run_leaves_what_it_promises_and_repeats_to_the_bit(
    files: Path, minilm: Path, tmp_path: Path
) -> None:
    arguments = ("--model", minilm, "--train", files / "train.bio", "--dev", "0.25")
    arguments += ("--epochs", "2", "--batch-size", "8", "--seed", "3", "--device", "cpu")
    command = [sys.executable, ROOT / "train.py", "--output", tmp_path / "a", *arguments]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    for text in (
        "newly initialised: classifier.weight",
        "epoch 2, dev: entity F1",
        "training loss",
    ):
        assert text in first.stdout
    output = tmp_path / "a"
    assert {path.name for path in output.iterdir()} == {
        "best",
        "finished.json",
        "last",
        "loss.png",
        "metrics.jsonl",
        "report.json",
    }
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 11))
    assert steps[0].keys() == {"step", "epoch", "loss", "lr"}, "no times: they do not repeat"
    assert steps[0]["lr"] == 0.0  # the first step of the warm-up
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [entry["epoch"] for entry in log if entry.get("set") == "dev"] == [1, 2]
    assert isinstance(Tagger.from_pretrained(output / "best")("who directed jaws"), list)

    command[3] = tmp_path / "b"
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    for name in ("best", "last"):
        path = Path(name) / "model.safetensors"
        assert sha256_of(tmp_path / "a" / path) == sha256_of(tmp_path / "b" / path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--recipe", "paper", "--warmup", "0.1"),
        ("--layout", "longest", "--accumulate", "3", "--dtype", "fp32", "--optimizer", "google"),
        ("--dtype", "fp16", "--optimizer", "transformers", "--attn", "eager"),
    ],
    ids=["paper", "padded and accumulated", "fp16 with a scaler"],
)
def test_every_kind_of_run(files: Path, small: Path, tmp_path: Path, arguments: tuple) -> None:
    status, text = train(
        tmp_path / "out",
        *("--model", small, "--train", files / "test.bio", "--test", files / "test.bio"),
        *("--epochs", "1", "--batch-size", "4", *arguments),
    )
    assert status == 0, text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sentences"] == 16
    assert not (tmp_path / "out" / "best").exists(), "there was no dev set to choose by"


def test_averaging_changes_the_saved_model_and_not_the_training(
    files: Path, small: Path, tmp_path: Path
) -> None:
    losses, saved = [], []
    for power in ("1", "inf"):
        status, text = train(
            tmp_path / power,
            *("--model", small, "--train", files / "test.bio", "--average", power),
            *("--epochs", "2", "--batch-size", "8"),
        )
        assert status == 0, text
        lines = (tmp_path / power / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        saved.append(sha256_of(tmp_path / power / "last" / "model.safetensors"))
    assert losses[0] == losses[1]
    assert saved[0] != saved[1]


def test_a_run_with_nothing_to_evaluate_on(files: Path, small: Path, tmp_path: Path) -> None:
    status, text = train(
        tmp_path / "out",
        *("--model", small, "--train", files / "test.bio"),
        *("--epochs", "1", "--batch-size", "8"),
    )
    assert status == 0, text
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"finished.json", "last", "loss.png", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "robert", "--corpus", "demo"), "robert: neither a directory nor a known"),
        (("--model", "{small}", "--train", "none.bio"), "none.bio: cannot be read"),
        (("--model", "{small}", "--corpus", "demo", "--dev", "2"), "--dev 2: neither a file"),
        (("--model", "{small}", "--corpus", "demo", "--lr", "-1"), "lr must be above 0"),
        (("--model", "{small}", "--corpus", "demo", "--layout", "wide"), "layout must be packed"),
        (("--model", "{small}", "--corpus", "demo", "--device", "warp"), "device 'warp'"),
        (("--model", "{small}", "--corpus", "demo", "--optimizer", "sgd"), "optimizer must be"),
        (
            ("--model", "{small}", "--corpus", "demo", "--r-drop", "-1"),
            "r_drop must not be negative",
        ),
        (
            ("--model", "{small}", "--corpus", "demo", "--entity-cost", "-1"),
            "entity_cost must be in [0, 100]",
        ),
        (
            ("--model", "{small}", "--recipe", "paper", "--entity-cost", "1"),
            "entity_cost 1.0 needs decode best",
        ),
        (("--model", "{small}", "--corpus", "demo", "--hide", "1"), "hide is a share"),
        (
            ("--model", "{small}", "--corpus", "demo", "--hide", "0.1"),
            "hide 0.1 needs a second run",
        ),
        (
            ("--model", "{small}", "--recipe", "accurate", "--decode", "each"),
            "entity_cost 0.5 needs decode best",
        ),
        (
            ("--model", "{small}", "--recipe", "accurate", "--head", "crf"),
            "--head crf needs --r-drop 0 --hide 0",
        ),
    ],
)
def test_bad_input_is_said_before_anything_is_written(
    small: Path, tmp_path: Path, arguments: tuple, message: str
) -> None:
    status, text = train(tmp_path / "out", *(a.format(small=small) for a in arguments))
    assert status == 2, text
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(files: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    arguments = ["--model", small, "--train", files / "train.bio", "--device", "cpu"]
    run = Run(["--output", tmp_path / "locked" / "out", *arguments], tmp_path / "printed")
    assert run.wait() == 2
    assert "cannot be written" in run.text()


@pytest.mark.parametrize("program", ["train.py", "minibert train"])
def test_every_flag_is_explained(program: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"]) if program == "train.py" else cli.main(["train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {program} [-h]")
    usage, _, explained = text.partition("\noptions:\n")
    for flag in set(re.findall(r"--[a-z-]+", usage)):
        pattern = rf"^  (--\S+, )?{flag}(, --\S+)?( \S+)?\s+\w"
        assert re.search(pattern, explained, flags=re.MULTILINE), flag
    assert "peak learning rate, reached at the end of the warm-up" in " ".join(text.split())
    assert "(default: 0.0003, accurate: 0.0003, paper: 5e-05)" in " ".join(text.split())


def test_minibert_train_is_train_py(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The package holds the same file; errors carry the name of the command that was typed."""
    loop = ROOT / "minibert" / "training" / "loop.py"
    assert os.readlink(loop) == "../../train.py", "a wheel holds what this links to"
    assert loop.read_bytes() == (ROOT / "train.py").read_bytes()
    wrong = ["--train", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    assert cli.main(["train", *wrong]) == 2
    assert f"minibert train: {tmp_path}/none: cannot be read" in capsys.readouterr().err
    status, text = train(tmp_path / "out", *wrong[:2])
    assert status == 2
    assert f"train.py: {tmp_path}/none: cannot be read" in text


KEEP = """
import resource, torch
from minibert.speed.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory())
faults()  # the first blocks are new
print(faults())
"""


def test_freed_memory_is_kept() -> None:
    before, kept, after = in_a_plain_process(KEEP)
    if kept == "False":
        pytest.skip("not glibc")
    assert int(after) < int(before) / 5


HUGE = """
import torch
from minibert.speed.memory import use_huge_pages

def on_huge_pages():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

use_huge_pages()
before = on_huge_pages()
kept = torch.ones(16 << 20)  # 64 MB
print(on_huge_pages() - before)
"""


def test_large_tensors_lie_on_huge_pages() -> None:
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offered.exists() or "[never]" in offered.read_text():
        pytest.skip("the system has no huge pages")
    (kilobytes,) = in_a_plain_process(HUGE)
    assert int(kilobytes) > 48 << 10


def in_a_plain_process(program: str) -> list[str]:
    """The output of a program that starts without memory settings."""
    settings = ("MALLOC_", "THP_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True
    )
    return ran.stdout.split()
