"""From text to entities: offsets, windows, streams, and the command line."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import small_checkpoint, write_bio
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import BertForTokenClassification, Tagger, Tokenizer, info
from minibert.files import MinibertError
from minibert.model.labels import best_labels, may_follow
from minibert.speed.cuda import obstacles
from minibert.tagging.evaluate import evaluate
from minibert.tagging.stream import read_ahead
from minibert.tagging.words import Entity, Label, Words, entities, join, split
from minibert.text import labelling
from minibert.text.bio import Sentence, labels_of
from minibert.text.demo import generate

TRAIN, TEST = generate()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    words = sorted({word for sentence in TRAIN for word in sentence.words})[::2]
    sizes = {"labels": labels_of(TRAIN), "max_position_embeddings": 512}
    return small_checkpoint(tmp_path_factory.mktemp("tagger"), words=words, **sizes)


@pytest.fixture(scope="module")
def tagger(directory: Path) -> Tagger:
    return Tagger.from_pretrained(directory, dtype="fp32")


def names(labels: list[Label]) -> list[str]:
    return [label.name for label in labels]


def test_two_thousand_words_get_two_thousand_labels(tagger: Tagger) -> None:
    words = [word for sentence in TRAIN for word in sentence.words][:2000]
    (labels,) = tagger.label([words])
    assert len(labels) == 2000
    assert len(set(names(labels))) > 3
    assert all(0 < label.score <= 1 for label in labels)


def test_a_windowed_text_that_fits_equals_the_unwindowed_one(directory: Path) -> None:
    """Labels of a text equal those of the bare model, also at the exact limit of one window."""
    tagger = Tagger.from_pretrained(directory, dtype="fp32", well_formed=False)
    words = list(TRAIN[0].words)
    sizes = [len(ids) for ids in tagger.tokenizer.pieces([words])[0]]
    ids = [
        tagger.tokenizer.cls_id,
        *(i for word in tagger.tokenizer.pieces([words])[0] for i in word),
        tagger.tokenizer.sep_id,
    ]
    with torch.inference_mode():
        logits = tagger.model(torch.tensor([ids])).logits[0].softmax(-1)
    firsts = [1 + sum(sizes[:i]) for i in range(len(words))]
    (labels,) = tagger.label([words])
    assert names(labels) == [tagger.model.config.labels[logits[f].argmax()] for f in firsts]

    small = Tagger.from_pretrained(directory, dtype="fp32", well_formed=False)
    small.model.config = replace(small.model.config, max_position_embeddings=len(ids))
    assert list(small.label([words])) == [labels]
    small.model.config = replace(small.model.config, max_position_embeddings=len(ids) - 1)
    assert len(next(small.label([words]))) == len(words)


def test_order_and_padding_do_not_change_labels(directory: Path, tagger: Tagger) -> None:
    sentences = [s.words for s in TEST[:120]]
    padding = Tagger.from_pretrained(directory, dtype="fp32", pack=False, batch_tokens=300)
    one_by_one = [next(tagger.label([words])) for words in sentences[:20]]
    packed, padded = list(tagger.label(sentences)), list(padding.label(sentences))
    assert [names(x) for x in packed] == [names(x) for x in padded]
    assert [names(x) for x in packed[:20]] == [names(x) for x in one_by_one]


def test_streaming_reads_no_more_than_a_pool_ahead(tagger: Tagger) -> None:
    read = 0

    def texts():
        nonlocal read
        for _ in range(3000):
            read += 1
            yield "jaws"

    stream = tagger.tag_texts(texts())
    next(stream)
    assert read == 1024


def test_arguments_of_a_call(tagger: Tagger) -> None:
    text, words = "who directed jaws", ["who", "directed", "jaws"]
    one = tagger(text)
    assert all(isinstance(entity, Entity) for entity in one)
    assert list(tagger.tag_words([words])) == [one]
    # In another batch the last bits of a score may differ.
    bare = [entity[:4] for entity in one]
    for several in ([text, "alien"], (text, "alien"), iter([text, "alien"]), ["jaws", text][::-1]):
        assert [entity[:4] for entity in tagger(several)[0]] == bare
    assert len(tagger(["jaws", "alien"])) == 2  # two texts, whatever they contain
    assert tagger("") == tagger([]) == tagger(" \n ") == []
    assert tagger(["", "two words"])[0] == []
    for wrong in ([words], [None], 7):
        with pytest.raises(TypeError):
            tagger(wrong)
    with pytest.raises(TypeError, match="give texts to tag_texts"):
        list(tagger.tag_words([text]))
    with pytest.raises(TypeError, match="call the tagger itself"):
        tagger.tag_texts(text)


@given(st.text(max_size=80))
def test_spans_slice_back_to_words(text: str) -> None:
    words = split(text)
    assert [text[a:b] for a, b in words.spans] == words.words
    assert all(word and not any(c.isspace() for c in word) for word in words.words)
    assert "".join(words.words) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("who directed jaws?", ["who", "directed", "jaws", "?"]),
        ('"the godfather", 1972.', ['"', "the", "godfather", '"', ",", "1972", "."]),
        ("don't  spider-man\tPG-13", ["don't", "spider-man", "PG-13"]),
        ("...", [".", ".", "."]),
    ],
)
def test_words_of_a_text(text: str, expected: list[str]) -> None:
    assert split(text).words == expected


def test_entities_from_labels() -> None:
    words = split("who is the dark knight, really")
    tags = ["O", "O", "B-TITLE", "I-TITLE", "I-TITLE", "I-ACTOR", "B-ACTOR"]
    found = entities(words, [Label(tag, 0.5) for tag in tags])
    assert found == [
        Entity("the dark knight", "TITLE", 7, 22, 0.5),
        Entity(",", "ACTOR", 22, 23, 0.5),
        Entity("really", "ACTOR", 24, 30, 0.5),
    ]
    assert join(["a", "bc"]) == Words("a bc", ["a", "bc"], [(0, 1), (2, 4)])


def test_text_without_words_has_no_entity(directory: Path, tagger: Tagger) -> None:
    """Even where every label is that of an entity."""
    tagger = Tagger.from_pretrained(directory, dtype="fp32", prepack=False)
    entity = tagger.labels.index(next(x for x in tagger.labels if x.startswith("B-")))
    tagger.model.head.classifier.weight.data.zero_()
    tagger.model.head.classifier.bias.data[entity] += 100
    assert [e.text for e in tagger("who")] == ["who"]
    assert tagger(["", " ", "\t\u3000\n"]) == [[], [], []]
    assert list(tagger.tag_words([[], [""], [" ", ""]])) == [[], [], []]
    assert [e.text for e in next(tagger.tag_words([["", "who", ""]]))] == ["who"]


def test_another_models_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    """Tables of embeddings may have rows to spare: they are padded to round sizes."""
    tagger = Tagger.from_pretrained(directory, prepack=False)
    pieces = tagger.tokenizer.vocab_size
    for V, fits in (
        (pieces - 1, False),
        (pieces, True),
        (pieces + 127, True),
        (pieces + 512, False),
    ):
        tagger.model.config = replace(tagger.model.config, vocab_size=V, pad_token_id=0)
        if fits:
            Tagger(tagger.model, tagger.tokenizer)
            continue
        with pytest.raises(MinibertError, match=f"has {pieces} pieces, but the model embeds {V}"):
            Tagger(tagger.model, tagger.tokenizer)
    tagger.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(
        MinibertError, match=r"do_lower_case is False, but tokenizer.json says True"
    ):
        Tokenizer.from_pretrained(tmp_path)


def test_evaluation_agrees_with_labels(tagger: Tagger) -> None:
    report = evaluate(tagger, TEST[:50], "demo")
    predicted = [names(x) for x in tagger.label(s.words for s in TEST[:50])]
    right = sum(a == b for s, p in zip(TEST, predicted) for a, b in zip(s.tags, p))
    words = sum(len(s.words) for s in TEST[:50])
    assert report.token.micro_with_o == right / words
    assert "entity F1 (seqeval default, conlleval)" in report.table()
    assert "true type          words   right  taken for" in report.table()
    assert max(map(len, report.table().splitlines())) <= 80


def test_the_table_names_types_in_full() -> None:
    class Confused:
        labels = ("O", "B-RATING", "B-RATINGS_AVERAGE")

        def label(self, sentences):
            names = ["B-RATINGS_AVERAGE", "O", "B-RATING", "O"]
            return iter([[Label(name, 1.0) for name in names] for _ in sentences])

    true = Sentence(("a", "b", "c", "d"), ("B-RATING", "B-RATING", "B-RATING", "O"))
    lines = evaluate(Confused(), [true], "demo").table().splitlines()
    assert lines[-3:] == [
        "true type          words   right  taken for",
        "RATING                 3       1  RATINGS_AVERAGE 1, O 1",
        "O                      1       1",
    ]


def test_models_that_cannot_tag_are_refused(directory: Path, minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(MinibertError, match=r"has no trained classifier\.weight: train it first"):
        Tagger.from_pretrained(minilm)
    with pytest.raises(MinibertError, match="neither a directory nor a known"):
        Tagger.from_pretrained(tmp_path / "none")
    model = BertForTokenClassification.from_pretrained(minilm, num_labels=2)
    tokenizer = Tokenizer.from_pretrained(minilm)
    with pytest.raises(MinibertError, match=r"config\.json: LABEL_0, LABEL_1: no O among"):
        Tagger(model, tokenizer)


# The command line


def test_tag_prints_text_and_json(directory: Path, tagger: Tagger, command) -> None:
    text = "who directed the frozen station"
    status, out, _ = command("tag", directory, text, "--dtype", "fp32", "--json")
    assert status == 0
    entities = [entity._asdict() for entity in tagger(text)]
    found = json.loads(out)
    assert found["text"] == text
    assert [(e["text"], e["start"]) for e in found["entities"]] == [
        (e["text"], e["start"]) for e in entities
    ]
    status, out, _ = command("tag", directory, "who", "directed", "the", "frozen", "station")
    assert status == 0
    for entity in entities:
        assert f"[{entity['text']} {entity['type']} " in out
    scores = sorted(entity["score"] for entity in entities)
    least = ("--json", "--dtype", "fp32", "--min-score", scores[1])
    _, out, _ = command("tag", directory, text, *least)
    assert sorted(e["score"] for e in json.loads(out)["entities"]) == scores[1:]
    for no_score in ("1.5", "nan"):
        status, _, error = command("tag", directory, text, "--min-score", no_score)
        assert status == 2
        assert f"--min-score: {no_score} is no probability" in error


@pytest.mark.parametrize(
    "name", ["tag", "trace", "evaluate", pytest.param("parity", marks=[pytest.mark.slow])]
)
def test_commands_take_a_run(name: str, directory: Path, tmp_path: Path, command: Callable) -> None:
    shutil.copytree(directory, tmp_path / "run" / "last")
    what = write_bio(tmp_path / "test.bio", TEST[:2]) if name == "evaluate" else "jaws"
    status, _, error = command(name, tmp_path / "run", what)
    assert status == 0
    assert f"run: a run's directory: taking {tmp_path / 'run' / 'last'}\n" in error


def test_text_may_follow_options(directory: Path, command, capsys) -> None:
    text = ("who directed", "the frozen station")
    before = command("tag", directory, *text, "--dtype", "fp32")
    assert command("tag", directory, "--dtype", "fp32", *text) == before
    assert before[0] == 0
    with pytest.raises(SystemExit, match="2"):
        command("tag", directory, "jaws", "--dtpye", "fp32")
    assert "unrecognized arguments: --dtpye" in capsys.readouterr().err


def test_a_line_of_standard_input_that_is_not_utf8(directory: Path, command, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\nbad \xff\n")))
    status, _, err = command("tag", directory)
    assert status == 2
    assert err == "minibert: standard input:2: byte 0xff is not UTF-8: convert it first\n"


def test_evaluate_prints_table_and_json(directory: Path, command, tmp_path: Path) -> None:
    path = write_bio(tmp_path / "test.bio", TEST[:20])
    status, out, _ = command("evaluate", directory, path, "--json", "--dtype", "fp32")
    assert status == 0
    numbers = json.loads(out)
    assert numbers["sentences"] == 20
    assert 0 <= numbers["entity_f1"] <= 1
    status, out, _ = command("evaluate", directory, path, "--dtype", "fp32", "--padded", "--plain")
    assert f"entity F1 (seqeval default, conlleval)   {numbers['entity_f1']:8.2%}" in out


def test_evaluate_leaves_out_what_tag_leaves_out(
    directory: Path, tagger: Tagger, command, tmp_path: Path
) -> None:
    path = write_bio(tmp_path / "test.bio", TEST[:20])
    texts = [" ".join(sentence.words) for sentence in TEST[:20]]
    scores = sorted(entity.score for text in texts for entity in tagger(text))
    least = scores[len(scores) // 2]
    for min_score in (0.0, least, 1.0):
        _, out, _ = command(
            "evaluate", directory, path, "--json", "--dtype", "fp32", "--min-score", min_score
        )
        confusion = json.loads(out)["confusion"]
        begun = sum(
            row[label] for row in confusion.values() for label in row if label.startswith("B-")
        )
        assert begun == sum(score >= min_score for score in scores)


def test_an_entity_below_the_least_score_becomes_o() -> None:
    sentence = [Label("B-A", 0.9), Label("I-A", 0.3), Label("B-A", 0.5), Label("O", 0.1)]
    assert labelling.names(sentence) == ["B-A", "I-A", "B-A", "O"]
    assert labelling.names(sentence, 0.55) == ["B-A", "I-A", "O", "O"]
    assert labelling.names(sentence, 0.61) == ["O"] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tag", "nowhere", "hello"), "nowhere: neither a directory nor a known model"),
        (("tag", "{dir}", "hello", "--device", "warp"), "device 'warp'"),
        (
            ("tag", "{dir}", "hello", "--device", "cpu", "--attn", "fused"),
            "fused attention needs a CUDA device, not cpu: use attn_implementation='sdpa'",
        ),
        (("tag", "{dir}", "caf\udce9"), "argument: character 4 is not UTF-8"),
        (("evaluate", "{dir}", "nowhere.bio"), "nowhere.bio: cannot be read"),
        (("evaluate", "{dir}", "{dir}"), "cannot be read (Is a directory)"),
        (("evaluate", "{dir}", "{tmp}/label.bio"), "label.bio:2: the model has no label B-DOG"),
        (
            ("download", "robert"),
            "robert: not known, did you mean roberta-base: give one of bert-base-cased",
        ),
        (("verify", "robert", "{dir}"), "robert: not a known model"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    directory: Path, tmp_path: Path, refused, arguments: tuple, message: str
) -> None:
    (tmp_path / "label.bio").write_text("O\ta\nB-DOG\trex\n")
    assert message in refused(*(a.format(dir=directory, tmp=tmp_path) for a in arguments))


def test_verify_fails_for_other_weights(directory: Path, minilm: Path, command) -> None:
    status, out, _ = command("verify", "minilm", directory)
    assert status == 1
    assert out.endswith("FAIL\n")
    status, out, _ = command("verify", "minilm", minilm)
    assert status == 0
    assert out.endswith("PASS\n")


def test_info_reports_what_auto_chooses(command) -> None:
    status, out, _ = command("info")
    assert status == 0
    lines = ("auto dtype", "auto attn", "torch", "cpu dtype", "eager, sdpa, fused", "fused fp16")
    lines += ("compiler     NVRTC", "TFLOP/s in")
    assert all(line in out for line in lines)


def test_info_tries_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that refuses one binary."""
    refused = "a first launch fails (CUDAError: no image)"
    monkeypatch.setattr(obstacles, "attention", lambda _, __, size, p: refused if p else None)
    monkeypatch.setattr(obstacles, "norm", lambda *_: None)
    monkeypatch.setattr(obstacles, "adamw", lambda *_: None)
    found = [": ".join(line) for line in info._kernels(torch.device("cuda"))]
    assert len(found) == 4 + 2 + 3
    assert sum("with dropout: a first launch fails" in line for line in found) == 2
    assert sum("works, equal to float64" in line for line in found) == 7


