"""The paper's comparison of systems, with measured numbers: ``minibert compare``.

Each system is trained and tested in a separate process, which measures its peak memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from minibert.files import MinibertError, replacing
from minibert.tagging.evaluate import evaluate
from minibert.tagging.saved import BASELINES, baseline
from minibert.tagging.tagger import Tagger
from minibert.text.labelling import WordTagger
from minibert.training.corpus import Part, corpus
from minibert.training.loop import main as train_bert

BERTS = {"bert": "linear", "bert-crf": "crf"}  # name: head
SYSTEMS = (*BASELINES, *BERTS)
SEEDLESS = {"hmm", "crf"}  # the same whatever the seed
WARM_UP = 64  # sentences tagged before the clock runs

REPORTED = {"BERT": 94.4, "ERNIE": 93.37, "baseline": 90.32}  # token micro-F1 including O
REMARK = (
    "Reported: the MIT Movie paper's figures. Those of ERNIE and of its baseline have no traceable "
    "source; they are probably not of MIT Movie but of MSRA-2006, in Chinese, with a BiGRU-CRF "
    "as the baseline (Wang et al., arXiv:2002.08902; not confirmed)."
)


@dataclass(frozen=True)
class Measured:
    """One training and test of a system; scores in percent."""

    system: str
    seed: int
    parameters: int
    entity_f1: float
    token_f1: float  # micro, including O
    token_f1_without_o: float
    seconds: float  # of training
    words_per_second: float  # tagged
    memory_mb: float  # peak of the process, training included


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Args:
        systems: names in ``SYSTEMS``.
        seeds: of the systems that have one.
        options: train, test, corpus and orphans, as in train.py; model; device.
        output: keeps the systems, each in a directory SYSTEM-SEED; None keeps none.
    """

    systems: Sequence[str]
    seeds: Sequence[int]
    options: argparse.Namespace
    output: Path | None = None


def run(plan: Plan) -> Iterator[Measured]:
    """Train and test, one after the other.

    Raises:
        MinibertError: a file is missing or wrong, or a training fails.
    """
    _corpus(plan.options)  # refused here, not in the first process
    context = multiprocessing.get_context("spawn")
    for system in plan.systems:
        for seed in plan.seeds[:1] if system in SEEDLESS else plan.seeds:
            with ProcessPoolExecutor(1, context) as process:
                try:
                    measured = process.submit(measure, system, seed, plan).result()
                except BrokenProcessPool:
                    raise MinibertError(
                        f"{system}, seed {seed}: the process was killed or ran out of memory: "
                        "free some, or compare fewer --systems"
                    ) from None
            print(f"{system}, seed {seed}: entity F1 {measured.entity_f1:.2f}", file=sys.stderr)
            yield measured


