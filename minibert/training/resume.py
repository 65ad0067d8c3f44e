"""Checkpoints of a training run, complete and verified, and how to resume from one.

A checkpoint is a directory, ``OUTPUT/checkpoints/step-000123``:

    tensors.safetensors  weights, both moments, averaged weights, states of the random generators
    state.json           every other number that a step changes, and what the run was started with
    manifest.json        size and SHA-256 of the other two

It is written under a temporary name, synced, and renamed, so a directory with a checkpoint's name
is always complete, whenever the process is killed. The position in the data is the step's number:
the order of the sentences is a pure function of seed and epoch (``epoch_batches``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minibert.files import (
    TEMPORARY,
    MinibertError,
    read_json,
    reason,
    sha256_of,
    sync,
    write_text,
)
from minibert.model.heads import BertWithHead
from minibert.pretrained import weights
from minibert.processes import Team
from minibert.training.adamw import AdamW
from minibert.training.averaging import WeightAverage
from minibert.training.corpus import Part
from minibert.training.output import FINISHED, METRICS, MODEL_FILES, Output
from minibert.training.recipe import Recipe
from minibert.training.schedule import LossScaler

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
NEWEST = 2  # checkpoints that are kept while a run lasts: the newest may turn out damaged
FORMAT = 1
REQUIRED = {"arguments", "machine", "step", "optimizer_steps", "scaler", "best_f1", "log"}
STATE_BYTES = 1 << 30  # most in a state.json; the log has about 100 bytes per step
SETTINGS = "the model's tokenizer_config.json"
NEWER = ("r_drop", "hide", "entity_cost")  # of a recipe: older checkpoints do not have them


class DamagedError(MinibertError):
    """A checkpoint lacks a file or differs from its manifest."""


@dataclass(eq=False)
class Training:
    """Everything that a training step changes.

    Args:
        model: in float32.
        optimizer: of all its parameters, in their order.
        average: of its weights.
        scaler: of the loss, with fp16.
        step: optimiser steps done.
        best_f1: highest entity F1 on the dev set so far.
        log: the entries of ``metrics.jsonl``.
    """

    model: BertWithHead
    optimizer: AdamW
    average: WeightAverage
    scaler: LossScaler | None
    step: int = 0
    best_f1: float = -1.0
    log: list[dict] = field(default_factory=list)

    def record(self, epoch: int, loss: float, lr: float) -> None:
        """Log a step."""
        finite = loss if math.isfinite(loss) else None  # JSON has no NaN
        self.log.append({"step": self.step, "epoch": epoch, "loss": finite, "lr": lr})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, not copied; without the generators' states."""
        # In format 1 the head's parameters have no prefix: "weight.classifier.weight".
        names = [name.removeprefix("head.") for name, _ in self.model.named_parameters()]
        named = {
            "weight": [parameter.detach() for parameter in self.model.parameters()],
            "first": self.optimizer.first,
            "second": self.optimizer.second,
            "average": self.average.averages,
        }
        return {f"{kind}.{n}": x for kind, xs in named.items() for n, x in zip(names, xs)}

    def state(self) -> dict:
        """All numbers, for JSON."""
        scaler = self.scaler
        return {
            "step": self.step,
            "optimizer_steps": self.optimizer.steps,
            "scaler": scaler and [scaler.scale, scaler.good_steps, scaler.skipped],
            "best_f1": self.best_f1,
            "log": self.log,
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Restore what ``tensors`` and ``state`` returned, checked by ``check``."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
        self.optimizer.steps = state["optimizer_steps"]
        if self.scaler:
            self.scaler.scale, self.scaler.good_steps, self.scaler.skipped = state["scaler"]
        self.step, self.best_f1, self.log = state["step"], state["best_f1"], state["log"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint directory, verified against its manifest."""

    path: Path
    state: dict
    tensors: dict[str, Tensor]


def identity(
    run: Training,
    recipe: Recipe,
    options: argparse.Namespace,
    dtype: str,
    directory: Path,
    parts: dict[str, Part],
) -> dict[str, str]:
    """What decides a run's result, by name; a run only resumes with the same.

    Args:
        run, recipe: as chosen.
        options: seed and graphs of the command line. (For CUDA graphs batches are filled up, which
            draws other dropout masks.)
        dtype: of autocast.
        directory: of the model to train; the content of its files counts, not their names.
        parts: the sentences by purpose; they count, not the files' names.
    """
    values = {
        name: str(value) for name, value in asdict(recipe).items() if value or name not in NEWER
    } | {
        "seed": str(options.seed),
        "dtype": dtype,
        "attention": run.model.attn_implementation,
        "AdamW": type(run.optimizer).__name__,
    }
    if options.graphs:
        values["CUDA graphs"] = "on"
    values[SETTINGS] = "absent"
    files = [directory / name for name in MODEL_FILES]
    for path in dict.fromkeys([*files, *weights.files_of(directory / weights.WEIGHTS)]):
        if path.is_file():
            values[f"the model's {path.name}"] = sha256_of(path)
    for name, part in parts.items():
        content = json.dumps([(s.words, s.tags) for s in part.sentences])
        values[f"the {name} data"] = hashlib.sha256(content.encode()).hexdigest()
    return values


class Checkpoints:
    """The checkpoints of one run.

    Args:
        output: of the run; they are in its directory ``checkpoints``.
        keep: how many to keep when the run is done, the newest ones.
        arguments: the run's ``identity``.
        team: the processes of the run. With another number of processes or threads, another device
            or another torch a run resumes too, equal to rounding only, and says so.
    """

    def __init__(self, output: Output, keep: int, arguments: dict[str, str], team: Team):
        self.output = output
        self.folder = output.path / "checkpoints"
        self.keep = keep
        self.arguments = arguments
        self.machine = {
            "the number of processes": str(team.size),
            "the number of threads": str(torch.get_num_threads()),
            "the device": team.device.type,
            "torch": torch.__version__,
        }
        self.team = team

    def last(self) -> str:
        """For messages: the newest checkpoint, or "none yet"."""
        found = list_of(self.folder)
        return str(found[-1]) if found else "none yet"

    def begin(self, overwrite: bool = False) -> None:
        """Make an empty folder for a new run, and delete the checkpoints of a finished one.

        Args:
            overwrite: replace a finished run.

        Raises:
            MinibertError: the folder holds an unfinished run, or a finished one that may not be
                overwritten; or it cannot be made.
        """
        if not self.team.is_writer:
            return
        found, done = list_of(self.folder), self.output.path / FINISHED
        finished = done.exists()
        if found and not finished and not is_finished(found[-1], self.output.path / METRICS):
            raise MinibertError(
                f"{found[-1]}: belongs to an unfinished run: continue it with --resume, "
                f"or delete {self.folder} to start over"
            )
        if (found or finished) and not overwrite:
            raise MinibertError(
                f"{self.output.path}: holds a finished run: give another --output, "
                "or --overwrite to replace it"
            )
        self._prepare(found)
        self.output.discard(FINISHED)

    def finish(self) -> None:
        """Record that the run is done, then delete all checkpoints but ``keep``, the newest last.

        Raises:
            MinibertError: the disk is full or the directory is not writable.
        """
        if not self.team.is_writer:
            return
        record = {"format": FORMAT, "arguments": self.arguments}
        write_text(self.output.at(FINISHED), json.dumps(record, indent=1) + "\n")
        self._remove_but(self.keep)
        if not self.keep:
            with suppress(OSError):  # it may hold what is not ours, or damaged ones
                self.folder.rmdir()

    def is_done(self) -> bool:
        """Whether the run is finished and its checkpoints are gone: nothing is left to resume.

        Raises:
            MinibertError: the finished run had another identity.
        """
        done = self.output.path / FINISHED
        if list_of(self.folder) or not done.exists():
            return False
        record = read_json(done, "make it readable")
        then = record.get("arguments") if isinstance(record, dict) else None
        if changes := differences(then if isinstance(then, dict) else {}, self.arguments):
            raise MinibertError(
                f"{self.output.path}: holds a finished run, {'; '.join(changes)}: "
                "give another --output, or --overwrite without --resume to replace it"
            )
        return True

    def _remove_but(self, count: int) -> None:
        found = list_of(self.folder)
        for path in found[: len(found) - count]:
            try:
                remove(path)
            except OSError as error:
                raise cannot_write(path, error) from None

    def _prepare(self, old: list[Path]) -> None:
        if not self.team.is_writer:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            self.output.sweep()
            for path in old:
                remove(path)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def save(self, training: Training) -> None:
        """Write a checkpoint and remove the oldest that are not kept. Every process calls this.

        Raises:
            MinibertError: a value is not finite, the disk is full, or the folder is not writable
                or has vanished. Earlier checkpoints are untouched.
        """
        if wrong := not_finite(training.tensors()):
            raise MinibertError(
                f"step {training.step}: {wrong} is not finite: lower --lr or train in --dtype "
                f"fp32; last good checkpoint: {self.last()}"
            )
        generators = {
            f"generator.{name}": self.team.gather(x)
            for name, x in generator_states(self.team.device).items()
        }
        if not self.team.is_writer:
            return
        tensors = training.tensors() | generators
        state = {"format": FORMAT, "arguments": self.arguments, "machine": self.machine}
        path = self.output.at(f"checkpoints/step-{training.step:06}")
        write(path, tensors, state | training.state())
        self._remove_but(max(NEWEST, self.keep))

    def resume(self, training: Training, total_steps: int) -> str:
        """Load the newest complete checkpoint, if there is one; returns what happened, for people.

        A damaged one is renamed to ``step-NUMBER.damaged``.

        Raises:
            MinibertError: the run was started with another identity, or a checkpoint cannot be read
                or does not fit the run. Nothing has been renamed or changed then.
        """
        notes = []
        found = None
        for path in reversed(list_of(self.folder)):
            try:
                found = read(path)
                break
            except DamagedError as error:
                notes.append(f"{error}: trying the checkpoint before it")
                if self.team.is_writer:
                    set_aside(path)
        if found is None:
            self._prepare([])
            return "\n".join([*notes, f"{self.folder}: nothing to resume, starting from step 0"])
        check(found, training, total_steps, self.arguments)
        training.load(found.tensors, found.state)
        restore_generators(found.tensors, self.team, int(self.arguments["seed"]) + training.step)
        if changes := differences(found.state["machine"], self.machine):
            notes.append(f"{'; '.join(changes)}: the run continues, equal to rounding only")
        # A run that was killed may not have removed its old ones.
        self._prepare(list_of(self.folder)[: -max(NEWEST, self.keep)])
        return "\n".join([*notes, f"resumed from {found.path}"])


def list_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their names, oldest first; none if it does not exist.

    Raises:
        MinibertError: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_read(folder, error) from None
    return sorted((folder / n for n in names if re.fullmatch(r"step-[0-9]+", n)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def write(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write a checkpoint completely or not at all; its parent must exist.

    Raises:
        MinibertError: the disk is full, or the parent is not writable or has vanished.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        remove(temporary)
        temporary.mkdir()
        weights.write(temporary / TENSORS, on_cpu, {"format": "pt"})
        (temporary / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        manifest = json.dumps(manifest_of(temporary), indent=1)
        (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        for name in (TENSORS, STATE, MANIFEST):
            sync(temporary / name)
        sync(temporary)
        remove(path)  # a damaged one
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(path, error, sum(x.nbytes for x in on_cpu.values())) from None


def manifest_of(path: Path) -> dict[str, dict]:
    """Size and SHA-256 of a checkpoint's tensors and state, as they are on the disk."""
    return {
        name: {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
        for name in (TENSORS, STATE)
    }


def cannot_write(path: Path, error: OSError, size: int = 0) -> MinibertError:
    """The error with the path, the remedy and the checkpoint from which to resume."""
    found = list_of(path.parent)
    space = f"free {max(1, size // 10**6)} MB there" if size else "free some space there"
    then = f"continue with --resume from {found[-1]}" if found else "start again"
    return MinibertError(
        f"{path}: cannot be written ({reason(error)}): {space} or make it writable, then {then}"
    )


def cannot_read(path: Path, error: OSError) -> MinibertError:
    """The error with the path and the remedy."""
    return MinibertError(
        f"{path}: cannot be read ({reason(error)}): make it readable, then repeat the command"
    )


def is_finished(path: Path, metrics: Path) -> bool:
    """Whether the run of a checkpoint has trained, evaluated and saved its last epoch.

    ``metrics.jsonl`` is written after the models of an epoch: a run is finished if the file holds
    the steps of its newest checkpoint and they reach the last epoch of its recipe.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        saved, evaluated = ([e for e in log if "loss" in e] for log in (state["log"], entries))
        return saved == evaluated and str(saved[-1]["epoch"]) == state["arguments"]["epochs"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def remove(path: Path) -> None:
    """Delete a checkpoint, renaming it first: a half-deleted one has no checkpoint's name."""
    if path.exists():
        doomed = path.with_name(f".{path.name.lstrip('.')}.old{TEMPORARY}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint."""
    try:
        remove(path.with_suffix(".damaged"))
        os.replace(path, path.with_suffix(".damaged"))
    except OSError as error:
        raise cannot_write(path, error) from None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedError: a file is missing, or differs from the manifest.
        MinibertError: it cannot be read, or has another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        verify(path)
        # By its content, not by its path, which safetensors requires to be UTF-8.
        tensors = load((path / TENSORS).read_bytes())
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise MinibertError(
                f"{path}: has format {state['format']!r}, not {FORMAT}: resume with the version of "
                "minibert that wrote it, or give another --output"
            )
        if missing := REQUIRED - state.keys():
            raise ValueError(f"{STATE} lacks {', '.join(sorted(missing))}")
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename}: damaged (missing)") from None
    except OSError as error:
        raise cannot_read(path, error) from None
    except (
        *(ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError),
        SafetensorError,
    ) as error:
        raise unfit(path, f"{type(error).__name__}: {error}") from None
    return Checkpoint(path, state, tensors)


def verify(path: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        DamagedError: it differs.
        OSError: it cannot be read.
    """
    sizes = {}
    for name, limit in ((MANIFEST, 1 << 20), (STATE, STATE_BYTES), (TENSORS, math.inf)):
        status = (path / name).stat()
        sizes[name] = status.st_size
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise DamagedError(f"{path / name}: damaged (not the file that was written)")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        same = all(manifest[name]["bytes"] == sizes[name] for name in (TENSORS, STATE))
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DamagedError(f"{path / MANIFEST}: damaged (no sizes and hashes in it)") from None
    if not same or manifest != manifest_of(path):
        raise DamagedError(f"{path}: damaged (not the bytes that were written)")


def unfit(path: Path, what: str) -> MinibertError:
    """The error for a checkpoint that is undamaged but wrong."""
    return MinibertError(
        f"{path}: cannot be resumed ({what}): delete it to continue from the one before, "
        "or give another --output"
    )


def check(
    checkpoint: Checkpoint, training: Training, total_steps: int, arguments: dict[str, str]
) -> None:
    """Check everything in a checkpoint before any of it is loaded.

    Args:
        checkpoint: from ``read``.
        training: as it is when the run starts; names, shapes and dtypes must be the same.
        total_steps: of the whole run.
        arguments: the run's ``identity``.

    Raises:
        MinibertError: the identity differs, or a value is missing, of a wrong type or out of range.
    """
    state, tensors = checkpoint.state, checkpoint.tensors

    def need(good: bool, what: str) -> None:
        if not good:
            raise unfit(checkpoint.path, what)

    for name in ("arguments", "machine"):
        strings = state[name].items() if isinstance(state[name], dict) else [(0, 0)]
        need(all(isinstance(x, str) for pair in strings for x in pair), f"{name} in {STATE}")
    # Older checkpoints do not record the tokenizer's settings.
    then = {SETTINGS: arguments[SETTINGS]} | state["arguments"]
    if changes := differences(then, arguments):
        raise MinibertError(
            f"{checkpoint.path}: cannot be resumed, {'; '.join(changes)}: "
            "repeat the command that started the run, or give another --output"
        )
    step = state["step"]
    need(_is_count(step) and step == step_of(checkpoint.path), f"step {step!r}")
    need(0 < step <= total_steps, f"step {step} of {total_steps}")
    updates, best = state["optimizer_steps"], state["best_f1"]
    need(_is_count(updates) and updates <= step, f"optimizer_steps {updates!r}")
    need(_is_finite(best) and -1 <= best <= 1, f"best_f1 {best!r}")
    scaler = state["scaler"]
    if training.scaler is None:
        need(scaler is None, f"scaler {scaler!r} without fp16")
    else:
        need(
            isinstance(scaler, list)
            and len(scaler) == 3
            and (_is_finite(scaler[0]) and scaler[0] > 0)
            and all(map(_is_count, scaler[1:])),
            f"scaler {scaler!r}",
        )
    need(isinstance(state["log"], list) and all(map(_is_entry, state["log"])), f"log in {STATE}")
    logged = [entry["step"] for entry in state["log"] if "loss" in entry]
    need(logged == list(range(1, step + 1)), f"{len(logged)} steps in the log, not {step}")

    wanted = training.tensors()
    generators = {name for name in tensors if name in ("generator.cpu", "generator.cuda")}
    need("generator.cpu" in generators, "no generator.cpu")
    other = (tensors.keys() - generators) ^ wanted.keys()
    need(not other, f"other tensors: {', '.join(sorted(other)[:3])}")
    for name, mine in wanted.items():
        found = tensors[name]
        need(
            found.shape == mine.shape and found.dtype == mine.dtype,
            f"{name} is {found.dtype} {tuple(found.shape)}, not {mine.dtype} {tuple(mine.shape)}",
        )
    wrong = not_finite({name: tensors[name] for name in wanted})
    need(not wrong, f"{wrong} is not finite")
    for name in generators:
        states = tensors[name]
        need(states.dtype == torch.uint8 and states.ndim == 2 and len(states) > 0, name)
    try:
        for row in tensors["generator.cpu"]:
            torch.Generator().set_state(row.clone())
    except RuntimeError as error:
        raise unfit(checkpoint.path, f"generator.cpu: {error}") from None


def _is_count(x: object) -> bool:
    return type(x) is int and 0 <= x < 2**63


def _is_finite(x: object) -> bool:
    return isinstance(x, float) and math.isfinite(x)


def _is_entry(entry: object) -> bool:
    """Whether this is a line of ``metrics.jsonl``: of a step, or of the scores of a set."""
    if not isinstance(entry, dict) or not all(_is_count(entry.get(k)) for k in ("step", "epoch")):
        return False
    if "loss" in entry:
        return (entry["loss"] is None or _is_finite(entry["loss"])) and _is_finite(entry.get("lr"))
    scores = [x for name, x in entry.items() if name not in ("step", "epoch", "set")]
    return isinstance(entry.get("set"), str) and bool(scores) and all(map(_is_finite, scores))


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor with infinity or NaN in it; None if there is none."""
    return next((name for name, x in tensors.items() if not x.isfinite().all()), None)


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, in words; a hash only by name."""
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [
        f"{name} differs"
        if re.fullmatch("[0-9a-f]{64}", now.get(name, ""))
        else f"{name} was {then.get(name, 'not given')} and is {now.get(name, 'not given')}"
        for name in changed
    ]


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the torch generators that training draws from, as uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(tensors: dict[str, Tensor], team: Team, seed: int) -> None:
    """Restore this process's generators; a process that did not exist takes ``seed``."""
    states = tensors["generator.cpu"]
    if team.rank >= len(states):
        team.seed(seed)
        return
    # clone: torch reads from the start of the storage, wherever the row begins.
    torch.set_rng_state(states[team.rank].clone())
    if "generator.cuda" in tensors and team.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"][team.rank].clone(), team.device)
