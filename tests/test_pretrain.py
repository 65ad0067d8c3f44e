"""Masked-LM training: what is hidden, what is measured, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import PIECES, small_bert, small_checkpoint, write_bio
from training_runs import Run, assert_same_tree, tiny_model

from minibert import BertForMaskedLM, BertForTokenClassification, Tokenizer
from minibert.text import demo
from minibert.text.batches import Batch, Example, examples_of, packed, padded
from minibert.text.bio import labels_of
from minibert.text.masking import mask, tags_of, units_of
from minibert.training.pretrain import HiddenWordsModel, measure

MASK, SIZE = PIECES.index("[MASK]"), len(PIECES)
SPECIAL = range(5)
SENTENCES = 5000  # of 200 pieces: 10^6 draws
SIGMAS = 5.0  # a sound generator fails one such check in 1.7 million


@pytest.fixture(scope="module")
def plain() -> list[Example]:
    """Sentences of random letters, [CLS] and [SEP] around them."""
    ids_BS = torch.randint(5, SIZE, (SENTENCES, 202), generator=torch.Generator().manual_seed(0))
    ids_BS[:, 0], ids_BS[:, -1] = 2, 3
    firsts = tuple(range(1, 201))
    return [Example(tuple(ids), firsts, i, 0) for i, ids in enumerate(ids_BS.tolist())]


def hidden(examples: list[Example], epoch: int) -> list[Example]:
    return [
        mask(example, units_of(example, SPECIAL, None), MASK, SIZE, 7, epoch, i)
        for i, example in enumerate(examples)
    ]


def within(count: float, draws: int, probability: float, sources: int = 1) -> bool:
    """Whether a count is as near its expectation as a binomial one is but once in 1.7 million."""
    sigma = math.sqrt(sources * draws * probability * (1 - probability))
    return abs(count - (draws * probability if sources == 1 else 0)) <= SIGMAS * sigma


# What a piece can become: [MASK], itself or another. A random piece can be either of the first two.
FATES = {
    "mask": 0.15 * (0.8 + 0.1 / SIZE),
    "same": 0.15 * (0.1 + 0.1 / SIZE),
    "other": 0.15 * 0.1 * (SIZE - 2) / SIZE,
}


def fates(ids: tuple[int, ...], labels: dict[int, int]) -> Counter[str]:
    names = {MASK: "mask"}
    return Counter(
        names.get(ids[i], "same" if ids[i] == label else "other") for i, label in labels.items()
    )


def test_masks_are_those_of_transformers_collator_in_distribution(
    plain: list[Example], tmp_path: Path
) -> None:
    """A million draws each: every share within five standard deviations, ours, theirs, and ours
    minus theirs."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(small_checkpoint(tmp_path / "model"))
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    torch.manual_seed(1)
    special = [1, *[0] * 200, 1]
    batch = collator([{"input_ids": list(e.ids), "special_tokens_mask": special} for e in plain])
    theirs: Counter[str] = Counter()
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        theirs += fates(tuple(ids), {i: label for i, label in enumerate(labels) if label != -100})
    ours: Counter[str] = Counter()
    examples = hidden(plain, epoch=1)
    for example in examples:
        ours += fates(example.ids, dict(zip(example.firsts, example.labels)))

    draws = SENTENCES * 200
    assert ours.keys() == theirs.keys() == FATES.keys()
    for name, probability in FATES.items():
        assert within(ours[name], draws, probability), (name, ours[name])
        assert within(theirs[name], draws, probability), (name, theirs[name])
        assert within(ours[name] - theirs[name], draws, probability, sources=2), name

    # Independent from piece to piece: the number hidden in a sentence has a binomial's variance,
    # whose estimate from n sentences deviates by about its sqrt(2 / n).
    counts = torch.tensor([len(example.firsts) for example in examples], dtype=torch.float64)
    expected = 200 * 0.15 * 0.85
    assert abs(counts.var() - expected) < SIGMAS * expected * math.sqrt(2 / SENTENCES)
    # Every place is hidden as often, and random pieces come from the whole vocabulary.
    places = Counter(i for example in examples for i in example.firsts)
    assert places.keys() == set(range(1, 201))
    assert all(within(count, SENTENCES, 0.15) for count in places.values())
    random_ids = Counter(
        e.ids[i] for e in examples for i, x in zip(e.firsts, e.labels) if e.ids[i] not in (MASK, x)
    )
    assert random_ids.keys() == set(range(SIZE)) - {MASK}
    # From one epoch to the next: another mask, which hides 15 % of the same pieces.
    again = sum(
        len(set(a.firsts) & set(b.firsts)) for a, b in zip(examples, hidden(plain, epoch=2))
    )
    assert within(again, draws, 0.15**2)


