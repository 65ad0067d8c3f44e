"""Fuzzing through the command line: mutated inputs must be accepted or refused in one line.

    python tests/fuzz.py --count 50000                        # what `make fuzz` runs
    python tests/fuzz.py --seed 17 --first 81 --count 1       # repeat one input

An input depends only on the seed and its number. It fails if it ends in a traceback, in an exit
status other than 0 and 2 or in more than one line of error, if it leaves a file, uses more than
``SECONDS`` of CPU time, or more than ``MEMORY`` beyond what valid input uses. Inputs run in child
processes under the limits of the operating system.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import mutate

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20.0  # of CPU time; an input normally takes milliseconds
PATIENCE = 600.0  # seconds of wall time, against deadlocks
MEMORY = 512 << 20
BLOCK = 2500  # inputs per child process
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # By default oneDNN caches code for 1024 shapes, 300 MB of address space.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}

WORDS = [
    "who",
    "directed",
    "jaws",
    "the",
    "movie",
    "with",
    "mel",
    "gibson",
    "?",
    ",",
    "'",
    "é",
    "電",
]
LINES = "O\twho\nO\tdirected\nB-X\tjaws\n\nB-X\tmel\nI-X\tgibson\nO\t?\n\nO\tthe\nB-Y\tmovie\n"


class BrokenError(Exception):
    """A fault that an input has revealed."""


def good(folder: Path, lowercase: bool = True) -> None:
    """A valid tagger of a few thousand weights."""
    from builders import small_checkpoint

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16}
    small_checkpoint(folder, words=WORDS, lowercase=lowercase, noise=0.4, seed=3, **sizes)


def peak_mib() -> int:
    """Peak memory of this process in MiB; getrusage would include its parent's before the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def command(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str]:
    """Status and output of a command.

    Raises:
        BrokenError: the status is neither 0 nor 2, or an error is not one line.
    """
    from minibert import cli

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    given, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([str(argument) for argument in arguments])
    finally:
        sys.stdin = given
    for stream in (out, err):
        stream.flush()
    said = err.buffer.getvalue().decode()
    if status not in (0, 2):
        raise BrokenError(f"exit status {status}")
    if status == 2 and not re.fullmatch(r"minibert: [^\n]{10,1200}\n", said):
        raise BrokenError(f"not one line of error: {said[:300]!r}")
    if status == 2 and len(said.splitlines()) != 1:
        raise BrokenError(f"an error that breaks its line: {said[:300]!r}")
    return status, out.buffer.getvalue().decode()


def tag(folder: Path, text: bytes = b"who directed jaws with mel gibson ?\n") -> bool:
    """Tag standard input; each line must come back, with entities at the offsets they claim."""
    status, out = command("tag", folder, "--json", "--device", "cpu", stdin=text)
    found = [json.loads(line, parse_constant=_no_number) for line in out.split("\n")[:-1]]
    lines = text.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    if status == 0 and len(found) != len(lines):
        raise BrokenError(f"{len(lines)} lines in, {len(found)} lines out")
    for line, answer in zip(lines, found):
        if answer["text"] != line.decode().removesuffix("\r"):
            raise BrokenError(f"{line[:100]!r} came back as {answer['text'][:100]!r}")
        for entity in answer["entities"]:
            if answer["text"][entity["start"] : entity["stop"]] != entity["text"]:
                raise BrokenError(f"{entity} is not where it says")
    return status == 0


def _no_number(name: str) -> None:
    raise BrokenError(f"a score is {name}")


def changed(name: str, change: Callable[[Random, bytes], bytes]) -> Callable[[Random, Path], bool]:
    """A target that mutates one file of the tagger."""

    def target(draw: Random, folder: Path) -> bool:
        path = folder / name
        path.write_bytes(change(draw, path.read_bytes()))
        return tag(folder)

    return target


def json_file(draw: Random, data: bytes) -> bytes:
    if draw.random() < 0.4:
        return mutate.bytes_(draw, data)
    return mutate.json_(draw, json.loads(data)).encode("utf-8", "surrogatepass")


