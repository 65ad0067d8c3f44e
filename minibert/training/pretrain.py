"""Masked-LM training: continue or start the pretraining of a BERT on plain text.

    minibert pretrain --model minilm --text queries.txt --dev 0.1 --output runs/language
    minibert pretrain --model minilm --bio train.bio --masking whole --output runs/entities
    minibert train --model runs/language/last ...       fine-tune what it left

The loop, its checkpoints and ``--resume`` are those of train.py; here are its data, its head and
what it measures. Each line of text is one sentence, cut into pieces of what the model can read if
it is longer. text/masking.py says which word-pieces are hidden. Held-out text is hidden the same
way after every epoch, so that its losses can be compared. Google's BERT also learned which sentence
follows which; later models do without (Liu et al. 2019, arXiv:1907.11692, section 4.2), and so does
this one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minibert.files import MinibertError, decoded, lines_of, read_text, reading, write_text
from minibert.model.heads import BertForMaskedLM, BertOutput
from minibert.model.labels import IGNORE
from minibert.model.layout import Packed
from minibert.pretrained import config_json, hub, load
from minibert.pretrained.tokenizer import Tokenizer
from minibert.processes import Team
from minibert.tagging.words import split
from minibert.text.batches import Example, chunks, examples_of, packed
from minibert.text.bio import Sentence
from minibert.text.masking import mask, tags_of, units_of
from minibert.training.arguments import parse_pretraining
from minibert.training.corpus import Part, read_part, with_dev
from minibert.training.loop import start
from minibert.training.output import Output
from minibert.training.recipe import PretrainingRecipe
from minibert.training.results import draw_losses, save, show_losses, write_log
from minibert.training.resume import Training


class HiddenWordsModel(BertForMaskedLM):
    """A masked LM that scores the hidden pieces alone.

    The head is as wide as the vocabulary: on every piece it would cost more than MiniLM's encoder.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        layout: Packed | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BertOutput:
        """The loss of the superclass; logits (W, V) of the pieces that have a label."""
        assert labels is not None
        batch = self._layout(input_ids, attention_mask, layout)
        input_N, label_N = input_ids.flatten(), labels.flatten()
        hidden_N = label_N != IGNORE
        x_ND = self.bert(input_N, torch.zeros_like(input_N), batch).x_ND
        scores_WV = self.head(x_ND[hidden_N])
        return BertOutput(scores_WV, self.head.loss(scores_WV, label_N[hidden_N], batch))


class HiddenWords:
    """What is trained: a model that fills in hidden word-pieces, and its data.

    Args:
        options: the command line.
        recipe: masking and layout.
        team: the processes of the run.

    Raises:
        MinibertError: a file is missing or wrong.
    """

    def __init__(self, options: argparse.Namespace, recipe: PretrainingRecipe, team: Team):
        with team.writer_first():
            self.parts = texts(options)
            self.directory = hub.locate_model(options.model)
        if choice := hub.choice(options.model, self.directory):
            print(choice)
        self.tokenizer = Tokenizer.from_pretrained(self.directory)
        self.pad_id = self.tokenizer.pad_id
        self.model = self.objective = model_of(options, self.directory, team.device)
        self.tokenizer.check_fits(self.model.config.vocab_size)
        self.settings = {"weights": "from scratch"} if options.from_scratch else {}
        self.seed, self.masking = options.seed, recipe.masking
        max_length = recipe.max_length(self.model.config.max_length)
        self.units = {name: self._units(part, max_length) for name, part in self.parts.items()}

    def _units(self, part: Part, max_length: int) -> list[tuple[Example, list[tuple[int, ...]]]]:
        """The examples of a part in which something can be hidden, and what can."""
        tokenizer = self.tokenizer
        never = {tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id}
        never |= {tokenizer.sep_id, tokenizer.mask_id}
        words = [sentence.words for sentence in part.sentences]
        found = []
        for example in examples_of(words, tokenizer, max_length, stride=0):
            tags = part.sentences[example.sentence].tags if self.masking == "whole" else None
            if units := units_of(example, never, tags):
                found.append((example, units))
        if not found:
            raise MinibertError(
                f"{part.source}: no word of it is in the vocabulary of {self.directory}: "
                "use a tokenizer of its language"
            )
        return found

    def _masked(self, name: str, epoch: int) -> list[Example]:
        mask_id, size = self.tokenizer.mask_id, self.tokenizer.vocab_size
        return [
            mask(example, units, mask_id, size, self.seed, epoch, number)
            for number, (example, units) in enumerate(self.units[name])
        ]

    def examples(self, epoch: int) -> list[Example]:
        """The training text with the pieces hidden that this epoch hides."""
        return self._masked("training", 0 if self.masking == "static" else epoch)

    def evaluate_and_save(self, epoch: int, run: Training, output: Output) -> None:
        """Measure the averaged weights on the held-out text, and save them as ``last``."""
        if epoch == 1:  # an earlier run's
            output.discard("best", "report.json", "loss.png")
        self.model.eval()
        self.scores: dict[str, float] = {}
        with run.average.swapped_in():
            if "dev" in self.parts:
                self.scores = measure(self.model, self._masked("dev", 0))
                run.log.append({"step": run.step, "epoch": epoch, "set": "dev"} | self.scores)
                print(
                    f"epoch {epoch}, dev: masked-LM loss {self.scores['masked_loss']:.4f}, "
                    f"{self.scores['masked_accuracy']:.2%} of the hidden pieces found"
                )
            save(self.model, self.tokenizer, output, "last")
        write_log(run, output)

    def report(self, run: Training, output: Output) -> None:
        """Print and draw the loss curve; write the scores of the last epoch."""
        losses = show_losses(run)
        if self.scores:
            write_text(output.at("report.json"), json.dumps(self.scores, indent=2) + "\n")
        draw_losses(losses, [], output)


