"""Fine-tune BERT for named entities: the loop, read top to bottom.

    python train.py --model minilm --corpus mit_movie --output runs/movie
    python train.py --model bert-base-cased --corpus mit_movie --recipe paper --output runs/paper
    python train.py --model minilm --train my.bio --dev 0.1 --test other.bio --output runs/mine
    python train.py ... --resume                        continue an interrupted run
    torchrun --nproc-per-node 2 train.py ...            train in two processes
    minibert train ...                                  the same from an installed package

``--help`` explains every flag; ``minibert/training/`` holds what the loop calls.

The output directory holds ``last/`` (the model after the last epoch), ``best/`` (after the epoch
with the highest entity F1 on the dev set, if there is one), ``metrics.jsonl``, ``report.json`` and
``loss.png``, and ``checkpoints/`` until the run is done. With ``--resume`` an interrupted run ends
in the same bits as an uninterrupted one (``docs/reliability.md``). Nothing is chosen by the test
set.

Exit status: 0, done; 2, an error in the input or the numbers; 129, 130 and 143, stopped by SIGHUP,
SIGINT or SIGTERM after a whole step and a checkpoint; 141, the reader of the output has gone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import TypeVar

from minibert.files import MinibertError, memory_faults, stop_if_memory_is_short

stop_if_memory_is_short("train.py")  # importing torch would abort the process

import torch
from torch import nn

from minibert.machine import choose_dtype, name_of
from minibert.model.heads import BertForTokenClassification
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.processes import Team, connected, own_device
from minibert.speed import memory
from minibert.tagging.tagger import Tagger
from minibert.text.batches import Example, chunks, epoch_batches
from minibert.text.bio import labels_of
from minibert.training.adamw import bert_groups, choose_adamw
from minibert.training.arguments import parse
from minibert.training.averaging import WeightAverage
from minibert.training.corpus import corpus
from minibert.training.output import Output, owned
from minibert.training.r_drop import RDrop, hidden
from minibert.training.recipe import Recipe, TaggingRecipe
from minibert.training.results import evaluate_and_save, progress, report
from minibert.training.resume import Checkpoints, Training, identity
from minibert.training.schedule import LossScaler, linear_schedule
from minibert.training.step import Step
from minibert.training.stop import Stop, prepare_streams, status_of
from minibert.training.task import Task

R = TypeVar("R", bound=Recipe)


class NamedEntities:
    """What is trained: a model that labels words, and its data.

    Args:
        options: the command line.
        recipe: decode, layout, r_drop, hide and entity_cost.
        team: the processes of the run.

    Raises:
        MinibertError: a file is missing or wrong.
    """

    def __init__(self, options: argparse.Namespace, recipe: TaggingRecipe, team: Team):
        with team.writer_first():
            train_set, self.evaluated = corpus(options)
            self.directory = hub.locate_model(options.model)
        if choice := hub.choice(options.model, self.directory):
            print(choice)
        labels = labels_of(train_set.sentences)
        tokenizer = Tokenizer.from_pretrained(self.directory)
        self.model = BertForTokenClassification.from_pretrained(
            self.directory,
            labels=labels,
            head=options.head,
            attn_implementation=options.attn,
            device=team.device,
            seed=options.seed,
        )
        self.objective: nn.Module = self.model
        if recipe.r_drop:
            special_ids = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
            second = partial(
                hidden, share=recipe.hide, mask_id=tokenizer.mask_id, special_ids=special_ids
            )
            self.objective = RDrop(self.model, recipe.r_drop, second)
        print(f"{options.model}: {self.model.load_report}")
        self.tagger = Tagger(self.model, tokenizer, well_formed=recipe.decode == "best")
        self.pad_id = tokenizer.pad_id
        self.parts = {"training": train_set} | self.evaluated
        self.entity_cost = recipe.entity_cost
        self.settings = {"head": options.head} if options.head != "linear" else {}
        max_length = recipe.max_length(self.model.config.max_length)
        self._examples = train_set.examples(tokenizer, labels, max_length)

    def examples(self, epoch: int) -> list[Example]:
        """The training sentences, the same in every epoch."""
        return self._examples

    def evaluate_and_save(self, epoch: int, run: Training, output: Output) -> None:
        """Score the model, keep the best and the last one."""
        self.reports = evaluate_and_save(
            epoch, run, self.tagger, self.evaluated, output, self.entity_cost
        )

    def report(self, run: Training, output: Output) -> None:
        """Print the scores and the loss curve."""
        report(run, self.reports, output)


def train(
    options: argparse.Namespace,
    recipe: R,
    team: Team,
    output: Output,
    task_of: Callable[[argparse.Namespace, R, Team], Task],
) -> int:
    """Train what ``task_of`` returns, evaluate and save it after every epoch.

    Returns:
        The exit status.
    """
    if team.device.type == "cpu":
        memory.use_huge_pages()
        memory.keep_freed_memory()
    dtype = choose_dtype(options.dtype, team.device)
    print(f"{team.device}, {name_of(dtype.value)} ({dtype.reason})\n{recipe}")

    # Data and model.
    task = task_of(options, recipe, team)
    model, examples = task.model, task.examples(1)
    lengths = [len(example.ids) for example in examples]
    team.seed(options.seed)

    # Optimiser and schedule.
    groups = bert_groups(model, recipe.weight_decay)
    adamw = choose_adamw(groups, recipe.optimizer, recipe.eps, options.plain_adamw)
    print(f"attention {model.attn_implementation}, AdamW {adamw.reason}")
    average = WeightAverage(model.parameters(), recipe.average)
    scaler = LossScaler() if dtype.value == torch.float16 else None
    steps_per_epoch = math.ceil(math.ceil(len(examples) / recipe.batch_size) / recipe.accumulate)
    total_steps = steps_per_epoch * recipe.epochs
    warmup_steps = int(recipe.warmup * total_steps)

    # The state of the run: new, or as it was when it was interrupted.
    run = Training(model, adamw.value, average, scaler)
    step = Step(
        run, task.objective, recipe, dtype.value, team, task.pad_id, examples[0], options.graphs
    )
    options.graphs = step.uses_graphs.value
    if team.device.type == "cuda":
        print(f"CUDA graphs {'on' if options.graphs else 'off'}: {step.uses_graphs.reason}")
    arguments = identity(run, recipe, options, name_of(dtype.value), task.directory, task.parts)
    arguments |= task.settings
    checkpoints = Checkpoints(output, options.keep, arguments, team)
    if options.resume and checkpoints.is_done():
        print(f"{output.path}: the run is done, nothing to resume")
        return 0
    if options.resume:
        print(checkpoints.resume(run, total_steps))
    else:
        checkpoints.begin(options.overwrite)
    stop = Stop(team)

    for epoch in range(max(0, run.step - 1) // steps_per_epoch + 1, recipe.epochs + 1):
        model.train()
        examples = task.examples(epoch)
        order = epoch_batches(lengths, recipe.batch_size, options.seed, epoch, recipe.bucket)
        steps = list(chunks([[examples[i] for i in ids] for ids in order], recipe.accumulate))
        bar = progress(steps, run.step - (epoch - 1) * steps_per_epoch, f"epoch {epoch}", team)
        for batches in bar:
            lr = recipe.lr * linear_schedule(run.step, total_steps, warmup_steps)
            loss = step.backward(batches)
            norm = step.update(lr)
            run.step += 1
            average.update(run.step)

            # Here the program waits for the device: once per step, in fp16 also in the update.
            measured = step.read(loss, norm, stop.signal != 0)
            if step.failed(measured):
                raise MinibertError(
                    f"step {run.step}: the loss is {measured.loss}, the norm of its gradient "
                    f"{measured.norm}: lower --lr or train in --dtype fp32; the step read "
                    f"{task.parts['training'].lines_of(e for batch in batches for e in batch)}; "
                    f"last good checkpoint: {checkpoints.last()}"
                )
            run.record(epoch, measured.loss, lr)
            bar.set_postfix_str(measured.summary(), refresh=False)
            last_of_epoch = run.step == epoch * steps_per_epoch
            if run.step % options.checkpoint_every == 0 or last_of_epoch or measured.stop:
                checkpoints.save(run)
            if measured.stop:
                bar.close()
                print(
                    f"stopped after step {run.step} of {total_steps}, saved to "
                    f"{checkpoints.last()}: the same command with --resume continues",
                    flush=True,
                )
                return stop.status
        if team.is_writer:
            task.evaluate_and_save(epoch, run, output)

    if team.is_writer:
        task.report(run, output)
    checkpoints.finish()
    return 0


def start(
    options: argparse.Namespace,
    recipe: R,
    task_of: Callable[[argparse.Namespace, R, Team], Task],
    program: str,
) -> int:
    """Train in this process of one or several; returns the exit status.

    Args:
        options, recipe: of the command line.
        task_of: makes the task.
        program: name of the command, for errors.
    """
    prepare_streams()
    try:
        device = own_device(options.device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with memory_faults(), connected(device, backend) as team:
            with owned(options.output, team) as output:
                with redirect_stdout(sys.stdout if team.is_writer else None):
                    return train(options, recipe, team, output, task_of)
    except (MinibertError, OSError, KeyboardInterrupt) as problem:
        return status_of(problem, program)


def main(argv: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments; None takes those of the process.
        program: its name in usage and errors.
    """
    options, recipe = parse(argv, program)
    return start(options, recipe, NamedEntities, program)


if __name__ == "__main__":
    sys.exit(main())
