"""Everything in a checkpoint is checked before it is loaded, and before it is saved."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import mutate
import pytest
import torch
from builders import small_bert, small_checkpoint

from minibert.files import MinibertError
from minibert.processes import Team
from minibert.training.adamw import AdamW, bert_groups
from minibert.training.averaging import WeightAverage
from minibert.training.output import Output
from minibert.training.recipe import RECIPES
from minibert.training.resume import (
    SETTINGS,
    Checkpoint,
    Checkpoints,
    DamagedError,
    Training,
    check,
    identity,
    is_finished,
    list_of,
    manifest_of,
    read,
    restore_generators,
)
from minibert.training.schedule import LossScaler

ALONE = Team(0, 1, torch.device("cpu"))
TINY = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}


class Small:
    """A run of a small model after step 2 of 4, and its checkpoint."""

    def __init__(self, folder: Path, fp16: bool = True):
        self.folder, self.fp16 = folder, fp16
        self.arguments = {"seed": "1", "epochs": "2", SETTINGS: "absent"}
        self.checkpoints = Checkpoints(Output(folder, None), 2, self.arguments, ALONE)
        self.checkpoints.begin()
        self.run = self.fresh()
        for step in (1, 2):
            self.run.step = self.run.optimizer.steps = step
            self.run.record(1, 0.5, 1e-3)
        scores = {"entity_f1": 0.5, "token_micro_f1_including_O": 0.75}
        self.run.log.append({"step": 2, "epoch": 1, "set": "dev"} | scores)

    def fresh(self) -> Training:
        model = small_bert(**TINY)
        average = WeightAverage(model.parameters(), 1.0)
        scaler = LossScaler() if self.fp16 else None
        return Training(model, AdamW(bert_groups(model, 0.01)), average, scaler)

    def saved(self) -> Checkpoint:
        self.checkpoints.save(self.run)
        return read(self.folder / "checkpoints" / "step-000002")

    def load(self, checkpoint: Checkpoint) -> Training:
        run = self.fresh()
        check(checkpoint, run, 4, self.arguments)
        run.load(checkpoint.tensors, checkpoint.state)
        restore_generators(checkpoint.tensors, ALONE, 1)
        return run


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path)


def test_a_checkpoint_is_loaded_as_it_was_saved(small: Small) -> None:
    for x in small.run.tensors().values():
        x.uniform_()
    loaded = small.load(small.saved())
    assert loaded.state() == small.run.state()
    for name, x in small.run.tensors().items():
        assert torch.equal(loaded.tensors()[name], x)


def test_an_older_checkpoint_does_not_name_the_tokenizers_settings(small: Small) -> None:
    checkpoint = small.saved()
    del checkpoint.state["arguments"][SETTINGS]
    small.arguments[SETTINGS] = "0" * 64
    assert small.load(checkpoint).step == 2


def test_newer_fields_count_only_where_they_are_on(small: Small, tmp_path: Path) -> None:
    """Older checkpoints do not have them."""
    model = small_checkpoint(tmp_path / "model", **TINY)
    options = argparse.Namespace(seed=1, graphs=False)
    for r_drop, hide, entity_cost in ((0.0, 0.0, 0.0), (0.5, 0.0, 0.0), (0.5, 0.25, 1.5)):
        new = {"r_drop": r_drop, "hide": hide, "entity_cost": entity_cost}
        recipe = replace(RECIPES["default"], **new)
        found = identity(small.run, recipe, options, "fp32", model, {})
        for name, value in new.items():
            assert found.get(name) == (str(value) if value else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("step", x) for x in (1, 3, 0, -1, True, "2", None, 2.0, 10**400)),
        *(("optimizer_steps", x) for x in (3, -1, None, [], 1.0, True)),
        *(("best_f1", x) for x in (2.0, None, "1", math.nan, math.inf, 10**400)),
        *(("scaler", x) for x in (None, [], [1.0, 0], [0.0, 0, 0], [math.inf, 0, 0], {}, "abc")),
        *(("scaler", [1.0, x, 0]) for x in (-1, 1.5, None)),
        *(("log", x) for x in (None, {}, [], [1], [{}])),
        *(("log", [{"step": s, "epoch": 1, "loss": math.nan, "lr": 0.1}] * 2) for s in (1, 2)),
        *(("arguments", x) for x in (None, [], {"seed": 1}, {"seed": "1"})),
        *(("machine", x) for x in (None, "abc", {"torch": 2})),
    ],
)
def test_a_crafted_state_is_refused(small: Small, name: str, value: object) -> None:
    checkpoint = small.saved()
    checkpoint.state[name] = value
    with pytest.raises(MinibertError, match=r"step-000002: cannot be resumed"):
        small.load(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight.classifier.bias", lambda x: x[:1], "float32 (1,), not torch.float32 (5,)"),
        ("first.classifier.bias", lambda x: x[:1], "is torch.float32 (1,)"),
        ("second.classifier.bias", lambda x: x.half(), "is torch.float16 (5,)"),
        ("average.classifier.bias", lambda x: x.fill_(math.nan), "is not finite"),
        ("second.classifier.bias", lambda x: x.fill_(math.inf), "is not finite"),
        ("weight.classifier.bias", None, "other tensors: weight.classifier.bias"),
        ("third.classifier.bias", lambda x: torch.ones(5), "other tensors: third.classifier.bias"),
        ("generator.cpu", None, "no generator.cpu"),
        ("generator.cpu", lambda x: x[0], "generator.cpu"),
        ("generator.cpu", lambda x: x[:0], "generator.cpu"),
        ("generator.cpu", lambda x: x[:, :-1], "generator.cpu: "),
        ("generator.cpu", lambda x: x.fill_(255), "generator.cpu: "),
        ("generator.cpu", lambda x: x.float(), "generator.cpu"),
    ],
)
def test_crafted_tensors_are_refused(small: Small, name: str, change, message: str) -> None:
    checkpoint = small.saved()
    given = checkpoint.tensors.pop(name, None)
    if change is not None:
        checkpoint.tensors[name] = change(given)
    with pytest.raises(MinibertError, match=rf"cannot be resumed \(.*{re.escape(message)}"):
        small.load(checkpoint)


def test_another_format_is_not_damage(small: Small) -> None:
    path = small.saved().path
    state = json.loads((path / "state.json").read_text()) | {"format": 2}
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").write_text(json.dumps(manifest_of(path)))
    with pytest.raises(MinibertError, match="has format 2, not 1: resume with the version"):
        small.checkpoints.resume(small.fresh(), 4)
    assert list_of(path.parent) == [path], "it was not set aside"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_not_damage(
    small: Small, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = small.saved().path

    def fail(path: Path) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(MinibertError, match=rf"{path}: cannot be read \("):
            small.checkpoints.resume(small.fresh(), 4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        with pytest.raises(MinibertError, match=r"checkpoints: cannot be read \("):
            small.checkpoints.resume(small.fresh(), 4)
    assert list_of(path.parent) == [path]


@pytest.mark.parametrize("inputs", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_checkpoints_are_loaded_or_refused_in_one_line(small: Small, inputs: int) -> None:
    """The manifest fits, so each input reaches the checks."""
    path = small.saved().path
    good = {name: (path / name).read_bytes() for name in ("state.json", "tensors.safetensors")}
    accepted, refused = 0, []
    for number in range(inputs):
        draw = random.Random(f"load {number}")
        name = draw.choice(list(good))
        for other, content in good.items():
            (path / other).write_bytes(content)
        if name == "state.json":
            changed = mutate.json_(draw, json.loads(good[name])).encode("utf-8", "surrogatepass")
        else:
            changed = mutate.safetensors_(draw, good[name])
        (path / name).write_bytes(changed)
        (path / "manifest.json").write_text(json.dumps(manifest_of(path)))
        try:
            small.load(read(path))
            accepted += 1
        except MinibertError as error:
            refused.append((number, error))
    for number, error in refused:
        assert not isinstance(error, DamagedError), number
        assert len(str(error).splitlines()) == 1, number
    assert 0 < accepted < inputs / 2


@pytest.mark.parametrize("kind", ["weight", "first", "second", "average"])
def test_infinities_are_never_saved(tmp_path: Path, kind: str) -> None:
    small = Small(tmp_path, fp16=False)
    good = small.saved().path
    small.run.step = 3
    small.run.tensors()[f"{kind}.classifier.bias"][1] = math.inf
    with pytest.raises(MinibertError) as raised:
        small.checkpoints.save(small.run)
    assert str(raised.value).startswith(f"step 3: {kind}.classifier.bias is not finite: lower --lr")
    assert str(raised.value).endswith(f"last good checkpoint: {good}")
    assert list_of(good.parent) == [good]


def test_a_run_is_finished_once_its_last_epoch_is_evaluated(small: Small, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"

    def evaluated() -> None:
        metrics.write_text("".join(json.dumps(entry) + "\n" for entry in small.run.log))

    path = small.saved().path
    assert not is_finished(path, metrics), "never evaluated"
    evaluated()
    assert not is_finished(path, metrics), "one epoch of two"
    small.run.step = 3
    small.run.record(2, 0.25, 1e-3)
    small.checkpoints.save(small.run)
    last = list_of(path.parent)[-1]
    assert not is_finished(last, metrics), "saved, but not evaluated"
    evaluated()
    assert is_finished(last, metrics)
    for content in ("not JSON", "[1]", metrics.read_text().replace("0.25", "0.5")):
        metrics.write_text(content)
        assert not is_finished(last, metrics)
