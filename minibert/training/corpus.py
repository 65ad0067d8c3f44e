"""The sentences that a run trains and evaluates on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minibert.files import MinibertError
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.tagging.evaluate import unknown_tags
from minibert.text import demo
from minibert.text.batches import Example, examples_of
from minibert.text.bio import Sentence, label_ids, labels_of, read_bio


@dataclass(frozen=True)
class Part:
    """Sentences and the file they come from."""

    sentences: list[Sentence]
    source: str

    def examples(
        self, tokenizer: Tokenizer, labels: Sequence[str], max_length: int
    ) -> list[Example]:
        """Word-pieces and label ids, with sentences of over ``max_length`` pieces windowed."""
        ids = label_ids(self.sentences, labels, self.source)
        words = [sentence.words for sentence in self.sentences]
        return examples_of(words, tokenizer, max_length, ids)

    def lines_of(self, examples: Iterable[Example]) -> str:
        """For messages: the lines of the file on which the sentences of these examples begin."""
        lines = sorted({self.sentences[example.sentence].line for example in examples})
        return f"{self.source}, sentences at lines {', '.join(map(str, lines))}"


def corpus(options: argparse.Namespace) -> tuple[Part, dict[str, Part]]:
    """The training sentences, and the sets to evaluate on: "dev" and "test", in this order.

    Args:
        options: train, test, dev, corpus, orphans and seed of the command line.

    Raises:
        MinibertError: a file is missing or wrong, the training sentences have no entity, or none of
            a type that occurs in a set, or ``--dev`` is neither a file nor a share.

    Tags that occur in a set, but not in the training sentences, are printed.
    """
    read = partial(read_part, orphans=options.orphans)
    if options.train is not None:
        training = read_part(options.train, options.orphans)
        parts = (
            {"test": read_part(options.test, options.orphans)} if options.test is not None else {}
        )
    elif options.corpus == "demo":
        training, test = (Part(sentences, "demo corpus") for sentences in demo.generate())
        parts = {"test": test}
    else:
        folder = hub.locate_corpus(options.corpus)
        training, parts = (
            read_part(folder / "engtrain.bio"),
            {"test": read_part(folder / "engtest.bio")},
        )
    training, parts = with_dev(options, training, parts, read)
    if labels_of(training.sentences) == ("O",):
        raise MinibertError(
            f"{training.source}: every tag is O, so there is no entity to learn: "
            "name a file with B- and I- tags"
        )
    for part in parts.values():
        if unknown := unknown_tags(part.sentences, labels_of(training.sentences), part.source):
            print(unknown)
    return training, parts


def with_dev(
    options: argparse.Namespace,
    training: Part,
    parts: dict[str, Part],
    read: Callable[[Path], Part],
) -> tuple[Part, dict[str, Part]]:
    """Add the "dev" set of ``--dev``: a file, or a share of the training sentences.

    Args:
        options: dev and seed of the command line.
        training: the training sentences.
        parts: the other sets.
        read: reads a file.

    Raises:
        MinibertError: the file is wrong, or ``--dev`` is neither a file nor a share.
    """
    if options.dev is None:
        return training, parts
    if os.path.isfile(options.dev):
        return training, {"dev": read(Path(options.dev))} | parts
    training, held_out = _held_out(training, options.dev, options.seed)
    return training, {"dev": held_out} | parts


def read_part(path: Path, orphans: str = "refuse") -> Part:
    """The sentences of a BIO file.

    Raises:
        MinibertError: it cannot be read, or has a malformed line.
    """
    return Part(read_bio(path, orphans, print), str(path))


def _held_out(part: Part, dev: str, seed: int) -> tuple[Part, Part]:
    """Split off the share ``dev`` of the sentences, drawn at random."""
    try:
        share = float(dev)
    except ValueError:
        share = 0.0
    count = round(share * len(part.sentences)) if 0 < share < 1 else 0
    if not 0 < count < len(part.sentences):
        raise MinibertError(
            f"--dev {dev}: neither a file nor a share of the training sentences: "
            "give a BIO file or a number such as 0.1"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(part.sentences), generator=generator).tolist()
    chosen = [[part.sentences[i] for i in ids] for ids in (order[count:], order[:count])]
    return Part(chosen[0], part.source), Part(chosen[1], part.source)
