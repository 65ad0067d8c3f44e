"""Where a training run stands, on the disk: whole and verified, or not there.

A checkpoint is a directory, ``OUTPUT/checkpoints/step-000123``:

    tensors.safetensors  weights, both moments, averaged weights, the generators' states
    state.json           everything else that a step changes, and what the run was started with
    manifest.json        size and SHA-256 of the other two

It is written under a temporary name, every file and the directory are synced, and the name is
changed last. Whenever the process is killed, what bears the name of a checkpoint is one.
The position in the data is the number of the step: the order of the sentences is a pure function
of seed and epoch (``data.epoch_batches``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minibert.files import TEMPORARY, MinibertError, sha256_of, sweep, sync
from minibert.pretrained import weights
from minibert.processes import Team
from minibert.training.adamw import AdamW, LossScaler
from minibert.training.averaging import WeightAverage

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 1
REQUIRED = {"arguments", "machine", "step", "optimizer_steps", "scaler", "best_f1", "log"}


@dataclass
class Training:
    """Everything that a step of training changes, and nothing else.

    Args:
        model: in float32.
        optimizer: of all its parameters, in their order.
        average: of its weights.
        scaler: of the loss, where there is one.
        step: optimiser steps done.
        best_f1: highest entity F1 on the dev set so far.
        log: what ``metrics.jsonl`` will hold.
    """

    model: nn.Module
    optimizer: AdamW
    average: WeightAverage
    scaler: LossScaler | None
    step: int = 0
    best_f1: float = -1.0
    log: list[dict] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, not copied: the random generators' are not among them."""
        names = [name for name, _ in self.model.named_parameters()]
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
        """Stand where ``tensors`` and ``state`` were taken."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
        self.optimizer.load(self.optimizer.first, self.optimizer.second, state["optimizer_steps"])
        if self.scaler:
            self.scaler.scale, self.scaler.good_steps, self.scaler.skipped = state["scaler"]
        self.step, self.best_f1, self.log = state["step"], state["best_f1"], state["log"]


class Checkpoint(NamedTuple):
    """What a directory held, its hashes compared."""

    path: Path
    state: dict
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the directory they are in.
        keep: how many of them stay, the last ones.
        arguments: what decides the run's result, by name; a run is resumed with the same only.
        team: the processes of the run. With another number of them, of threads, on another device
            or in another torch a run goes on too, but not to the same bits, and says so.
    """

    def __init__(self, folder: Path, keep: int, arguments: dict[str, str], team: Team):
        self.folder = folder
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
        """For messages: the newest one's name, or that there is none."""
        found = list_of(self.folder)
        return str(found[-1]) if found else "none yet"

    def begin(self, total_steps: int) -> None:
        """Make an empty folder for a new run.

        Args:
            total_steps: of a whole run; the checkpoints of one that got so far are removed.

        Raises:
            MinibertError: an unfinished run is in it; or it cannot be made.
        """
        found = list_of(self.folder)
        if found and step_of(found[-1]) < total_steps:
            raise MinibertError(
                f"{found[-1]}: of an unfinished run: go on with --resume, "
                f"or delete {self.folder} to start over"
            )
        self._prepare(found)

    def _prepare(self, old: list[Path]) -> None:
        if not self.team.is_writer:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder.parent)
            for path in old:
                remove(path)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def save(self, training: Training) -> None:
        """Write a checkpoint and remove those that are one too many. All processes call this.

        Raises:
            MinibertError: the disk is full, or the folder cannot be written or has vanished. The
                checkpoints written before are as they were.
        """
        generators = {
            f"generator.{name}": self.team.gather(x)
            for name, x in generator_states(self.team.device).items()
        }
        if not self.team.is_writer:
            return
        tensors = training.tensors() | generators
        state = {"format": FORMAT, "arguments": self.arguments, "machine": self.machine}
        write(self.folder / f"step-{training.step:06}", tensors, state | training.state())
        try:
            for path in list_of(self.folder)[: -self.keep]:
                remove(path)
        except OSError as error:
            raise cannot_write(path, error) from None

    def resume(self, training: Training) -> str:
        """Load the newest whole checkpoint, if there is one; says in a line what was done.

        One that is damaged is set aside under another name.

        Raises:
            MinibertError: the run was started with other arguments.
        """
        notes = []
        found = None
        for path in reversed(list_of(self.folder)):
            try:
                found = read(path)
                break
            except MinibertError as error:
                notes.append(f"{error}: taking the one before, if there is one")
                if self.team.is_writer:
                    set_aside(path)
        if found is None:
            self._prepare([])
            return "\n".join([*notes, f"{self.folder}: nothing to resume, starting from step 0"])
        state = found.state
        if changes := differences(state["arguments"], self.arguments):
            raise MinibertError(
                f"{found.path}: cannot be resumed, {'; '.join(changes)}: "
                "use what the run was started with, or another --output"
            )
        training.load(found.tensors, state)
        restore_generators(found.tensors, self.team, int(self.arguments["seed"]) + training.step)
        if changes := differences(state["machine"], self.machine):
            notes.append(f"{'; '.join(changes)}: the run goes on, but equal to rounding only")
        self._prepare(list_of(self.folder)[: -self.keep])  # killed before it could remove them
        return "\n".join([*notes, f"resumed from {found.path}"])


