"""The cost of an entity: what it does to a model and to a run."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from builders import small_bert
from safetensors.torch import load_file
from training_runs import Run, demo_files

from minibert import Tagger
from minibert.tagging.evaluate import evaluate
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
    with suppress(OSError), charged(model.head, 1.25):
        torch.testing.assert_close(model(ids).logits, plain - 1.25 * BEGINS)
        raise OSError
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def test_a_run_scores_and_saves_with_it_and_trains_as_without(tmp_path: Path) -> None:
    """To the bit: the weights differ in the bias of the labels that begin an entity alone."""
    train_file, dev_file = demo_files(tmp_path)
    dev = read_bio(dev_file)
    weights, losses, found = [], [], []
    for cost in ("0", "1.5"):
        output = tmp_path / cost
        flags = ("--model", tmp_path / "model", "--train", train_file, "--dev", dev_file)
        flags += ("--epochs", "10", "--lr", "1e-2", "--batch-size", "8", "--device", "cpu")
        run = Run([*flags, "--entity-cost", cost, "--output", output], tmp_path / "log.txt")
        assert run.wait() == 0, run.text()
        weights.append(load_file(output / "last" / "model.safetensors"))
        log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
        tagger = Tagger.from_pretrained(output / "last", dtype="fp32", prepack=False)
        found.append(sum(map(len, tagger.tag_words([sentence.words for sentence in dev]))))
        scores = [entry["entity_f1"] for entry in log if "entity_f1" in entry]
        assert scores[-1] == evaluate(tagger, dev, dev_file).entity.micro.f1
        best = Tagger.from_pretrained(output / "best", dtype="fp32", prepack=False)
        assert max(scores) == evaluate(best, dev, dev_file).entity.micro.f1
    assert losses[0] == losses[1]
    assert len(losses[0]) == 80
    assert 0 < found[1] < found[0]
    begins_L = torch.tensor([label.startswith("B-") for label in tagger.labels])
    weights[0]["classifier.bias"] -= 1.5 * begins_L
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