def test_a_mask_is_a_pure_function(plain: list[Example]) -> None:
    assert hidden(plain[:50], 3) == hidden(plain[:50], 3)
    for example, masked in zip(plain[:50], hidden(plain[:50], 3)):
        restored = list(masked.ids)
        for i, label in zip(masked.firsts, masked.labels):
            restored[i] = label
        assert tuple(restored) == example.ids


def test_a_short_sentence_hides_at_least_one_piece() -> None:
    example = Example((2, 9, 3), (1,), 0, 0)
    for i in range(50):
        assert mask(example, [(1,)], MASK, SIZE, 0, 1, i).labels == (9,)


def test_entities_are_hidden_as_wholes(tmp_path: Path) -> None:
    """Also in the second window of a long sentence; special pieces are never hidden."""
    tokenizer = Tokenizer.from_pretrained(small_checkpoint(tmp_path / "model"))
    words = ["see", "ab", "cd", "電", "x"] * 6
    tags = ["O", "B-X", "I-X", "I-X", "B-Y"] * 6
    examples = examples_of([words], tokenizer, 24, stride=0)
    assert len(examples) > 1
    never = {tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id}
    sizes: Counter[int] = Counter()
    for example in examples:
        units = units_of(example, never, tags)
        sizes += Counter(map(len, units))
        shown = [tokenizer.backend.id_to_token(i) for i in example.ids]
        assert {i for unit in units for i in unit} == {
            i for i, piece in enumerate(shown) if not piece.startswith("[")
        }
        for number in range(100):
            masked = set(mask(example, units, MASK, SIZE, 0, 1, number).firsts)
            assert all(masked >= set(unit) or not masked & set(unit) for unit in units)
    assert sizes[4] >= 5, "ab cd without the unknown 電"
    assert set(sizes) <= {1, 2, 4}, "an entity that a window cuts is two"


def test_phrases_are_found_from_the_left_the_longest_first() -> None:
    phrases = {("new", "york"), ("new", "york", "times"), ("times",)}
    words = ["The", "New", "York", "Times", "of", "new", "york", "new"]
    assert tags_of(words, phrases) == (
        *("O", "B-PHRASE", "I-PHRASE", "I-PHRASE", "O", "B-PHRASE", "I-PHRASE", "O"),
    )
    assert tags_of(words, set()) == ("O",) * 8


