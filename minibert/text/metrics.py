"""Token and entity scores of a sequence labelling.

Token scores count words. Entity scores count entities; one is correct if its type and both ends
are. The MIT Movie paper reports token micro-F1 including O, which equals accuracy. Most other work
reports entity F1, about six points lower for the same predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Tags = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1 in [0, 1], 0 where the denominator is 0, and support."""

    precision: float
    recall: float
    f1: float
    support: int  # true entities or words

    @classmethod
    def of(cls, right: int, predicted: int, true: int) -> Score:
        """From counts of correct, predicted and true ones."""
        precision = right / predicted if predicted else 0.0
        recall = right / true if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        return cls(precision, recall, f1, true)


def lenient_entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, start, stop) of each entity, as in conlleval: an orphan I- starts an entity."""
    start = None
    for i, tag in enumerate([*tags, "O"]):
        if start is not None and (tag[0] != "I" or tag[2:] != tags[start][2:]):
            yield tags[start][2:], start, i
            start = None
        if tag != "O" and start is None:
            start = i


def strict_entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, start, stop) of each entity in IOB2: only B- starts one; an orphan I- is ignored."""
    for type_, start, stop in lenient_entities(tags):
        if tags[start][0] == "B":
            yield type_, start, stop


@dataclass(frozen=True)
class EntityScores:
    """Micro-average over all entities, and the score of each type in alphabetical order."""

    micro: Score
    by_type: dict[str, Score]


def entity_scores(true: Tags, predicted: Tags, strict: bool = False) -> EntityScores:
    """Entity precision, recall and F1.

    Args:
        true, predicted: tags "O", "B-TYPE" or "I-TYPE" of the same sentences.
        strict: seqeval's ``mode="strict", scheme=IOB2``; else its default, which is conlleval's.

    Raises:
        ValueError: the two differ in number of sentences or words.
    """
    _check_aligned(true, predicted)
    entities = strict_entities if strict else lenient_entities
    right, found, there = Counter[str](), Counter[str](), Counter[str]()
    for true_tags, predicted_tags in zip(true, predicted):
        true_set, predicted_set = set(entities(true_tags)), set(entities(predicted_tags))
        there.update(entity[0] for entity in true_set)
        found.update(entity[0] for entity in predicted_set)
        right.update(entity[0] for entity in true_set & predicted_set)
    by_type = {
        type_: Score.of(right[type_], found[type_], there[type_])
        for type_ in sorted(there.keys() | found.keys())
    }
    return EntityScores(Score.of(right.total(), found.total(), there.total()), by_type)


@dataclass(frozen=True)
class TokenScores:
    """Scores over words; ``confusion[true][predicted]`` is a count of words."""

    micro_with_o: float  # equals accuracy
    micro_without_o: Score
    macro_f1: float  # unweighted mean over the labels in either
    by_label: dict[str, Score]
    confusion: dict[str, dict[str, int]]


def token_scores(true: Tags, predicted: Tags) -> TokenScores:
    """Token scores, equal to scikit-learn's.

    Raises:
        ValueError: the two differ in number of sentences or words, or there are no words.
    """
    _check_aligned(true, predicted)
    pairs = Counter(
        pair for true_tags, tags in zip(true, predicted) for pair in zip(true_tags, tags)
    )
    total = pairs.total()
    if not total:
        raise ValueError("no words to score")
    there, found = Counter[str](), Counter[str]()
    for (true_tag, tag), count in pairs.items():
        there[true_tag] += count
        found[tag] += count
    labels = sorted(there.keys() | found.keys())
    by_label = {
        label: Score.of(pairs[label, label], found[label], there[label]) for label in labels
    }
    right = {label: pairs[label, label] for label in labels}
    return TokenScores(
        micro_with_o=sum(right.values()) / total,
        micro_without_o=Score.of(
            sum(right.values()) - right.get("O", 0), total - found["O"], total - there["O"]
        ),
        macro_f1=sum(score.f1 for score in by_label.values()) / len(labels),
        by_label=by_label,
        confusion={a: {b: pairs[a, b] for b in labels} for a in labels},
    )


def _check_aligned(true: Tags, predicted: Tags) -> None:
    if len(true) != len(predicted):
        raise ValueError(f"{len(true)} true sentences, but {len(predicted)} predicted ones")
    for i, (true_tags, tags) in enumerate(zip(true, predicted)):
        if len(true_tags) != len(tags):
            raise ValueError(f"sentence {i}: {len(true_tags)} true tags, but {len(tags)} predicted")
