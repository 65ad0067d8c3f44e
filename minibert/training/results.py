"""What a run shows and leaves behind: progress, scores, models, the report and the loss curve."""

from __future__ import annotations

import json
import sys

from tqdm import tqdm

from minibert.files import write_text
from minibert.model.heads import BertWithHead
from minibert.pretrained.tokenizer import Tokenizer
from minibert.processes import Team
from minibert.tagging.evaluate import Report, evaluate
from minibert.tagging.tagger import Tagger
from minibert.training.corpus import Part
from minibert.training.entity_cost import charged
from minibert.training.loss_curve import curve_for, write_png
from minibert.training.output import Output
from minibert.training.resume import Training


def progress(steps: list, done: int, title: str, team: Team) -> tqdm:
    """The steps of an epoch that are left to do, with a progress bar in the writer."""
    hidden = not team.is_writer or sys.stderr is None
    return tqdm(steps[done:], title, len(steps), initial=done, unit="step", disable=hidden)


def evaluate_and_save(
    epoch: int,
    run: Training,
    tagger: Tagger,
    evaluated: dict[str, Part],
    output: Output,
    entity_cost: float,
) -> dict[str, Report]:
    """After an epoch: score the averaged weights, save them as ``last`` and, if best, as ``best``.

    Args:
        epoch: that has ended.
        run: gets the scores in its log, and the best F1.
        tagger: of the model that is trained.
        evaluated: the sets to score by name; "dev" chooses the best epoch.
        output: gets ``best``, ``last`` and ``metrics.jsonl``.
        entity_cost: with which they are scored and saved.

    Returns:
        The reports by the names of the sets.
    """
    reports = {}
    if epoch == 1:  # an earlier run's, which this one may not replace
        output.discard("best", "report.json", "loss.png")
    tagger.model.eval()
    with run.average.swapped_in(), charged(tagger.model.head, entity_cost):
        for name, part in evaluated.items():
            reports[name] = evaluate(tagger, part.sentences, part.source)
            print(f"epoch {epoch}, {name}: {reports[name].summary()}")
            scores = {
                "entity_f1": reports[name].entity.micro.f1,
                "token_micro_f1_including_O": reports[name].token.micro_with_o,
            }
            run.log.append({"step": run.step, "epoch": epoch, "set": name} | scores)
            if name == "dev" and scores["entity_f1"] > run.best_f1:
                run.best_f1 = scores["entity_f1"]
                save(tagger.model, tagger.tokenizer, output, "best")
        save(tagger.model, tagger.tokenizer, output, "last")
    write_log(run, output)
    return reports


def write_log(run: Training, output: Output) -> None:
    """Write ``metrics.jsonl``."""
    write_text(output.at("metrics.jsonl"), "".join(json.dumps(e) + "\n" for e in run.log))


def save(model: BertWithHead, tokenizer: Tokenizer, output: Output, name: str) -> None:
    """Replace a directory that ``from_pretrained`` and transformers open, as a whole."""
    with output.replacing(name) as directory:
        tokenizer.save_pretrained(directory, for_words=True)
        model.save_pretrained(directory)


def report(run: Training, reports: dict[str, Report], output: Output) -> None:
    """At the end: print and write the loss curve, and the last epoch's scores on the last set."""
    f1s: list[tuple[int, float]] = []
    losses = show_losses(run)
    if reports:
        name, scores = list(reports.items())[-1]
        print(f"\n{name} set, last epoch: {scores.table()}")
        write_text(output.at("report.json"), json.dumps(scores.to_dict(), indent=2) + "\n")
        f1s = [(e["step"], 100 * e["entity_f1"]) for e in run.log if e.get("set") == name]
    draw_losses(losses, f1s, output)


def show_losses(run: Training) -> list[float]:
    """Print the loss curve; returns the losses of the steps that have one."""
    losses = [entry["loss"] for entry in run.log if entry.get("loss") is not None]
    print(f"\ntraining loss\n{curve_for(sys.stdout, losses)}")
    return losses


def draw_losses(losses: list[float], f1s: list[tuple[int, float]], output: Output) -> None:
    """Draw ``loss.png`` if that is possible here, and say where everything is."""
    try:
        write_png(losses, f1s, output.at("loss.png"))
    except ImportError:
        print("no loss.png: pip install matplotlib")
    except ValueError as error:  # matplotlib's settings, such as MPLBACKEND
        print(f"no loss.png: {error}")
    print(f"\nsaved to {output.path}", flush=True)
