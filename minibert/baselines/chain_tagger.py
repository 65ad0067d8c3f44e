"""What the three systems share: they score words, a chain weighs the labels, files keep both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from minibert.files import MinibertError, read_json, write_text
from minibert.model.crf import Chain
from minibert.model.labels import well_formed_chain
from minibert.pretrained import weights
from minibert.text.batches import chunks
from minibert.text.labelling import Label

Words = Sequence[str]
Self = TypeVar("Self", bound="ChainTagger")
POOL = 256  # sentences that are labelled together


class ChainTagger(nn.Module):
    """A system that labels words by the best well-formed sequence of a chain.

    A subclass has a ``kind``, its name in config.json; ``chain``; and ``scores``. L is the number
    of the chain's states: the labels, or parts of them that ``state_labels`` names.

    Args:
        labels: in the order of their ids.
        vocabulary: of the strings that have a row in one of its tables, by the table's name; every
            list in the order of the rows.
        settings: numbers that decide the shapes of the tensors, for config.json.
    """

    kind: ClassVar[str]
    chain: Chain

    def __init__(self, labels: Sequence[str], vocabulary: dict[str, list[str]], **settings: int):
        super().__init__()
        self.labels = tuple(labels)
        self.state_labels = self.labels  # the label of each of the chain's states
        self.vocabulary = vocabulary
        self.settings = settings
        self.row = {
            table: {string: row for row, string in enumerate(strings)}
            for table, strings in vocabulary.items()
        }

    def scores(self, sentences: Sequence[Words]) -> PackedSequence:
        """The score of every state for every word of the sentences, packed: (N, L)."""
        raise NotImplementedError

    def label(self, sentences: Iterable[Words]) -> Iterator[list[Label]]:
        """One label for every word of every sentence, in order, as a stream."""
        for pool in chunks(sentences, POOL):
            yield from self._label(pool)

    @torch.inference_mode(False)  # probabilities are gradients
    @torch.no_grad()
    def _label(self, sentences: Sequence[Words]) -> Iterator[list[Label]]:
        lengths = [len(words) for words in sentences]
        if not any(lengths):
            return iter([[] for _ in sentences])
        rules = well_formed_chain(self.state_labels).parameters()
        chain = Chain(*(w + rule.to(w) for w, rule in zip(self.chain.parameters(), rules)))
        chain.double()  # log Z of a long sentence is large
        scores = self.scores(sentences)
        scores = scores._replace(data=scores.data.double())
        paths = unpack_sequence(chain.best(scores))
        probabilities = unpack_sequence(chain.probabilities(scores))
        found = (
            [Label(self.state_labels[i], p) for i, p in zip(path.tolist(), p_W.tolist())]
            for path, p_WL in zip(paths, probabilities)
            for p_W in (p_WL.gather(1, path[:, None])[:, 0],)
        )
        return iter([next(found) if length else [] for length in lengths])

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, vocabulary.json and model.safetensors.

        Raises:
            MinibertError: the directory cannot be written or the disk is full.
        """
        folder = Path(directory)
        tensors = {name: tensor.float() for name, tensor in self.state_dict().items()}
        weights.save_tensors(tensors, folder / weights.WEIGHTS, {})
        write_text(folder / "vocabulary.json", json.dumps(self.vocabulary, ensure_ascii=False))
        config = {"model_type": self.kind, "labels": self.labels, "settings": self.settings}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls: type[Self], directory: str | Path) -> Self:
        """Load what ``save_pretrained`` wrote.

        Raises:
            MinibertError: a file is missing or damaged, or belongs to another system.
        """
        folder, remedy = Path(directory), f"name a directory that holds a {cls.kind}"
        config: Any = read_json(folder / "config.json", remedy)
        vocabulary: Any = read_json(folder / "vocabulary.json", remedy)
        with weights.opened(folder / weights.WEIGHTS) as checkpoint:
            tensors = dict(checkpoint.read(checkpoint.tensors))
        try:
            if config["model_type"] != cls.kind:
                raise ValueError(f"model_type is {config['model_type']!r}")
            made = cls(config["labels"], vocabulary, **config["settings"])
            made.load_state_dict(tensors)
            if unknown := set(made.state_labels) - set(made.labels):
                raise ValueError(f"labels lack {sorted(unknown)}")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise MinibertError(
                f"{folder}: not a {cls.kind} that minibert saved ({error}): {remedy}"
            ) from None
        return made.eval()
