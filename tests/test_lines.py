"""Lines tagged in order, in constant memory, in any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
from builders import python

from minibert.files import MinibertError
from minibert.tagging import lines
from minibert.tagging.lines import arriving
from minibert.tagging.stream import POOL, POOL_CHARACTERS, pools, read_ahead
from minibert.text.demo import generate

QUERIES = [" ".join(sentence.words) for part in generate() for sentence in part]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tagger")
    fuzz.good(made)
    return made


def queries(path: Path, count: int) -> Path:
    chosen = (QUERIES[i % len(QUERIES)] for i in range(count))
    path.write_text("".join(f"{line}\n" for line in chosen))
    return path


def tag(processes: int, *arguments: str | Path) -> subprocess.Popen:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(start if processes > 1 else []), "-m", "minibert.cli", "tag"]
        + [str(argument) for argument in (*arguments, "--dtype", "fp32", "--device", "cpu")],
        env=os.environ | fuzz.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_pools_hold_a_number_of_items_and_of_characters() -> None:
    assert [len(p) for p in pools(["x"] * (2 * POOL + 1), len)] == [POOL, POOL, 1]
    half = "x" * (POOL_CHARACTERS // 2)
    sizes = [len(p) for p in pools([half, half, "x", half + half + "x", "", "x"], len)]
    assert sizes == [2, 1, 1, 2]
    assert list(pools([], len)) == []


def test_two_processes_write_what_one_does(folder: Path, tmp_path: Path) -> None:
    """Five pools, the last of them short; the last bits of every score are in the JSON."""
    given = queries(tmp_path / "in.txt", 4 * POOL + 7)
    outs = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.jsonl"
        running = tag(processes, folder, "--file", given, "--output", out, "--json")
        printed, said = running.communicate(timeout=300)
        assert running.returncode == 0, said
        assert printed == ""
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]
    assert outs[0].count(b"\n") == 4 * POOL + 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl", "in.txt"]


def test_a_line_that_comes_alone_is_answered_at_once(folder: Path) -> None:
    """As a coprocess: each line is sent when the answer to the one before has come."""
    running = subprocess.Popen(
        [sys.executable, "-m", "minibert", "tag", folder, "--json", "--device", "cpu"],
        env=os.environ | fuzz.ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    for query in [*QUERIES[:3], ""]:
        running.stdin.write(f"{query}\n".encode())
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["text"] == query
    running.stdin.write(b"no line feed at the end")
    running.stdin.close()
    assert json.loads(running.stdout.read())["text"] == "no line feed at the end"
    assert running.wait(60) == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_lines_that_come_fast_share_a_pool(depth: int, monkeypatch) -> None:
    source, sink = os.pipe()
    monkeypatch.setattr(lines, "PAUSE_S", 0.2)
    os.write(sink, b"a\nb\nhalf")
    found = read_ahead((lambda pool=pool: pool for pool in arriving(source, "pipe")), depth)
    assert next(found) == [(1, b"a\n"), (2, b"b\n")]
    os.write(sink, b" and half\r\n" + b"c\n" * POOL)
    os.close(sink)
    found = [pool for pool in found if pool]
    assert found[0][0] == (3, b"half and half\r\n")
    assert [len(pool) for pool in found] == [POOL, 1]
    assert found[1] == [(POOL + 3, b"c\n")]
    os.close(source)


def test_a_line_from_a_pipe_is_limited(monkeypatch) -> None:
    monkeypatch.setattr("minibert.files.LINE_BYTES", 10)
    source, sink = os.pipe()
    os.write(sink, b"short\n" + b"x" * 20)
    with pytest.raises(MinibertError, match=r"^pipe:2: the line has more than 10 bytes"):
        list(arriving(source, "pipe"))
    os.close(sink)
    os.close(source)


@pytest.mark.slow
def test_a_line_that_another_process_cannot_read(folder: Path, tmp_path: Path) -> None:
    given = queries(tmp_path / "in.txt", 3 * POOL)
    raw = given.read_bytes().split(b"\n")
    raw[POOL + 4] += b"\xff"
    given.write_bytes(b"\n".join(raw))
    running = tag(2, folder, "--file", given, "--output", tmp_path / "out.txt")
    _, said = running.communicate(timeout=300)
    assert running.returncode != 0
    assert f"minibert: {given}:{POOL + 5}: byte 0xff is not UTF-8" in said
    assert "minibert/cli.py" not in said, "a traceback of ours; torchrun always adds its own"
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]


def begun(processes: int, folder: Path, tmp_path: Path) -> subprocess.Popen:
    """A run of many pools whose writer has begun ``out/out.txt``."""
    given = queries(tmp_path / "in.txt", 200 * POOL)
    running = tag(processes, folder, "--file", given, "--output", tmp_path / "out" / "out.txt")
    until = time.monotonic() + 200
    while not list(tmp_path.glob("out/.out.txt.*")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    return running


def worker(parent: int, rank: int) -> int | None:
    """The process id of a rank below ``parent``, once it is there."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "status").read_text()
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"\nPPid:\t{parent}\n" in status and b"RANK=%d" % rank in environment:
            return int(process.name)
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the process in /proc")
@pytest.mark.parametrize(
    "rank", [1, pytest.param(0, marks=[pytest.mark.slow])], ids=["a worker", "the writer"]
)
def test_a_process_that_is_killed_ends_the_run(folder: Path, tmp_path: Path, rank: int) -> None:
    running = begun(2, folder, tmp_path)
    found = worker(running.pid, rank)
    assert found is not None
    os.kill(found, signal.SIGKILL)
    _, said = running.communicate(timeout=200)
    assert running.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert f"rank      : {rank}" in said
    assert not (tmp_path / "out" / "out.txt").exists()
    if rank == 1:
        # Only what is killed itself can leave a temporary file, and it does not bear the name.
        assert not list((tmp_path / "out").iterdir())


