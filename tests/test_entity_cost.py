"""The cost of an entity: what it does to a model, to a run, and to what is decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import small_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_runs import Run, demo_files

from minibert import Tagger
from minibert.model.labels import best_labels
from minibert.text.bio import read_bio
from minibert.training.entity_cost import charged

LABELS = ("O", "B-X", "I-X", "B-Y", "I-Y")
BEGINS = torch.tensor([0.0, 1, 0, 1, 0])


@pytest.mark.parametrize("head", ["linear", "crf"])
def test_only_labels_that_begin_an_entity_lose_it_and_only_inside(head: str) -> None:
    model = small_bert(labels=LABELS, head=head)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.tensor([[2, 7, 9, 3]])
    plain = model(ids).logits
    with charged(model.head, 1.25):
        torch.testing.assert_close(model(ids).logits, plain - 1.25 * BEGINS)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


@settings(max_examples=100)
@given(st.integers(1, 8), st.integers(0, 2**31), st.floats(0, 4), st.floats(0, 4))
def test_a_higher_cost_never_gives_more_entities(
    words: int, seed: int, cost: float, more: float
) -> None:
    """And the sequence is the best one by its log-probability less the cost of its entities."""
    scores_WL = 3 * torch.randn(words, 5, generator=torch.Generator().manual_seed(seed)).double()

    def decoded(cost: float) -> tuple[int, float]:
        ids = best_labels((scores_WL - cost * BEGINS).log_softmax(-1), LABELS)
        return int(BEGINS[ids].sum()), float(scores_WL[range(words), ids].sum())

    (few, low), (many, high) = decoded(cost + more), decoded(cost)
    assert few <= many
    assert high - cost * many >= low - cost * few - 1e-9


@pytest.mark.parametrize("average", ["1", "inf"])
def test_a_run_saves_it_and_trains_as_without(tmp_path: Path, average: str) -> None:
    """To the bit, with the average of the weights and without."""
    train_file, test_file = demo_files(tmp_path)
    words = [sentence.words for sentence in read_bio(test_file)]
    weights, logs, found = [], [], []
    for cost in ("0", "1.5"):
        output = tmp_path / cost
        flags = ("--model", tmp_path / "model", "--train", train_file, "--test", test_file)
        flags += ("--epochs", "10", "--lr", "1e-2", "--batch-size", "8", "--device", "cpu")
        flags += ("--average", average, "--entity-cost", cost, "--output", output)
        run = Run(list(flags), tmp_path / "log.txt")
        assert run.wait() == 0, run.text()
        weights.append(load_file(output / "last" / "model.safetensors"))
        log = (output / "metrics.jsonl").read_text().splitlines()
        logs.append([entry for entry in log if '"loss"' in entry])
        tagger = Tagger.from_pretrained(output, dtype="fp32", prepack=False)
        found.append(sum(map(len, tagger.tag_words(words))))
    assert logs[0] == logs[1]
    assert len(logs[0]) == 80
    assert 0 < found[1] < found[0]
    begins_L = torch.tensor([label.startswith("B-") for label in tagger.labels])
    weights[0]["classifier.bias"] -= 1.5 * begins_L
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