def measure(system: str, seed: int, plan: Plan) -> Measured:
    """Train and test one system in this process; what it prints goes to standard error."""
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        folder = (plan.output or Path(scratch)) / f"{system}-{seed}"
        training, test = _corpus(plan.options)
        started = time.perf_counter()
        if system in BERTS:
            tagger, parameters = _bert(system, seed, plan.options, folder)
        else:
            kind = baseline(system)
            seeded = {} if system in SEEDLESS else {"seed": seed, "device": plan.options.device}
            tagger = kind.fit(training.sentences, **seeded)
            tagger.save_pretrained(folder)
            parameters = sum(x.numel() for x in tagger.state_dict().values())
        seconds = time.perf_counter() - started
        report = evaluate(tagger, test.sentences, test.source)
        return Measured(
            system,
            seed,
            parameters,
            100 * report.entity.micro.f1,
            100 * report.token.micro_with_o,
            100 * report.token.micro_without_o.f1,
            seconds,
            _speed(tagger, [sentence.words for sentence in test.sentences]),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


def _corpus(options: argparse.Namespace) -> tuple[Part, Part]:
    training, parts = corpus(argparse.Namespace(**vars(options), dev=None, seed=0))
    if "test" not in parts:
        raise MinibertError("--train needs --test: name the BIO file to compare on")
    return training, parts["test"]


def _bert(system: str, seed: int, options: argparse.Namespace, folder: Path) -> tuple[Tagger, int]:
    """Run train.py with its default recipe; no part of the training set is held out."""
    arguments = ["--model", options.model, "--output", folder, "--seed", seed]
    arguments += ["--head", BERTS[system], "--orphans", options.orphans]
    for name in ("train", "test", "corpus", "device"):
        if vars(options)[name] is not None:
            arguments += [f"--{name}", vars(options)[name]]
    status = train_bert([str(argument) for argument in arguments], "minibert compare")
    if status:
        raise MinibertError(f"{system}: training ended with status {status}, see above")
    tagger = Tagger.from_pretrained(folder / "last", device=options.device)
    saved = Tagger.from_pretrained(folder / "last", dtype="fp32", device="cpu", prepack=False)
    return tagger, sum(x.numel() for x in saved.model.parameters())


def _speed(tagger: WordTagger, sentences: Sequence[Sequence[str]]) -> float:
    list(tagger.label(sentences[:WARM_UP]))
    started = time.perf_counter()
    words = sum(len(labels) for labels in tagger.label(sentences))
    return words / (time.perf_counter() - started)


def table(measured: Sequence[Measured], only: Sequence[str] = ()) -> str:
    """Markdown: a row for each system, its seeds as mean ± standard deviation.

    Args:
        measured: the seeds of a system in a row.
        only: titles of columns; empty: all.
    """
    columns: dict[str, Callable[[list[Measured]], str]] = {
        "system": lambda runs: runs[0].system,
        "parameters": lambda runs: f"{runs[0].parameters / 1e6:.2f} M",
        "entity F1": lambda runs: _mean([run.entity_f1 for run in runs]),
        "token micro-F1 with O": lambda runs: _mean([run.token_f1 for run in runs]),
        "token micro-F1 without O": lambda runs: _mean([run.token_f1_without_o for run in runs]),
        "reported": lambda runs: "",
        "training, s": lambda runs: f"{statistics.mean(run.seconds for run in runs):.0f}",
        "words/s": lambda runs: f"{statistics.mean(run.words_per_second for run in runs):.0f}",
        "peak memory, MB": lambda runs: f"{max(run.memory_mb for run in runs):.0f}",
        "seeds": lambda runs: str(len(runs)),
    }
    columns = {title: columns[title] for title in only or columns}
    rows = [[show(runs) for show in columns.values()] for runs in _by_system(measured)]
    for name, f1 in REPORTED.items():
        reported = {"system": f"{name}, in the paper", "reported": f"{f1:.2f}"}
        rows.append([reported.get(column, "") for column in columns])
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{REMARK}"


def write_png(measured: Sequence[Measured], path: Path) -> None:
    """A bar chart of entity F1 and token micro-F1 with O.

    Raises:
        MinibertError: it cannot be written, or matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MinibertError(
            f"matplotlib, which draws the chart, cannot be imported ({error}): "
            "pip install matplotlib"
        ) from None
    systems = _by_system(measured)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title="Systems on one corpus", xlabel="system", ylabel="F1, %")
    names = [runs[0].system for runs in systems] + [f"{name}\n(reported)" for name in REPORTED]
    for shift, title, score in (
        (-0.2, "entity F1", lambda run: run.entity_f1),
        (0.2, "token micro-F1 with O", lambda run: run.token_f1),
    ):
        values = [[score(run) for run in runs] for runs in systems]
        axes.bar(
            [i + shift for i in range(len(systems))],
            [statistics.mean(v) for v in values],
            0.4,
            yerr=[statistics.stdev(v) if len(v) > 1 else 0.0 for v in values],
            label=title,
        )
    places = range(len(systems), len(names))
    axes.bar(places, list(REPORTED.values()), 0.4, color="0.7", label="token micro-F1, reported")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 100)
    axes.legend(loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _by_system(measured: Sequence[Measured]) -> list[list[Measured]]:
    return [list(runs) for _, runs in groupby(measured, lambda run: run.system)]


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
