"""minibert inside another program: copies, casts, autocast, inference mode, threads and forks."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
from builders import small_checkpoint

from minibert import BertForTokenClassification, Embedder, Tagger
from minibert.speed.prepacked import choose_int8

INT8 = pytest.param(
    "int8",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not choose_int8(torch.device("cpu")).value, reason="int8 cannot run"),
    ],
)
TEXTS = ["who directed jaws", "", "a movie with mel gibson ?", "who " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("library")
    return small_checkpoint(made, words=fuzz.WORDS, max_position_embeddings=32, noise=0.4)


@pytest.fixture(params=["auto", "fp32", "int8", "plain"])
def tagger(request: pytest.FixtureRequest, folder: Path) -> Tagger:
    if request.param == "int8" and not choose_int8(torch.device("cpu")).value:
        pytest.skip("int8 cannot run here")
    plain = request.param == "plain"
    dtype = "fp32" if plain else request.param
    device = "cpu" if dtype == "int8" else None
    return Tagger.from_pretrained(folder, dtype=dtype, device=device, prepack=not plain)


def test_a_tagger_can_be_copied_and_pickled(tagger: Tagger) -> None:
    expected = tagger(TEXTS)
    assert any(expected)
    for another in (copy.deepcopy(tagger), pickle.loads(pickle.dumps(tagger))):
        assert another(TEXTS) == expected
        bias_D = another.model.bert.embeddings.norm.bias.data
        bias_D += torch.randn_like(bias_D)
        assert another(TEXTS) != expected
        assert tagger(TEXTS) == expected


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16", "meta"])
def test_prepacked_weights_are_not_cast(folder: Path, cast: str) -> None:
    """The error comes before anything is cast."""
    tagger = Tagger.from_pretrained(folder, dtype="fp32")
    expected = tagger(TEXTS)
    with pytest.raises(ValueError, match="prepacked weights cannot change from torch"):
        tagger.model.to("meta") if cast == "meta" else getattr(tagger.model, cast)()
    tagger.model.to("cpu", torch.float32).float().requires_grad_(False)
    assert tagger(TEXTS) == expected


def test_autocast_around_a_tagger_changes_nothing(tagger: Tagger) -> None:
    expected = tagger(TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tagger(TEXTS) == expected


def test_a_model_loaded_in_inference_mode_trains(folder: Path) -> None:
    with torch.inference_mode():
        model = BertForTokenClassification.from_pretrained(folder, labels="abcde", seed=0)
    ids = torch.tensor([[2, 20, 3]])
    loss = model.train()(ids, labels=torch.tensor([[0, 1, 2]])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_torch_changes_nothing(
    tagger: Tagger, folder: Path, dtype: torch.dtype
) -> None:
    expected = tagger(TEXTS)
    torch.set_default_dtype(dtype)
    try:
        assert tagger(TEXTS) == expected
        assert Tagger.from_pretrained(folder)(TEXTS) == Tagger.from_pretrained(folder)(TEXTS)
        model = BertForTokenClassification.from_pretrained(folder)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_loads_under_another_default_device(folder: Path) -> None:
    with torch.device("meta"):
        model = BertForTokenClassification.from_pretrained(folder)
    expected = BertForTokenClassification.from_pretrained(folder)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_a_program_may_have_another_default_device(folder: Path) -> None:
    tagger = Tagger.from_pretrained(folder, dtype="fp32", device="cpu")
    embedder = Embedder.from_pretrained(folder, device="cpu")
    expected = tagger(TEXTS), embedder(TEXTS)
    torch.set_default_device("meta")  # as "cuda" would, it refuses to mix with the CPU
    try:
        other = Tagger.from_pretrained(folder, dtype="fp32", device="cpu")
        assert tagger(TEXTS) == other(TEXTS) == expected[0]
        assert torch.equal(embedder(TEXTS), expected[1])
        assert embedder([]).device.type == "cpu"
    finally:
        torch.set_default_device(None)


FORKED = """
import os, signal, sys, torch
from minibert import Tagger
torch.set_num_threads(2)
tagger = Tagger.from_pretrained(sys.argv[1], dtype=sys.argv[2])
texts = ["who directed jaws with mel gibson " * 3] * 300
expected = tagger(texts)
child = os.fork()
if not child:
    os._exit(0 if tagger(texts) == expected else 3)
print(child, flush=True)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.get_num_threads())
"""


@pytest.mark.parametrize("dtype", ["auto", "fp32", INT8])
def test_a_fork_after_use_tags(folder: Path, dtype: str) -> None:
    """OpenMP's second thread is not in the child."""
    environment = os.environ | fuzz.ENVIRONMENT | {"OMP_NUM_THREADS": "2"}
    running = subprocess.Popen(
        [sys.executable, "-c", FORKED, folder, dtype],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = running.communicate(timeout=120)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert printed.split()[1:] == ["0", "2"]