def vocab(draw: Random, folder: Path) -> bool:
    """vocab.txt and tokenizer_config.json, without tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    path = folder / "vocab.txt"
    path.write_bytes(mutate.lines_(draw, path.read_bytes()))
    if draw.random() < 0.3:
        path = folder / "tokenizer_config.json"
        path.write_bytes(json_file(draw, path.read_bytes()))
    return tag(folder)


def bio(draw: Random, folder: Path) -> bool:
    path = folder / "set.bio"
    path.write_bytes(mutate.lines_(draw, LINES.encode()))
    orphans = draw.choice(("refuse", "repair"))
    status, _ = command("evaluate", folder, path, "--orphans", orphans, "--device", "cpu")
    path.unlink()
    return status == 0


def text(draw: Random, folder: Path) -> bool:
    raw = mutate.text_(draw, draw.randint(1, 5)).encode("utf-8", "surrogatepass")
    return tag(folder, mutate.bytes_(draw, raw) if draw.random() < 0.2 else raw)


@cache
def good_checkpoint() -> dict[str, bytes]:
    """The files of a valid training checkpoint by name."""
    import torch

    from minibert.training import resume

    state = dict.fromkeys(resume.REQUIRED) | {"format": resume.FORMAT, "log": [{"step": 1}]}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "step-000001"
        resume.write(path, {"weight.a": torch.ones(3), "generator.cpu": torch.ones(1)}, state)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def checkpoint_of_training(draw: Random, folder: Path) -> bool:
    """Mutates one file, and usually updates the manifest to match."""
    from minibert.files import MinibertError
    from minibert.training import resume

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        for name, content in good_checkpoint().items():
            (path / name).write_bytes(content)
        name = draw.choice((resume.MANIFEST, resume.MANIFEST, *good_checkpoint()))
        change = mutate.safetensors_ if name == resume.TENSORS else json_file
        (path / name).write_bytes(change(draw, (path / name).read_bytes()))
        if name != resume.MANIFEST and draw.random() < 0.9:
            (path / resume.MANIFEST).write_text(json.dumps(resume.manifest_of(path)))
        try:
            resume.read(path)
        except MinibertError as error:
            if len(str(error).splitlines()) != 1:
                raise BrokenError(f"not one line of error: {error}") from None
            return False
        return True


TARGETS: dict[str, Callable[[Random, Path], bool]] = {
    "safetensors": changed("model.safetensors", mutate.safetensors_),
    "config": changed("config.json", json_file),
    "tokenizer": changed("tokenizer.json", json_file),
    "vocab": vocab,
    "bio": bio,
    "text": text,
    "checkpoint": checkpoint_of_training,
}


def child(seed: int, first: int, count: int, report: int) -> None:
    """Run inputs in sequence and write the outcome of each to the descriptor ``report``."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tagger"
        good(folder)
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        tag(folder)
        bio(Random(0), folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in range(first, first + count):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # kills this process
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
            try:
                accepted = TARGETS[target_of(number)](Random(f"{seed} {number}"), folder)
                ended = "accepted" if accepted else "refused"
            except BaseException:
                ended = "failed\n" + traceback.format_exc()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            found = {path.name: path for path in folder.iterdir()}
            if extra := found.keys() - kept.keys():
                ended = f"failed\nit left {sorted(extra)}"
                for name in extra:
                    found[name].unlink()
            os.write(report, json.dumps([number, ended]).encode() + b"\n")
            for name, content in kept.items():
                if name not in found or found[name].read_bytes() != content:
                    (folder / name).write_bytes(content)


def target_of(number: int) -> str:
    return list(TARGETS)[number % len(TARGETS)]


def fuzz(seed: int, first: int, count: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Run inputs in child processes; returns the outcomes per target, and the failures."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
    failures: list[str] = []

    def failed(number: int, how: str) -> None:
        again = f"python tests/fuzz.py --seed {seed} --first {number} --count 1"
        failures.append(f"{target_of(number)}: {again}\n{how}")

    stop = first + count
    while first < stop:
        reading, writing = os.pipe()
        with tempfile.TemporaryFile() as said:
            block = json.dumps([seed, first, min(BLOCK, stop - first), writing])
            running = subprocess.Popen(
                [sys.executable, __file__, "--child", block],
                env=os.environ | ENVIRONMENT,
                pass_fds=(writing,),
                stderr=said,
            )
            os.close(writing)
            with os.fdopen(reading) as report:
                for line in report:
                    number, ended = json.loads(line)
                    first = number + 1
                    counts[target_of(number)][ended.split("\n")[0]] += 1
                    if ended.startswith("failed"):
                        failed(number, ended)
            if running.wait() != 0:
                said.seek(0)
                words = said.read().decode(errors="replace")[-2000:]
                alarms = f"{-signal.SIGPROF} and {-signal.SIGALRM} mean a timeout"
                failed(first, f"the process exited with {running.returncode}; {alarms}\n{words}")
                counts[target_of(first)]["failed"] += 1
                first += 1
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000, help="number of inputs")
    parser.add_argument("--seed", type=int, help="default: random")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return 0
    seed = Random().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    counts, failures = fuzz(seed, options.first, options.count)
    for target, ended in counts.items():
        print(f"{target:12}", ", ".join(f"{n} {how}" for how, n in sorted(ended.items())))
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
