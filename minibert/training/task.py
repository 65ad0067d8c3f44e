"""What the loop trains: data, a model with a head, and what is measured after an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn

from minibert.model.heads import BertWithHead
from minibert.text.batches import Example
from minibert.training.corpus import Part
from minibert.training.output import Output
from minibert.training.resume import Training


class Task(Protocol):
    """Named entities in train.py, hidden words in pretrain.py.

    Attributes:
        directory: of the checkpoint that it started from.
        pad_id: the tokenizer's padding piece.
        parts: the sentences by purpose; "training" is one.
        settings: what else decides the result, by name; see ``resume.identity``.
    """

    directory: Path
    pad_id: int
    parts: dict[str, Part]
    settings: dict[str, str]

    @property
    def objective(self) -> nn.Module:
        """What a step runs: the model, or a module around it; its output has the loss."""

    @property
    def model(self) -> BertWithHead:
        """In float32, with a head whose loss is a mean over the labels of the examples."""

    def examples(self, epoch: int) -> list[Example]:
        """What an epoch reads, counted from 1; each with a label.

        Number and lengths are the same in every epoch.
        """

    def evaluate_and_save(self, epoch: int, run: Training, output: Output) -> None:
        """After an epoch, in the process that writes."""

    def report(self, run: Training, output: Output) -> None:
        """At the end, in the process that writes."""
