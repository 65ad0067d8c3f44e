"""What a person sees at a terminal: prompts, colour, suggestions, progress, completion."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from builders import LABELS, save, small_bert

from minibert import cli
from minibert.tagging import stream
from minibert.tagging.words import Entity

TEXT = r"the [film] c:\jaws"
FILM, JAWS = Entity("[film]", "X", 4, 10, 0.5), Entity(r"c:\jaws", "Y", 11, 18, 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(small_bert(), tmp_path_factory.mktemp("model"))


def test_brackets_of_the_text_are_told_from_ours() -> None:
    assert cli._marked(TEXT, [FILM]) == r"the [\[film\] X 0.50] c:\\jaws"
    assert cli._marked(TEXT, [JAWS]) == r"the \[film\] [c:\\jaws Y 0.25]"
    assert cli._marked(TEXT, [FILM]) != cli._marked(cli._marked(TEXT, [FILM]), [])
    assert cli._marked("\x1b[1m", []) == r"\x1b\[1m"
    coloured = cli._marked("\x1b jaws", [Entity("jaws", "Y", 2, 6, 0.25)], colour=True)
    assert coloured == "\\x1b [\x1b[1;36mjaws\x1b[0m \x1b[2mY 0.25\x1b[0m]"


def test_a_terminal_gets_a_prompt_and_colour(folder: Path) -> None:
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "minibert", "tag", folder, "--device", "cpu", "--each-word"],
        env={name: value for name, value in os.environ.items() if name != "NO_COLOR"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.write(ours, b"abc def\n\x04")  # Ctrl-D ends the input
    shown = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    os.close(ours)
    assert running.wait(60) == 0
    assert b"minibert: type a sentence and press Enter; Ctrl-D ends" in shown
    assert b"\x1b[1;36m" in shown


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not cli._in_colour()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli._in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not cli._in_colour()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tga", "x"), "did you mean tag\n"),
        (("tag", "x", "--atn", "y"), "arguments: --atn y, did you mean --attn\n"),
        (("tag", "x", "--attn", "sdpaa"), ", did you mean sdpa\n"),
        (("download", "mini-lm"), "mini-lm: not known, did you mean minilm: give one of"),
        (("download", "zzz"), "zzz: not known: give one of"),
    ],
)
def test_close_names_are_suggested(arguments: tuple, message: str, capsys) -> None:
    try:
        status = cli.main(list(arguments))
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_info_as_json_and_in_80_columns(command: Callable, monkeypatch) -> None:
    monkeypatch.setenv("MINIBERT_HOME", "/home")
    status, out, _ = command("info", "--json")
    assert status == 0
    facts = json.loads(out)
    assert {"minibert", "packages", "auto_dtype", "fused_fp32"} <= set(facts)
    text = command("info")[1]
    measured = {name for name, value in facts.items() if "/s" in value}  # in both calls
    joined = " ".join(text.split())
    assert all(value in joined for name, value in facts.items() if name not in measured)
    assert max(map(len, text.splitlines())) <= 80


def test_what_takes_long_shows_progress_on_a_terminal_only(monkeypatch, capsys) -> None:
    assert list(stream.progress(iter(LABELS), "labels")) == list(LABELS)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = stream.progress(None, "labels", 5)
    assert not bar.disable
    assert bar.delay == 3
    monkeypatch.setattr(sys, "stderr", None)
    assert stream.progress(None, "labels", 5).disable


def test_a_shell_completes_options(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    line = "minibert info --j"
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    subprocess.run([sys.executable, "-m", "minibert"], env=os.environ | asked, check=False)
    assert answer.read_text().strip() == "--json"
