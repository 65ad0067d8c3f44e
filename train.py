"""Fine-tune BERT for named entities: the loop, read top to bottom.

    python train.py --model minilm --corpus mit_movie --output runs/movie
    python train.py --model bert-base-cased --corpus mit_movie --recipe paper --output runs/paper
    python train.py --model minilm --train my.bio --dev 0.1 --test other.bio --output runs/mine
    python train.py ... --resume                        go on where the same command was interrupted
    torchrun --nproc-per-node 2 train.py ...            the same in two processes

The recipe's numbers and the command line are in ``minibert/training/recipe.py``.

Written to the output directory: ``last/`` (the model after the last epoch), ``best/`` (after the
epoch with the highest entity F1 on the dev set, if there is one), ``metrics.jsonl``,
``report.json``, ``loss.png`` and ``checkpoints/``, from which ``--resume`` goes on to the same bits
(``docs/reliability.md``). The test set is only looked at: nothing is chosen by it.

Exit status: 0, the run is done; 2, something is wrong with what was given or with the numbers;
130 and 143, SIGINT and SIGTERM ended it after a whole step and a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from tqdm import tqdm

from minibert.files import MinibertError, write_text
from minibert.machine import (
    ask_for_huge_pages,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    name_of,
)
from minibert.model.heads import BertForTokenClassification
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.processes import AloneError, Team, team_on
from minibert.speed.cuda_graphs import Graphs, Recorder, require
from minibert.tagging.evaluate import evaluate
from minibert.tagging.tagger import Tagger
from minibert.text import bio
from minibert.text.bio import Batch, Example
from minibert.training.adamw import LossScaler, bert_groups, choose_adamw, linear_schedule
from minibert.training.averaging import WeightAverage
from minibert.training.loss_curve import text_curve, write_png
from minibert.training.recipe import Part, Recipe, arguments_of, corpus, parse
from minibert.training.resume import Checkpoints, Stop, Training, seed_apart


def train(options: argparse.Namespace, recipe: Recipe, team: Team) -> int:
    """Fine-tune, evaluate after every epoch, keep the best and the last model.

    Returns:
        The exit status: 0, or 128 and the number of the signal that ended it early.
    """
    device = team.device
    if device.type == "cpu":
        ask_for_huge_pages()
        keep_freed_memory()
    chosen = choose_dtype(options.dtype, device)
    dtype = chosen.value
    print(f"{device}, {name_of(dtype)} ({chosen.reason})\n{recipe}")

    # Data and model.
    with team.writer_first():
        train_set, evaluated = corpus(options)
        directory = hub.locate_model(options.model)
    labels = bio.labels_of(train_set.sentences)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = BertForTokenClassification.from_pretrained(
        directory,
        labels=labels,
        attn_implementation=options.attn,
        device=device,
        seed=options.seed,
    )
    seed_apart(team, options.seed)
    print(f"{options.model}: {model.load_report}")
    tagger = Tagger(model, tokenizer, well_formed=recipe.decode == "best")
    max_length = model.config.max_position_embeddings
    if recipe.layout.isdecimal():
        max_length = min(max_length, int(recipe.layout))
    examples = bio.examples_of(
        [sentence.words for sentence in train_set.sentences],
        tokenizer,
        max_length,
        bio.label_ids(train_set.sentences, labels, train_set.source),
    )
    lengths = [len(example.ids) for example in examples]

    # Optimiser and schedule: the learning rate is a pure function of the step.
    optimizer, reason = choose_adamw(
        bert_groups(model, recipe.weight_decay), recipe.optimizer, recipe.eps, options.plain_adamw
    )
    print(f"attention {model.attn_implementation}, AdamW {reason}")
    average = WeightAverage(model.parameters(), recipe.average)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    graphs = None
    if options.graphs:
        require(device, model.attn_implementation, recipe.layout, recipe.accumulate, team.size)
        graphs = Graphs(model, dtype, Recorder(device))
    scaler = LossScaler() if dtype == torch.float16 else None
    batches_per_epoch = math.ceil(len(examples) / recipe.batch_size)
    steps_per_epoch = math.ceil(batches_per_epoch / recipe.accumulate)
    total_steps = steps_per_epoch * recipe.epochs
    warmup_steps = int(recipe.warmup * total_steps)

    # Where the run stands: at its beginning, or where it was interrupted.
    run = Training(model, optimizer, average, scaler)
    checkpoints = Checkpoints(
        options.output / "checkpoints",
        options.keep,
        arguments_of(
            recipe,
            options.seed,
            name_of(dtype),
            model.attn_implementation,
            type(optimizer).__name__,
            directory,
            {"training": train_set} | evaluated,
            options.graphs,
        ),
        team,
    )
    if options.resume:
        print(checkpoints.resume(run))
    else:
        checkpoints.begin(total_steps)
    with autocast:
        some_batch = collate(examples[:1], recipe.layout, tokenizer.pad_id, device, False)
        shared_model = team.wrap(model, **some_batch.inputs)
    stop = Stop(team)

    for epoch in range(max(0, run.step - 1) // steps_per_epoch + 1, recipe.epochs + 1):
        model.train()
        batches = bio.epoch_batches(lengths, recipe.batch_size, options.seed, epoch, recipe.bucket)
        groups = list(bio.chunks(batches, recipe.accumulate))
        done = run.step - (epoch - 1) * steps_per_epoch
        bar = progress(groups, done, f"epoch {epoch}", team)
        for group in bar:
            started = time.perf_counter()
            words = sum(len(examples[i].firsts) for batch in group for i in batch)
            loss = torch.zeros((), device=device)
            for batch in group:
                # Every word of the step weighs the same, whichever batch or process it is in.
                # A process that is left without a sentence reads another's at weight 0.
                mine = [examples[i] for i in team.share(batch)]
                weight = sum(len(example.firsts) for example in mine) / words
                here = mine or [examples[batch[0]]]
                read = collate(here, recipe.layout, tokenizer.pad_id, device, options.graphs)
                # Times the team's size: the processes' gradients are averaged, not added.
                scale = team.size * (scaler.scale if scaler else 1.0)
                if graphs is not None:
                    share = graphs.backward(read, scale)
                else:
                    with team.reduction(shared_model, last=batch is group[-1]):
                        with autocast:
                            share = shared_model(**read.inputs).loss * weight
                        (share * scale).backward()
                loss += share.detach()
            lr = recipe.lr * linear_schedule(run.step, total_steps, warmup_steps)
            norm = optimizer.clipped_step(lr, recipe.clip, scaler)
            optimizer.zero_grad()
            run.step += 1
            average.update(run.step)

            # The only time in a step that the program waits for the device.
            totals = team.total(torch.stack([loss, torch.full_like(loss, bool(stop.signal))]))
            loss_sum, stops, norm_sum = torch.cat([totals, norm.to(totals)[None]]).tolist()
            finite = math.isfinite(loss_sum) and math.isfinite(norm_sum)
            if not finite and (scaler is None or scaler.gave_up):
                raise MinibertError(
                    f"step {run.step}: the loss is {loss_sum}, its gradient's norm {norm_sum}: "
                    "lower --lr or train in --dtype fp32; "
                    f"the step read {lines_of(examples, group, train_set)}; "
                    f"last good checkpoint: {checkpoints.last()}"
                )
            run.log.append(
                {
                    "step": run.step,
                    "epoch": epoch,
                    "loss": loss_sum if math.isfinite(loss_sum) else None,
                    "lr": lr,
                }
            )
            tokens = sum(lengths[i] for batch in group for i in batch)
            speed = tokens / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss_sum:.3f}, {speed:.0f} tokens/s", refresh=False)

            if run.step % options.checkpoint_every == 0 or group is groups[-1] or stops:
                checkpoints.save(run)
            if stops:
                bar.close()
                print(
                    f"stopped after step {run.step} of {total_steps}, saved to "
                    f"{checkpoints.last()}: the same command with --resume goes on"
                )
                return 128 + (stop.signal or signal.SIGTERM)

        # What the model can do after this epoch.
        if not team.is_writer:
            continue
        model.eval()
        with average.swapped_in():
            for name, part in evaluated.items():
                report = evaluate(tagger, part.sentences, part.source)
                print(f"epoch {epoch}, {name}: {report.summary()}")
                scores = {
                    "entity_f1": report.entity.micro.f1,
                    "token_micro_f1_including_O": report.token.micro_with_o,
                }
                run.log.append({"step": run.step, "epoch": epoch, "set": name} | scores)
                if name == "dev" and scores["entity_f1"] > run.best_f1:
                    run.best_f1 = scores["entity_f1"]
                    save(model, tokenizer, options.output / "best")
            save(model, tokenizer, options.output / "last")
        write_text(options.output / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in run.log))

    if not team.is_writer:
        return 0

    # What is left behind: the curve, and the scores of the last epoch on the set evaluated last.
    losses = [entry["loss"] for entry in run.log if entry.get("loss") is not None]
    print(f"\ntraining loss\n{text_curve(losses)}")
    f1s: list[tuple[int, float]] = []
    if evaluated:
        print(f"\n{name} set, last epoch: {report.table()}")
        write_text(options.output / "report.json", json.dumps(report.to_dict(), indent=2) + "\n")
        f1s = [
            (entry["step"], 100 * entry["entity_f1"])
            for entry in run.log
            if entry.get("set") == name
        ]
    try:
        write_png(losses, f1s, options.output / "loss.png")
    except ImportError:
        print("no loss.png: it needs minibert[plot]")
    print(f"\nsaved to {options.output}")
    return 0


def progress(groups: list, done: int, title: str, team: Team) -> tqdm:
    """The steps of an epoch that are left to do, with a bar that the writer shows."""
    return tqdm(
        groups[done:], title, len(groups), initial=done, unit="step", disable=not team.is_writer
    )


def lines_of(examples: list[Example], group: list[list[int]], part: Part) -> str:
    """Where the sentences of a step begin in their file."""
    numbers = {part.sentences[examples[i].sentence].line for batch in group for i in batch}
    return f"{part.source}, sentences at lines {', '.join(map(str, sorted(numbers)))}"


def collate(
    examples: list[Example], layout: str, pad_id: int, device: torch.device, fill: bool
) -> Batch:
    """A batch in the layout of the recipe; ``fill`` a packed one up to one of a few sizes."""
    if layout == "packed":
        return bio.packed(examples, device, pad_id if fill else None)
    length = None if layout == "longest" else int(layout)
    return bio.padded(examples, pad_id, length, device)


def save(model: BertForTokenClassification, tokenizer: Tokenizer, directory: Path) -> None:
    """A directory that ``Tagger.from_pretrained`` and transformers open."""
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    options, recipe = parse(argv)
    try:
        with team_on(choose_device(options.device)) as team:
            with redirect_stdout(sys.stdout if team.is_writer else None):
                return train(options, recipe, team)
    except MinibertError as problem:
        print(f"train.py: {problem}", file=sys.stderr, flush=True)
        if isinstance(problem, AloneError):
            sys.stdout.flush()
            os._exit(2)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
