"""All scores of a model on a file, as numbers for programs and as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minibert.text.bio import Sentence, label_ids
from minibert.text.labelling import WordTagger
from minibert.text.metrics import EntityScores, Score, TokenScores, entity_scores, token_scores


@dataclass(frozen=True)
class Report:
    """Every score under its full name."""

    sentences: int
    token: TokenScores
    entity: EntityScores
    entity_strict: EntityScores
    unknown: str = ""  # see ``unknown_tags``

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
        """Words by true type (rows) and predicted type (columns), B and I together."""
        counts: Counter[tuple[str, str]] = Counter()
        for true, row in self.token.confusion.items():
            for predicted, count in row.items():
                counts[_type(true), _type(predicted)] += count
        types = sorted({t for pair in counts for t in pair}, key=lambda t: (t == "O", t))
        width = max(len(str(count)) for count in counts.values()) + 1
        width = max(width, 7)
        head = "".join(f"{t[: width - 1]:>{width}}" for t in types)
        lines = [f"{'words: true, taken for':22}{head}"]
        for true in types:
            cells = "".join(f"{counts[true, t] or '.':>{width}}" for t in types)
            lines.append(f"{true:22}{cells}")
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
    unknown = sorted(tags.keys() - set(labels))
    if unknown and len(unknown) == len(tags):
        label_ids(sentences, labels, source)
    if not unknown:
        return ""
    words = sum(tags[tag] for tag in unknown)
    names = ", ".join(unknown[:8]) + (" ..." if len(unknown) > 8 else "")
    return f"{source}: no label for {names}: {words} words count as missed"


def evaluate(tagger: WordTagger, sentences: Sequence[Sentence], source: Path | str) -> Report:
    """Tag the sentences and compare.

    Args:
        tagger: anything that labels words.
        sentences: with their true tags.
        source: the file they are from, for messages.

    Raises:
        MinibertError: the model knows none of the entities' tags; with file and line.
    """
    unknown = unknown_tags(sentences, tagger.labels, source)
    true = [list(sentence.tags) for sentence in sentences]
    labels = tagger.label(sentence.words for sentence in sentences)
    predicted = [[label.name for label in sentence] for sentence in labels]
    return Report(
        len(sentences),
        token_scores(true, predicted),
        entity_scores(true, predicted),
        entity_scores(true, predicted, strict=True),
        unknown,
    )
