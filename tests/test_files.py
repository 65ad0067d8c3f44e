"""Input files that are none, output that must not be replaced, closed streams, little memory."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import fuzz
import pytest

from minibert import cli, files
from minibert.files import MinibertError, machine_faults, read_text, replacing, visible, write_text
from minibert.text.bio import read_bio


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tagger")
    fuzz.good(made)
    return made


def run(capsys: pytest.CaptureFixture, *arguments: str | Path) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


# Output.


def test_a_device_or_fifo_is_written_into(folder: Path, tmp_path: Path, capsys) -> None:
    """Were /dev/null replaced, as root every program of the machine would fill the disk."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    assert run(capsys, "tag", folder, "who", "--output", fifo) == (0, "", "")
    reader.join()
    assert found[0].startswith(b"who") or found[0].startswith(b"[who")
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    null = link(tmp_path / "null", Path("/dev/null"))
    assert run(capsys, "trace", folder, "who", "--html", null) == (0, "", "")
    assert null.is_symlink()
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    if Path("/dev/full").exists():
        status, _, said = run(capsys, "tag", folder, "who", "--output", "/dev/full")
        assert (status, said.count("\n")) == (2, 1)
        assert "/dev/full: cannot be written (No space left on device)" in said


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "target"
    for name in ("a", "b"):  # the target does not exist, and does
        path = tmp_path / name
        write_text(link(path, Path("elsewhere/target")), name)
        assert path.is_symlink()
        assert target.read_text() == name
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    with pytest.raises(MinibertError, match=r"loop: cannot be written .*symbolic links"):
        write_text(link(tmp_path / "loop", tmp_path / "loop"), "")