def test_a_run_that_is_told_to_end_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    running = begun(1, folder, tmp_path)
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert not list((tmp_path / "out").iterdir())


def test_arguments_that_do_not_go_together(folder: Path, tmp_path, refused, monkeypatch) -> None:
    given = queries(tmp_path / "in.txt", 2)
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    out = tmp_path / "out.txt"
    out.write_text("before")
    for arguments, message in (
        (["a text", "--file", given], "a text and --file: give one of them"),
        (["--file", tmp_path / "none"], "none: cannot be read (No such file or directory)"),
        (["--file", tmp_path], "cannot be read (Is a directory)"),
        (["--file", tmp_path / "bad.txt", "--output", out], "bad.txt:2: byte 0xff is not UTF-8"),
        (["--file", given, "--output", given / "out"], "cannot be written (Not a directory)"),
    ):
        assert message in refused("tag", folder, *arguments)
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt", "in.txt", "out.txt"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert "2 processes cannot share a text: give them a --file" in refused("tag", folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_standard_output(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "minibert.cli", "tag", folder, "who directed jaws"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ran.returncode == 2
    assert ran.stderr == (
        "minibert: standard output: cannot be written (No space left on device): free some space\n"
    )


TAG = """
import ctypes
import sys
import fuzz
from minibert import Tagger, cli
from minibert.text.batches import rounded
tagger = Tagger.from_pretrained(sys.argv[2], device="cpu")
for tokens in sorted({rounded(n) for n in range(3, 2049)}):
    tagger(["a " * (tokens % 3 + 1)] + ["a"] * (tokens // 3 - 1))
del tagger
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
cli.main(sys.argv[1:])
print(fuzz.peak_mib())
"""


def peak_mib(folder: Path, given: Path) -> int:
    """Of tagging a file; every line of the output holds the one of the input."""
    output = given.with_suffix(".jsonl")
    options = ("--json", "--device", "cpu", "--file", given, "--output", output)
    peak = int(python("-c", TAG, "tag", folder, *options, **fuzz.ENVIRONMENT))
    with given.open() as sent, output.open() as found:
        for line, tagged in zip(sent, found, strict=True):
            assert tagged.startswith(json.dumps({"text": line.rstrip("\n")})[:-1])
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(folder: Path, tmp_path: Path) -> None:
    """A million lines, in order: 55 MB, and what is made of them more than ten times that.

    oneDNN keeps about 2 MiB of code for each number of rows, some of which come once in a hundred
    thousand lines. So that the short file has them too, a batch of each number comes first.
    """
    peaks = []
    for count in (10**4, 10**6):
        given = tmp_path / f"{count}.txt"
        chosen = (f"{QUERIES[i % len(QUERIES)]} {i}\n" for i in range(count))
        given.write_text("".join(chosen))
        peaks.append(peak_mib(folder, given))
        print(f"peak after {count} lines: {peaks[-1]} MiB")
    assert peaks[1] - peaks[0] < 16