@pytest.mark.parametrize("collate", [packed, lambda examples: padded(examples, 0)])
def test_hidden_pieces_alone_give_the_loss_and_the_gradients(
    plain: list[Example], collate: Callable[[list[Example]], Batch]
) -> None:
    """Those of the model that scores every piece, dropout included."""
    models = [small_bert(kind, max_position_embeddings=202).double().train()
              for kind in (BertForMaskedLM, HiddenWordsModel)]  # fmt: skip
    found = []
    for model in models:
        torch.manual_seed(0)
        output = model(**collate(hidden(plain[:40], 1)).inputs)
        output.loss.backward()
        found.append([output.loss, *(p.grad for p in model.parameters())])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_what_is_measured_is_the_loss_of_the_model(plain: list[Example]) -> None:
    examples = hidden(plain[:40], 1)
    batch = packed(examples)
    with torch.no_grad():
        output = small_bert(BertForMaskedLM, max_position_embeddings=202).double()(**batch.inputs)
    model = small_bert(HiddenWordsModel, max_position_embeddings=202).double()
    found = measure(model, examples)
    assert found["masked_loss"] == pytest.approx(float(output.loss), abs=1e-10)
    right = output.logits.argmax(-1) == batch.inputs["labels"]
    assert found["masked_accuracy"] == int(right.sum()) / sum(len(e.firsts) for e in examples)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A tiny model, texts and phrases."""
    folder = tmp_path_factory.mktemp("files")
    train, held_out = demo.generate()
    tiny_model(folder / "model", train[:60] + held_out[:12])
    write_bio(folder / "train.bio", train[:60])
    # Twelve sentences again and again: something that a tiny model learns in seconds.
    for name, times in (("few", 10), ("few-dev", 5)):
        lines = [" ".join(sentence.words) for sentence in train[:12]] * times
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    (folder / "phrases.txt").write_text("who directed\nstarring in\n")
    return folder


def run(files: Path, output: Path, *more: object, fatal: tuple[str, int] | None = None) -> Run:
    arguments = ["pretrain", "--model", files / "model", "--device", "cpu", "--output", output]
    arguments += ["--epochs", "2", "--batch-size", "8", "--checkpoint-every", "2", *more]
    return Run(arguments, output.with_name(f"{output.name}.txt"), fatal)


def finished(files: Path, output: Path, *more: object) -> str:
    ran = run(files, output, *more)
    assert ran.wait() == 0, ran.text()
    return ran.text()


def test_killed_runs_end_in_the_same_bytes(files: Path, tmp_path: Path) -> None:
    """Also the masks of the epoch in which it was killed."""
    arguments = ("--bio", files / "train.bio", "--dev", "0.2", "--masking", "whole")
    arguments += ("--average", "1", "--seed", "5")
    finished(files, tmp_path / "whole", *arguments)
    chance = random.Random(0)
    kills = 0
    while kills < 4 or (tmp_path / "killed").exists():
        fatal = (("disk", "checkpoint")[kills % 2], chance.randint(1, 20)) if kills < 4 else None
        ran = run(files, tmp_path / "killed", *arguments, "--resume", fatal=fatal)
        if ran.wait() == -signal.SIGKILL:
            kills += 1
            continue
        assert ran.process.exitcode == 0, ran.text()
        assert_same_tree(tmp_path / "killed", tmp_path / "whole")
        shutil.rmtree(tmp_path / "killed")
    for changes, message in (
        (("--seed", "6"), "seed was 5 and is 6"),
        (("--masking", "static"), "masking was whole and is static"),
        (("--from-scratch",), "weights was not given and is from scratch"),
    ):
        other = run(files, tmp_path / "whole", *arguments, *changes, "--resume")
        assert other.wait() == 2
        assert message in other.text()


@pytest.mark.parametrize(
    "masking", ["dynamic", *(pytest.param(m, marks=pytest.mark.slow) for m in ("static", "whole"))]
)
def test_text_is_learned_and_the_model_goes_on(files: Path, tmp_path: Path, masking: str) -> None:
    """From scratch, on lines of text; the model that is saved is fine-tuned and opened by
    transformers."""
    import transformers

    output = tmp_path / "language"
    text = finished(
        *(files, output, "--text", files / "few.txt", "--dev", files / "few-dev.txt"),
        *("--phrases", files / "phrases.txt", "--masking", masking, "--from-scratch"),
        *("--epochs", "10", "--lr", "0.01", "--dtype", "fp32"),
    )
    assert "epoch 10, dev: masked-LM loss" in text
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    scores = [entry for entry in log if entry.get("set") == "dev"]
    assert [entry["epoch"] for entry in scores] == list(range(1, 11))
    assert scores[-1]["masked_loss"] < 0.75 * scores[0]["masked_loss"]
    assert scores[-1]["masked_accuracy"] > scores[0]["masked_accuracy"]
    report = json.loads((output / "report.json").read_text())
    assert report["masked_loss"] == scores[-1]["masked_loss"]
    assert {path.name for path in output.iterdir()} == {
        *("finished.json", "last", "loss.png", "metrics.jsonl", "report.json")
    }
    if masking != "dynamic":
        return
    ours = BertForMaskedLM.from_pretrained(output / "last")
    theirs = transformers.BertForMaskedLM.from_pretrained(output / "last").eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    tuned = BertForTokenClassification.from_pretrained(
        output / "last", labels=labels_of(demo.generate()[0]), seed=0
    )
    for name, parameter in ours.bert.named_parameters():
        assert torch.equal(parameter, tuned.bert.get_parameter(name))
    fine = Run(
        [
            *("--model", output / "last", "--train", files / "train.bio", "--epochs", "1"),
            *("--device", "cpu", "--output", tmp_path / "tuned"),
        ],
        tmp_path / "tuned.txt",
    )
    assert fine.wait() == 0, fine.text()
    assert "newly initialised: classifier.weight, classifier.bias" in fine.text()


def test_bad_input_is_said_before_anything_is_written(files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "foreign.txt").write_text("電 影\n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    lines = ("--text", files / "few.txt")
    for arguments, message in (
        (("--text", tmp_path / "none.txt"), "none.txt: cannot be read"),
        (("--text", tmp_path / "empty.txt"), "empty.txt: no words in it"),
        (("--text", tmp_path / "foreign.txt"), "foreign.txt: no word of it is in the vocabulary"),
        (("--text", tmp_path / "latin.txt"), "latin.txt:2: byte 0xe9 is not UTF-8"),
        ((*lines, "--dev", "2"), "--dev 2: neither a file nor a share"),
        ((*lines, "--masking", "whole"), "--masking whole needs --bio, or --text with --phrases"),
        ((*lines, "--masking", "some"), "masking must be one of static, dynamic, whole"),
        (("--phrases", files / "phrases.txt", "--bio", files / "train.bio"), "goes with --text"),
        ((), "one of the arguments --text --bio is required"),
    ):
        ran = run(files, tmp_path / "out", *arguments)
        assert ran.wait() == 2, ran.text()
        assert message in ran.text()
        assert "Traceback" not in ran.text()
        assert not (tmp_path / "out").exists()
