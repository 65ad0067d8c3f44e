"""Several processes at once, some of them killed: nothing is lost and nothing comes twice."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fuzz
import pytest
from builders import small_checkpoint
from test_lines import queries, tag
from test_resume import arguments, files
from training_runs import Run

__all__ = ["files"]  # a fixture

LINES = 30_000  # 10**6 takes 40 minutes of one core
KILLS = 6


@pytest.mark.slow
def test_tagging_beside_a_training_is_killed_and_repeated(files: Path, tmp_path: Path) -> None:
    """The output file is absent or whole, with each line of the input once and in order."""
    model, given, output = tmp_path / "model", tmp_path / "in.txt", tmp_path / "out.jsonl"
    fuzz.good(model)
    queries(given, LINES)
    options = (model, "--file", given, "--json", "--output", output)
    chance, kills, started = random.Random(7), 0, time.monotonic()
    trained = tmp_path / "run"
    training = Run(arguments(files, trained, "--epochs", "100000"), tmp_path / "said")
    training.wait_until(lambda: list(trained.glob("checkpoints/step-*")))
    while not output.exists():
        running = tag(1, *options)
        if kills == 0:  # how long it takes at least
            begun = time.monotonic()
            while not list(tmp_path.glob(".out.jsonl.*")):
                assert running.poll() is None
                time.sleep(0.05)
            started = time.monotonic() - begun
        if kills < KILLS:
            time.sleep(started + chance.uniform(0, 5))
            running.kill()
            kills += running.wait() == -signal.SIGKILL
            assert not output.exists()
        else:
            _, said = running.communicate(timeout=600)
            assert running.returncode == 0, said
    assert training.process.is_alive(), training.text()
    training.send(signal.SIGTERM)
    assert training.wait() == 128 + signal.SIGTERM
    with given.open() as lines, output.open() as found:
        for line, tagged in zip(lines, found, strict=True):
            assert json.loads(tagged)["text"] == line.rstrip("\n")
    alone = tmp_path / "alone.jsonl"
    again = tag(1, *options[:-1], alone)
    assert again.wait(timeout=600) == 0
    assert output.read_bytes() == alone.read_bytes()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


OPENS = """
import json, sys
from pathlib import Path
from minibert import Tagger
from minibert.pretrained.hub import Pin, Source, download
source = Source(sys.argv[1], tuple(Pin(*pin) for pin in json.loads(sys.argv[2])))
folder = download(source, Path(sys.argv[3]))
print(Tagger.from_pretrained(folder)("who directed jaws with mel gibson ?"))
"""


@pytest.mark.slow
def test_eight_processes_download_and_open_one_model(tmp_path: Path) -> None:
    served = small_checkpoint(tmp_path / "served", words=fuzz.WORDS)
    pins = [
        (p.name, p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(served.iterdir())
    ]
    handler = functools.partial(Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-c", OPENS, url, json.dumps(pins), tmp_path / "model"]
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | fuzz.ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(8)
        ]
        printed = [process.communicate(timeout=300) for process in processes]
        server.shutdown()
    assert [process.returncode for process in processes] == [0] * 8, printed
    assert len({out for out, _ in printed}) == 1
    assert "Entity(text=" in printed[0][0]
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == {
        p.name: p.read_bytes() for p in served.iterdir()
    }