def list_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; not looked into."""
    names = folder.glob("step-*") if folder.is_dir() else ()
    return sorted((p for p in names if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def write(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write a checkpoint whole or not at all; its parent must be there.

    Raises:
        MinibertError: the disk is full, or the parent cannot be written or has vanished.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        remove(temporary)
        temporary.mkdir()
        weights.write(temporary / TENSORS, on_cpu, {"format": "pt"})
        (temporary / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        manifest = {
            name: {
                "bytes": (temporary / name).stat().st_size,
                "sha256": sha256_of(temporary / name),
            }
            for name in (TENSORS, STATE)
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (TENSORS, STATE, MANIFEST):
            sync(temporary / name)
        sync(temporary)
        remove(path)  # one that was damaged
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(path, error, sum(x.nbytes for x in on_cpu.values())) from None


def described(file: Path) -> dict:
    """What the manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def cannot_write(path: Path, error: OSError, size: int = 0) -> MinibertError:
    """The error with the path, what to do, and which checkpoint there is to go on from."""
    found = list_of(path.parent)
    room = f"free {max(1, size // 10**6)} MB there" if size else "free some space there"
    since = f"go on with --resume from {found[-1]}" if found else "start again"
    return MinibertError(
        f"{path}: cannot be written ({error.strerror}): {room} or make it writable, then {since}"
    )


def remove(path: Path) -> None:
    """Delete a checkpoint; what is half deleted does not bear its name."""
    if path.exists():
        doomed = path.with_name(f".{path.name.lstrip('.')}.old{TEMPORARY}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def set_aside(path: Path) -> None:
    """Give a damaged checkpoint a name that says so."""
    try:
        remove(path.with_suffix(".damaged"))
        os.replace(path, path.with_suffix(".damaged"))
    except OSError as error:
        raise cannot_write(path, error) from None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        MinibertError: a file is missing, or is not what the manifest says.
    """
    import safetensors.torch

    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (TENSORS, STATE):
            size = (path / name).stat().st_size
            if manifest[name]["bytes"] != size or manifest[name]["sha256"] != sha256_of(
                path / name
            ):
                raise MinibertError(f"{path / name}: damaged (not the bytes that were written)")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(path / TENSORS)
        if state["format"] != FORMAT:
            raise MinibertError(f"{path}: of format {state['format']}, this is {FORMAT}")
        if missing := REQUIRED - state.keys():
            raise MinibertError(f"{path / STATE}: lacks {', '.join(sorted(missing))}")
    except OSError as error:
        raise MinibertError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise MinibertError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    return Checkpoint(path, state, tensors)


def differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is not the same, in words."""
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [
        f"{name} is another"
        if re.fullmatch("[0-9a-f]{64}", now.get(name, ""))
        else f"{name} was {then.get(name, 'not given')} and is {now.get(name, 'not given')}"
        for name in changed
    ]


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """torch's generators that training draws from, as uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(tensors: dict[str, Tensor], team: Team, seed: int) -> None:
    """Put the generators where this process's were; ``seed`` is for one that was not there."""
    states = tensors["generator.cpu"]
    if team.rank >= len(states):
        seed_apart(team, seed)
        return
    # clone: torch reads the memory from its beginning, wherever the row begins.
    torch.set_rng_state(states[team.rank].clone())
    if "generator.cuda" in tensors and team.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"][team.rank].clone(), team.device)


def seed_apart(team: Team, seed: int) -> None:
    """Other dropout masks in every process; the first goes on as it would alone."""
    if not team.is_writer:
        torch.manual_seed(((seed << 20) + team.rank) % 2**63)


class Stop:
    """Notes SIGINT and SIGTERM from now on, so that the loop can end after a whole step.

    Alone, a second Ctrl-C ends the process at once; torchrun itself sends each signal twice.
    """

    def __init__(self, team: Team):
        self.signal = 0  # the one that came
        self.team = team
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT and self.team.size == 1:
            raise KeyboardInterrupt
        self.signal = number