# Decoding


def well_formed(tags: list[str]) -> bool:
    return all(may_follow(b, a) for a, b in zip(["O", *tags], tags))


@settings(max_examples=100)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_decoding_finds_the_best_well_formed_labels(words: int, seed: int) -> None:
    """Against an exhaustive search."""
    labels = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    draw = torch.Generator().manual_seed(seed)
    logp_WL = torch.randn(words, 5, generator=draw).log_softmax(-1)

    def score(ids: Sequence[int]) -> float:
        return sum(logp_WL[w, i].item() for w, i in enumerate(ids))

    ids = best_labels(logp_WL, labels)
    assert well_formed([labels[i] for i in ids])
    paths = itertools.product(range(5), repeat=words)
    best = max(score(path) for path in paths if well_formed([labels[i] for i in path]))
    assert score(ids) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_read_ahead_keeps_order_and_depth(depth: int) -> None:
    happened: list[str] = []

    def ask(number: int) -> Callable[[], int]:
        happened.append(f"ask {number}")
        return lambda: happened.append(f"read {number}") or number

    assert list(read_ahead(map(ask, range(5)), depth)) == [0, 1, 2, 3, 4]
    for number in range(5):
        asked_before = happened[: happened.index(f"read {number}")]
        assert sum(x.startswith("ask") for x in asked_before) == min(5, number + 1 + depth)


