"""Scores equal those of scikit-learn and seqeval on random tags, ill-formed ones included."""

from __future__ import annotations

import random
import warnings
from dataclasses import astuple
from functools import partial

import pytest
import sklearn.metrics
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as seqeval_scores
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.scheme import IOB2

from minibert.text.metrics import entity_scores, token_scores

TYPES = ("ACTOR", "TITLE", "B-SIDE")  # one looks like a tag itself
TAGS = ["O", *(f"{prefix}-{type_}" for type_ in TYPES for prefix in "BI")]
SEQUENCES, PER_CORPUS = 2_000, 20
near = partial(pytest.approx, abs=1e-12)


def corpora():
    rng = random.Random(1)
    for _ in range(SEQUENCES // PER_CORPUS):
        weights = [rng.random() ** 2 for _ in TAGS]
        true, predicted = [], []
        for _ in range(PER_CORPUS):
            length = rng.randrange(1, 12)
            tags = rng.choices(TAGS, weights, k=length)
            noise = rng.random()
            true.append(tags)
            predicted.append([rng.choice(TAGS) if rng.random() < noise else t for t in tags])
        yield true, predicted


def test_token_scores_equal_scikit_learn() -> None:
    for corpus in corpora():
        true, predicted = ([tag for tags in part for tag in tags] for part in corpus)
        labels = sorted({*true, *predicted})
        ours = token_scores(*corpus)
        f1 = partial(sklearn.metrics.f1_score, true, predicted, zero_division=0.0)
        assert ours.micro_with_o == sklearn.metrics.accuracy_score(true, predicted)
        assert ours.micro_with_o == near(f1(average="micro"))
        assert ours.macro_f1 == near(f1(average="macro"))
        if entity_labels := [label for label in labels if label != "O"]:
            assert ours.micro_without_o.f1 == near(f1(average="micro", labels=entity_labels))
        rows = sklearn.metrics.precision_recall_fscore_support(
            true, predicted, labels=labels, zero_division=0.0
        )
        for label, row in zip(labels, zip(*rows)):
            assert astuple(ours.by_label[label]) == near(row)
        matrix = sklearn.metrics.confusion_matrix(true, predicted, labels=labels)
        assert [[ours.confusion[a][b] for b in labels] for a in labels] == matrix.tolist()


@pytest.mark.parametrize("strict", [False, True])
def test_entity_scores_equal_seqeval(strict: bool) -> None:
    compared = 0
    for true, predicted in corpora():
        ours = entity_scores(true, predicted, strict)
        if not ours.by_type:
            continue
        scores, options = (strict_scores, {"scheme": IOB2}) if strict else (seqeval_scores, {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where a type was never predicted
            micro = scores(true, predicted, average="micro", zero_division=0, **options)
            by_type = zip(*scores(true, predicted, average=None, zero_division=0, **options))
        assert astuple(ours.micro)[:3] == near(micro[:3])  # seqeval gives no support here
        for score, row in zip(ours.by_type.values(), by_type, strict=True):
            assert astuple(score) == near(row)
        compared += PER_CORPUS
    assert compared > 0.9 * SEQUENCES


def test_misaligned_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 true sentences, but 1"):
        entity_scores([["O"], ["O"]], [["O"]])
    with pytest.raises(ValueError, match="sentence 0: 1 true tags, but 2"):
        token_scores([["O"]], [["O", "O"]])
    with pytest.raises(ValueError, match="no words"):
        token_scores([], [])
