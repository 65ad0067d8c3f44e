"""Scores equal those of scikit-learn and seqeval on random tags, ill-formed ones included."""

from __future__ import annotations

import random
import warnings

import pytest
import sklearn.metrics
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as seqeval_scores
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores
from seqeval.scheme import IOB2

from minibert.text.metrics import entity_scores, token_scores

TYPES = ("ACTOR", "TITLE", "B-SIDE")  # one looks like a tag itself
TAGS = ["O", *(f"{prefix}-{type_}" for type_ in TYPES for prefix in "BI")]
SEQUENCES, PER_CORPUS = 2_000, 20


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
    for true, predicted in corpora():
        flat_true = [tag for tags in true for tag in tags]
        flat = [tag for tags in predicted for tag in tags]
        labels = sorted({*flat_true, *flat})
        ours = token_scores(true, predicted)
        f1 = sklearn.metrics.f1_score
        options = {"zero_division": 0.0}
        entity_labels = [label for label in labels if label != "O"]
        assert ours.micro_with_o == pytest.approx(f1(flat_true, flat, average="micro"), abs=1e-12)
        assert ours.micro_with_o == sklearn.metrics.accuracy_score(flat_true, flat)
        if entity_labels:
            assert ours.micro_without_o.f1 == pytest.approx(
                f1(flat_true, flat, labels=entity_labels, average="micro", **options), abs=1e-12
            )
        assert ours.macro_f1 == pytest.approx(
            f1(flat_true, flat, average="macro", **options), abs=1e-12
        )
        rows = zip(
            *sklearn.metrics.precision_recall_fscore_support(
                flat_true, flat, labels=labels, **options
            )
        )
        for label, (precision, recall, f1_score, support) in zip(labels, rows):
            score = ours.by_label[label]
            assert score.precision == pytest.approx(precision, abs=1e-12)
            assert score.recall == pytest.approx(recall, abs=1e-12)
            assert score.f1 == pytest.approx(f1_score, abs=1e-12)
            assert score.support == support
        matrix = sklearn.metrics.confusion_matrix(flat_true, flat, labels=labels)
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
            precision, recall, f1, _ = scores(
                true, predicted, average="micro", zero_division=0, **options
            )
            by_type = zip(*scores(true, predicted, average=None, zero_division=0, **options))
        micro = ours.micro
        assert (micro.precision, micro.recall) == pytest.approx((precision, recall), abs=1e-12)
        assert micro.f1 == pytest.approx(f1, abs=1e-12)
        for score, row in zip(ours.by_type.values(), by_type, strict=True):
            assert (score.precision, score.recall, score.f1) == pytest.approx(row[:3], abs=1e-12)
            assert score.support == row[3]
        compared += PER_CORPUS
    assert compared > 0.9 * SEQUENCES


def test_misaligned_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 true sentences, but 1"):
        entity_scores([["O"], ["O"]], [["O"]])
    with pytest.raises(ValueError, match="sentence 0: 1 true tags, but 2"):
        token_scores([["O"]], [["O", "O"]])
    with pytest.raises(ValueError, match="no words"):
        token_scores([], [])