def test_pools_started_ahead_give_the_same(tagger: Tagger, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a pool is computed while the one before it is decoded."""
    texts = [" ".join(s.words) for s in TEST[:40]]
    monkeypatch.setattr("minibert.tagging.stream.POOL", 7)
    assert tagger.depth == 0
    expected = list(tagger.tag_texts(texts))
    labels = list(tagger.label([text.split() for text in texts]))
    monkeypatch.setattr(Tagger, "depth", 1)
    assert list(tagger.tag_texts(texts)) == expected
    assert list(tagger.label([text.split() for text in texts])) == labels
    assert list(tagger.tag_texts([])) == []


def test_without_well_formed_every_label_is_the_argmax(directory: Path) -> None:
    alone = Tagger.from_pretrained(directory, dtype="fp32", well_formed=False)
    best = Tagger.from_pretrained(directory, dtype="fp32")
    sentences = [s.words for s in TEST[:50]]
    found = [names(x) for x in alone.label(sentences)]
    fitting = [names(x) for x in best.label(sentences)]
    assert found != fitting, "the untrained head must predict something ill-formed"
    assert all(map(well_formed, fitting))
    for tags, fit in zip(found, fitting):
        if well_formed(tags):
            assert tags == fit


def test_a_type_without_b_begins_with_i() -> None:
    labels = ["O", "I-X", "B-Y", "I-Y"]
    assert may_follow("I-X", "O", labels)
    assert not may_follow("I-Y", "O", labels)
    assert not may_follow("I-X", "O")
    score_WL = torch.tensor([[0.0, 9, 1, 2], [0, 9, 1, 2], [0, 1, 4, 5], [0, 1, 4, 5]])
    tags = [labels[i] for i in best_labels(score_WL.log_softmax(-1), labels)]
    assert tags == ["I-X", "I-X", "B-Y", "I-Y"]
    assert best_labels(torch.tensor([[1.0, 0], [0, 1]]).log_softmax(-1), ["I-X", "I-Y"]) == [0, 1]