def test_a_directory_is_refused_before_any_work(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    for command, flag in (("tag", "--output"), ("trace", "--html"), ("trace", "--png")):
        status, out, said = run(capsys, command, folder, "who", flag, tmp_path / "out")
        assert (status, out, said.count("\n")) == (2, "", 1)
        assert "out: is a directory: name a file to write" in said


def test_the_mode_is_the_umasks_or_that_of_the_file_before(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        path = tmp_path / "out"
        write_text(path, "secret")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        os.umask(0o022)
        write_text(path, "still secret")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o664)
        with replacing(path) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            temporary.write_text("shared")
        assert stat.S_IMODE(path.stat().st_mode) == 0o664
        write_text(tmp_path / "new", "")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_a_long_name_and_one_that_is_not_utf8(folder: Path, tmp_path: Path, capsys) -> None:
    write_text(tmp_path / ("é" * 127), "the longest name")
    write_text(tmp_path / "\udcff", "a name that is not UTF-8")
    long = "x" * 300
    for arguments in (
        ["tag", folder, "who", "--output", tmp_path / long],
        ["tag", folder, "--file", tmp_path / long],
        ["tag", long, "who"],
        ["evaluate", folder, long],
        ["trace", folder, "who", "--html", tmp_path / "\udcff\x1b" / long],
        ["evaluate", folder, "\udcff"],
        ["download", "minilm", "--to", tmp_path / long],
        ["verify", "minilm", tmp_path / long],
        ["parity", folder, "\udcff"],
    ):
        status, out, said = run(capsys, *arguments)
        assert (status, out) == (2, ""), arguments
        assert re.fullmatch(r"minibert: [^\n\x1b\udcff]*\n", said), said


# Input.


def test_a_fifo_or_device_is_no_input_file(folder: Path, tmp_path: Path, capsys) -> None:
    """None of these would ever end, or send a byte."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for given, what in (
        (fifo, "is a FIFO"),
        (link(tmp_path / "to_fifo", fifo), "is a FIFO"),
        (link(tmp_path / "zero", Path("/dev/zero")), "is a device"),
        (tmp_path, "cannot be read (Is a directory)"),
    ):
        for arguments in (["tag", folder, "--file", given], ["evaluate", folder, given]):
            status, out, said = run(capsys, *arguments)
            assert (status, out, said.count("\n")) == (2, "", 1)
            assert f"{given}: {what}" in said
        with pytest.raises(MinibertError, match=re.escape(what)):
            files.read_json(given, "name a file")


def test_files_without_an_end_take_no_memory(folder: Path, tmp_path: Path, capsys) -> None:
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, 20 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for arguments, message in (
        (["evaluate", folder, sparse], "more than the limit of 104857600 bytes"),
        (["tag", folder, "--file", sparse], ":1: the line has more than 8388608 bytes"),
    ):
        status, out, said = run(capsys, *arguments)
        assert (status, out, said.count("\n")) == (2, "", 1)
        assert message in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


@pytest.mark.slow
def test_standard_input_without_an_end(folder: Path, tmp_path: Path) -> None:
    for command in ("tag", "trace"):
        with open("/dev/zero", "rb") as zero:
            ran = child(command, folder, stdin=zero)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert re.fullmatch(
            r"minibert: standard input:.* more than 8388608 bytes: .*\n", ran.stderr
        )


def test_a_no_break_space_is_part_of_a_word(tmp_path: Path) -> None:
    path = tmp_path / "x.bio"
    for separator in (" ", "\t"):
        path.write_text(f"a\u00a0b{separator}O\n\u00a0{separator}B-X\n", encoding="utf-8")
        (sentence,) = read_bio(path)
        assert sentence.words == ("a\u00a0b", "\u00a0")
        assert sentence.tags == ("O", "B-X")


def test_lines_may_end_with_cr(tmp_path: Path) -> None:
    path = tmp_path / "x.bio"
    path.write_bytes(b"O\twho\rB-X\tjaws\r\rO\tend\r")
    first, second = read_bio(path)
    assert (first.words, second.words, second.line) == (("who", "jaws"), ("end",), 4)


# Text for people.

NASTY = "a\x1b[2Jb\x07c\x9bd\u202ee\u2066f\rg"


def test_what_controls_a_terminal_is_visible() -> None:
    assert visible(NASTY) == r"a\x1b[2Jb\x07c\x9bd\u202ee\u2066f\x0dg"
    kept = "tab\tline\né 電影 👍🏽 👨\u200d👩\u200d👧 مرحبا"
    assert visible(kept) == kept
    assert str(MinibertError(f"{NASTY}\n\udcff")) == visible(NASTY.replace("\r", " ")) + r" \udcff"
    for code in (*range(32), 127, *range(128, 160)):
        assert (visible(chr(code)) == chr(code)) is (chr(code) in "\t\n")


def renamed(folder: Path, made: Path, labels: list[str]) -> Path:
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    config = json.loads((made / "config.json").read_text())
    names = dict(zip(config["id2label"].values(), labels))
    config["id2label"] = {i: names[old] for i, old in config["id2label"].items()}
    config["label2id"] = {names[old]: i for old, i in config["label2id"].items()}
    (made / "config.json").write_text(json.dumps(config))
    return made


def test_no_label_or_text_controls_the_terminal(folder: Path, tmp_path: Path, capsys) -> None:
    label = "X\x1b[2J\x9b\u202e"
    old = list(json.loads((folder / "config.json").read_text())["id2label"].values())
    labels = [name if name == "O" else f"{name[0]}-{label}{name[2:]}" for name in old]
    model = renamed(folder, tmp_path / "\x1bmodel", labels)
    text = "who \x1b]0;directed\x07 jaws \u202e with mel gibson ? , é " * 3
    bio = tmp_path / "x.bio"
    bio.write_text("O\twho\nO\tjaws\n")
    outputs = []
    for arguments in (
        ["tag", model, text],
        ["tag", model, text, "--json"],
        ["trace", model, text],
        ["evaluate", model, bio],
        ["evaluate", model, bio, "--json"],
    ):
        status, out, said = run(capsys, *arguments)
        assert status == 0, said
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", out)
        outputs.append(out)
    assert r"\x1b\]0;directed\x07" in outputs[0]  # brackets in a text are escaped
    found = json.loads(outputs[1])
    assert found["text"] == text
    assert label in found["entities"][0]["type"]
    assert r"\x1b[2J\x9b\u202e" in outputs[2]
    for arguments in (["tag", f"{NASTY}"], ["evaluate", folder, NASTY], ["download", NASTY]):
        status, _, said = run(capsys, *arguments)
        assert status == 2
        assert visible(NASTY)[:20] in said
        assert "\x1b" not in said


# Streams and the machine.


def child(*arguments: str | Path, shell: str = "", **streams) -> subprocess.CompletedProcess:
    """``minibert`` in a process; ``shell`` redirects or limits it."""
    command = [sys.executable, "-m", "minibert.cli", *map(str, arguments)]
    start = ["sh", "-c", shell, "sh"] if shell else []
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | streams
    return subprocess.run(
        [*start, *command],
        env=os.environ | fuzz.ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        **streams,
    )


@pytest.fixture(scope="module")
def bio(folder: Path) -> Path:
    path = folder.parent / "x.bio"
    path.write_text(fuzz.LINES)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tag", "trace", "evaluate", "info", "--help", "tag --help"])
@pytest.mark.parametrize(
    ("shell", "status", "message"),
    [
        ('exec "$@" >&-', 2, "standard output: is closed: redirect it to a file"),
        ('exec "$@" >/dev/full', 2, "standard output: cannot be written .No space left on device"),
        ('{ sleep 0.1; "$@"; echo $? >&2; } | true', 0, "0"),
    ],
    ids=["closed", "full", "no reader"],
)
def test_standard_output_that_takes_nothing(
    folder: Path, bio: Path, command: str, shell: str, status: int, message: str
) -> None:
    given = {"tag": ["who"], "trace": ["who"], "evaluate": [bio]}
    arguments = [command, folder, *given[command]] if command in given else command.split()
    ran = child(*arguments, shell=shell)
    if "--help" in command and status == 2:  # argparse ignores what it cannot print
        assert (ran.returncode, ran.stderr.count("Traceback")) == (0, 0)
        return
    assert (ran.returncode, ran.stdout) == (status, "")
    assert re.fullmatch(f"(minibert: )?{message}[^\n]*\n", ran.stderr), ran.stderr


@pytest.mark.slow
def test_closed_streams_do_not_get_into_files(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = child("tag", folder, "who", "--output", out, shell='exec "$@" <&- >&- 2>&-')
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert re.fullmatch(r"[^\n]*who[^\n]*\n", out.read_text())
    assert child("tag", folder, "--file", "none", shell='exec "$@" 2>&-').stdout == ""
    for command in ("tag", "trace"):
        ran = child(command, folder, shell='exec "$@" <&-')
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == (
            "minibert: standard input: is closed: give a text or redirect a file\n"
        )
    assert child("tag", folder, "--file", "none", shell='exec "$@" 2>/dev/full').returncode == 2


@pytest.mark.slow
def test_sighup_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    out = tmp_path / "out" / "x.txt"
    running = subprocess.Popen(
        [sys.executable, "-m", "minibert.cli", "tag", folder, "--output", out],
        env=os.environ | fuzz.ENVIRONMENT,
        stdin=reading,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while not out.parent.exists() or not list(out.parent.iterdir()):
        assert running.poll() is None
    running.send_signal(signal.SIGHUP)
    assert running.wait(60) == 128 + signal.SIGHUP
    os.close(writing)
    assert not list(out.parent.iterdir())


MORE = (700, 900, 1200, 1600, 2400)
LIMITS = [300, 450, *(pytest.param(mib, marks=pytest.mark.slow) for mib in MORE)]


@pytest.mark.parametrize("mib", LIMITS)
def test_little_memory_is_one_line(folder: Path, mib: int) -> None:
    ran = child("tag", folder, "who", shell=f'ulimit -v {mib << 10}; exec "$@"')
    if ran.returncode == 0:
        return
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == ""
    said = r"minibert: (out of memory \(|the limit on memory is )[^\n]*\n"
    assert re.fullmatch(said, ran.stderr), ran.stderr


def test_train_py_says_that_memory_is_short_before_it_imports_torch() -> None:
    script = 'ulimit -v 300000; exec "$0" train.py --help'
    ran = subprocess.run(
        ["sh", "-c", script, sys.executable],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    said = r"train\.py: the limit on memory is 307 MB \(ulimit -v\): [^\n]*\n"
    assert re.fullmatch(said, ran.stderr), ran.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"out of memory \(MemoryError\): free some"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto allocate"),
            "out of memory .*can't allocate memory: you tried to allocate",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), "out of memory .*CUDA"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied: check"),
        (OSError("said by a library"), "said by a library: check"),
        (OSError(), "^OSError: check"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error: Exception, message: str) -> None:
    with pytest.raises(MinibertError, match=message) as raised, machine_faults():
        raise error
    assert "None" not in str(raised.value)
    with pytest.raises(RuntimeError, match="a bug"), machine_faults():
        raise RuntimeError("a bug")


def test_what_may_not_be_read_is_not_called_damaged(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """As root everything may be read, so the system's answer is made up."""
    real = os.stat

    def stat_(path, *arguments, **named):
        if Path(os.fsdecode(path)).name == "secret" if not isinstance(path, int) else False:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat_)
    secret = tmp_path / "secret"
    for arguments in (
        ["tag", secret, "who"],
        ["tag", folder, "--file", secret],
        ["evaluate", folder, secret],
        ["tag", folder, "who", "--output", secret],
    ):
        status, out, said = run(capsys, *arguments)
        assert (status, out, said.count("\n")) == (2, "", 1), arguments
        assert "secret" in said
        assert "damaged" not in said
        assert "None" not in said


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("MINIBERT_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    status, out, said = run(capsys, "download", "mit_movie")
    assert (status, out) == (2, "")
    assert said == (
        "minibert: this user has no home directory: set MINIBERT_HOME to a writable directory\n"
    )


def test_text_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "TEXT_BYTES", 10)
    path = tmp_path / "x"
    path.write_text("x" * 10)
    assert read_text(path, "remedy") == "x" * 10
    path.write_text("x" * 11)
    with pytest.raises(MinibertError, match="more than the limit of 10 bytes: remedy"):
        read_text(path, "remedy")
    monkeypatch.setattr(files, "LINE_BYTES", 10)
    lines = files.lines_of(io.BytesIO(b"123456789\n12345678901"), "x")
    assert next(lines) == (1, b"123456789\n")
    with pytest.raises(MinibertError, match="x:2: the line has more than 10 bytes"):
        next(lines)
