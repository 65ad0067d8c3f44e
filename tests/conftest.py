"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Idle threads sleep instead of spinning: on a busy machine the tests take a fraction of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # OpenMP reads it when torch is imported
# transformers must not look for updates or weights on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

from minibert import cli
from minibert.files import MinibertError, home
from minibert.pretrained import hub

# Tests compile kernels into a temporary home, which links to what else is in the user's.
temporary_home = tempfile.TemporaryDirectory(prefix="minibert-home-")
for entry in home().glob("*"):
    if entry.name != "kernels":
        Path(temporary_home.name, entry.name).symlink_to(entry.resolve())
os.environ["MINIBERT_HOME"] = temporary_home.name

# A shell's background job ignores Ctrl-C, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(min(2, os.cpu_count() or 1))
# The same examples in every run, and no time limit: the machine may be busy.
hypothesis.settings.register_profile("minibert", deadline=None, derandomize=True)
hypothesis.settings.load_profile("minibert")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, which `make test` downloads."""
    try:
        return hub.locate_model("minilm")
    except MinibertError as error:
        pytest.fail(f"run `make weights/minilm` first: {error}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small models, whose threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs a minibert command in this process; returns its status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command: Callable) -> Callable[..., str]:
    """Runs a minibert command that must fail with status 2; returns its only line, an error."""

    def run(*arguments: object) -> str:
        status, out, error = command(*arguments)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"minibert: [^\n]+\n", error)
        return error

    return run


@pytest.fixture(scope="session")
def mit_movie() -> Path:
    """The directory of MIT Movie; skips the test where it is missing."""
    folder = home() / "data" / "mit_movie"
    if not (folder / "engtest.bio").is_file():
        pytest.skip("MIT Movie is not in $MINIBERT_HOME/data/mit_movie")
    return folder