def model_of(
    options: argparse.Namespace, directory: Path, device: torch.device
) -> HiddenWordsModel:
    """The model to train: a checkpoint's, or with ``--from-scratch`` a new one of its shape.

    Raises:
        MinibertError: a file is missing, damaged or does not fit.
    """
    if not options.from_scratch:
        model = HiddenWordsModel.from_pretrained(
            directory, attn_implementation=options.attn, device=device, seed=options.seed
        )
        print(f"{options.model}: {model.load_report}")
        return model
    config = config_json.read(directory / "config.json")
    attention = load.choose_attention(options.attn, device, torch.float32, config.head_size)
    torch.manual_seed(options.seed)
    return HiddenWordsModel(config, attention.value).to(device)


@torch.no_grad()
def measure(model: HiddenWordsModel, examples: list[Example]) -> dict[str, float]:
    """Mean loss (natural logarithm) and accuracy over the hidden pieces of these examples."""
    loss, right, count = 0.0, 0, 0
    for group in chunks(sorted(examples, key=lambda example: len(example.ids)), 32):
        batch = packed(group, model.device)
        output = model(**batch.inputs)
        label_N = batch.inputs["labels"]
        assert isinstance(label_N, Tensor)
        label_W = label_N[label_N != IGNORE]
        loss += float(output.loss) * len(label_W)
        right += int((output.logits.argmax(-1) == label_W).sum())
        count += len(label_W)
    return {"masked_loss": loss / count, "masked_accuracy": right / count}


def texts(options: argparse.Namespace) -> dict[str, Part]:
    """The training text, and the held-out text as "dev" if there is one.

    Raises:
        MinibertError: a file cannot be read or has no words.
    """
    phrases = set()
    if options.phrases is not None:
        lines = read_text(options.phrases, "name a file with one phrase per line").splitlines()
        phrases = {tuple(split(line.lower()).words) for line in lines} - {()}

    def read(path: Path) -> Part:
        # An entity is only a stretch of words here, whatever its first tag.
        return read_lines(path, phrases) if options.bio is None else read_part(path, "repair")

    training, evaluated = with_dev(options, read(options.bio or options.text), {}, read)
    return {"training": training} | evaluated


def read_lines(path: Path, phrases: set[tuple[str, ...]]) -> Part:
    """The lines of a text that have words; phrases become entities.

    Raises:
        MinibertError: it cannot be read, is not UTF-8, or has no words.
    """
    sentences = []
    with reading(path, "name a text with one sentence per line") as file:
        for number, raw in lines_of(file, path):
            if words := split(decoded(raw, path, number)).words:
                sentences.append(Sentence(tuple(words), tags_of(words, phrases), number))
    if not sentences:
        raise MinibertError(f"{path}: no words in it: write one sentence per line")
    return Part(sentences, str(path))


def main(argv: Sequence[str] | None = None, program: str = "minibert pretrain") -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments; None takes those of the process.
        program: its name in usage and errors.
    """
    options, recipe = parse_pretraining(argv, program)
    return start(options, recipe, HiddenWords, program)
