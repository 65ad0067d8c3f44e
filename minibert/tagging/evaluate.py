"""All scores of a model on a file, as numbers for programs and as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from minibert.tagging.stream import progress
from minibert.text import labelling
from minibert.text.bio import Sentence, label_ids
from minibert.text.metrics import EntityScores, Score, TokenScores, entity_scores, token_scores

COLUMNS = 80  # of a terminal


@dataclass(frozen=True)
class Report:
    """Every score under its full name."""

    sentences: int
    token: TokenScores
    entity: EntityScores
    entity_strict: EntityScores
    unknown: str = ""  # see ``unknown_tags``
    predicted: Sequence[Sequence[str]] = ()  # the labels given

    def to_dict(self) -> dict:
        """For JSON; all scores in [0, 1]."""
        return {
            "sentences": self.sentences,
            "token_micro_f1_including_O": self.token.micro_with_o,
            "token_micro_f1_without_O": self.token.micro_without_o.f1,
            "token_macro_f1": self.token.macro_f1,
            "entity_f1": self.entity.micro.f1,
            "entity_f1_strict_IOB2": self.entity_strict.micro.f1,
            "entity": asdict(self.entity),
            "entity_strict_IOB2": asdict(self.entity_strict),
            "token_by_label": {name: asdict(s) for name, s in self.token.by_label.items()},
            "confusion": self.token.confusion,
        }

    def summary(self) -> str:
        """The two numbers that are compared with others, in one line."""
        return (
            f"entity F1 {self.entity.micro.f1:.2%}, "
            f"token micro-F1 including O {self.token.micro_with_o:.2%}"
        )

    def table(self) -> str:
        """Scores, scores by type, and which type is taken for which."""
        words = sum(score.support for score in self.token.by_label.values())
        lines = [
            f"{self.sentences} sentences, {words} words, {self.entity.micro.support} entities",
            "",
            f"entity F1 (seqeval default, conlleval)   {self.entity.micro.f1:8.2%}",
            f"entity F1 (strict IOB2)                  {self.entity_strict.micro.f1:8.2%}",
            f"token micro-F1 including O (accuracy)    {self.token.micro_with_o:8.2%}",
            f"token micro-F1 without O                 {self.token.micro_without_o.f1:8.2%}",
            f"token macro-F1                           {self.token.macro_f1:8.2%}",
            "",
            f"{'entity type':16} {'precision':>9} {'recall':>9} {'F1':>9} {'support':>8}",
        ]
        for name, s in [*self.entity.by_type.items(), ("all, micro", self.entity.micro)]:
            lines.append(f"{name:16} {_percents(s)} {s.support:8}")
        if self.unknown:
            lines += ["", self.unknown]
        return "\n".join([*lines, "", *self._confusion_lines()])

    def _confusion_lines(self) -> list[str]:
        """Words by true type, and the types that they are taken for, B and I together."""
        counts: dict[str, Counter[str]] = {}
        for true, row in self.token.confusion.items():
            for predicted, count in row.items():
                counts.setdefault(_type(true), Counter())[_type(predicted)] += count
        width = max(16, *(len(true) for true in counts))
        lines = [f"{'true type':{width}} {'words':>7} {'right':>7}  taken for"]
        for true in sorted(counts, key=lambda t: (t == "O", t)):
            found = counts[true]
            if not found.total():
                continue
            line = f"{true:{width}} {found.total():7} {found[true]:7} "
            wrong = [f"{t} {n}" for t, n in found.most_common() if n and t != true]
            for i, cell in enumerate(wrong):
                if i and len(line) + len(cell) > COLUMNS - len(",  ..."):
                    line += ", ..."
                    break
                line += f"{',' if i else ''} {cell}"
            lines.append(line.rstrip())
        return lines


def _type(tag: str) -> str:
    return tag[2:] or tag


def _percents(score: Score) -> str:
    return f"{score.precision:9.2%} {score.recall:9.2%} {score.f1:9.2%}"


def unknown_tags(sentences: Sequence[Sentence], labels: Sequence[str], source: Path | str) -> str:
    """For people: the tags that a model with these labels cannot find; "" if there are none.

    Raises:
        MinibertError: it knows none of the entities' tags.
    """
    tags = Counter(tag for sentence in sentences for tag in sentence.tags if tag != "O")
    if not tags:
        return f"{source}: every tag is O: there is no entity to find"
    unknown = sorted(tags.keys() - set(labels))
    if unknown and len(unknown) == len(tags):
        label_ids(sentences, labels, source)
    if not unknown:
        return ""
    words = sum(tags[tag] for tag in unknown)
    names = ", ".join(unknown[:8]) + (" ..." if len(unknown) > 8 else "")
    return f"{source}: no label for {names}: {words} words count as missed"


def evaluate(
    tagger: labelling.WordTagger,
    sentences: Sequence[Sentence],
    source: Path | str,
    min_score: float = 0.0,
) -> Report:
    """Tag the sentences and compare.

    Args:
        tagger: anything that labels words.
        sentences: with their true tags.
        source: the file they are from, for messages.
        min_score: entities with a lower mean probability are left out.

    Raises:
        MinibertError: the model knows none of the entities' tags; with file and line.
    """
    unknown = unknown_tags(sentences, tagger.labels, source)
    true = [list(sentence.tags) for sentence in sentences]
    labels = tagger.label(sentence.words for sentence in sentences)
    shown = progress(labels, "sentences", len(sentences))
    predicted = [labelling.names(sentence, min_score) for sentence in shown]
    return Report(
        len(sentences),
        token_scores(true, predicted),
        entity_scores(true, predicted),
        entity_scores(true, predicted, strict=True),
        unknown,
        predicted,
    )


@dataclass(frozen=True)
class Difference:
    """How far the labels of one number format are from those of another on one file."""

    reference: str
    compared: str
    words: int
    different: int
    entity_f1_reference: float
    entity_f1_compared: float

    def __str__(self) -> str:
        share = self.different / self.words if self.words else 0.0
        return (
            f"{self.compared} against {self.reference}: {self.different} of {self.words} labels "
            f"differ ({share:.2%}), entity F1 {self.entity_f1_compared:.2%} against "
            f"{self.entity_f1_reference:.2%}"
        )


def difference(reference: str, first: Report, compared: str, second: Report) -> Difference:
    """Of two reports on the same sentences; ``reference`` and ``compared`` name their formats."""
    labels = [list(chain(*report.predicted)) for report in (first, second)]
    different = sum(a != b for a, b in zip(*labels, strict=True))
    f1s = [report.entity.micro.f1 for report in (first, second)]
    return Difference(reference, compared, len(labels[0]), different, *f1s)
