"""Tagging schemes and file formats: what others write is read as the same entities, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from builders import save, small_bert
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from minibert import Tagger
from minibert.files import MinibertError
from minibert.model.labels import best_labels
from minibert.tagging.convert import sentences_of
from minibert.text.bio import Sentence, read_bio
from minibert.text.metrics import lenient_entities
from minibert.text.schemes import scheme_of, to_bio

BIO = ["O", "B-X", "I-X", "I-X", "B-X", "O", "B-Y"]  # XXX X, and Y
SAME = {  # the same sentence in every scheme that can tell neighbours apart
    "BIO": BIO,
    "IOB1": ["O", "I-X", "I-X", "I-X", "B-X", "O", "I-Y"],
    "BIOES": ["O", "B-X", "I-X", "E-X", "S-X", "O", "S-Y"],
    "BILOU": ["O", "B-X", "I-X", "L-X", "U-X", "O", "U-Y"],
}
APART = ["O", "B-X", "I-X", "I-X", "O", "B-Y", "I-Y"]
ALIKE = {"IO": ["O", "I-X", "I-X", "I-X", "O", "I-Y", "I-Y"], "plain names": [*"OXXXOYY"]}
LABELS = {
    "BIO": ("O", "B-X", "I-X", "B-Y", "I-Y"),
    "IOB1": ("B-X", "I-X", "I-Y", "O"),
    "IO": ("I-X", "O", "I-Y"),
    "BIOES": ("O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "E-Y", "S-Y"),
    "BILOU": ("O", "B-X", "I-X", "L-X", "U-X", "B-Y", "I-Y", "L-Y", "U-Y"),
    "plain names": ("O", "X", "Y"),
}
WORDS = "abcdefg"


def test_every_scheme_is_recognised_and_read() -> None:
    for scheme, labels in LABELS.items():
        assert scheme_of(labels, "here") == scheme
    assert [to_bio(tags) for tags in SAME.values()] == [BIO] * 4
    assert [to_bio(tags) for tags in ALIKE.values()] == [APART] * 2
    assert scheme_of(("B-X", "O"), "here") == "BIO"
    assert scheme_of(("O", "INGREDIENT", "ELEMENT"), "here") == "plain names"


@pytest.mark.parametrize("scheme", ["IOB1", "BIOES", "plain names"])
@given(data=st.data())
def test_any_sequence_holds_the_entities_that_seqeval_finds(scheme: str, data) -> None:
    tags = data.draw(st.lists(st.sampled_from(LABELS[scheme]), max_size=8))
    prefixed = [tag if tag == "O" or "-" in tag else f"I-{tag}" for tag in tags]
    theirs = [(type_, first, last + 1) for type_, first, last in get_entities(prefixed)]
    assert list(lenient_entities(to_bio(tags))) == theirs


def written(scheme: str, spans: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """The tags of pieces of a sentence, (type or O, words), in a scheme."""
    single, last = {"BIOES": "SE", "BILOU": "UL", "BIO": "BI"}[scheme]
    tags: list[str] = []
    for type_, length in spans:
        inner = ["B", *"I" * (length - 2), last] if length > 1 else [single]
        tags += ["O"] * length if type_ == "O" else [f"{letter}-{type_}" for letter in inner]
    return tuple(tags)


def pieces_of(words: int) -> Iterator[list[tuple[str, int]]]:
    """Every way to cut a sentence into entities of two types and single words O."""
    if not words:
        yield []
    for length in range(1, words + 1):
        for type_ in "OXY" if length == 1 else "XY":
            yield from ([(type_, length), *rest] for rest in pieces_of(words - length))


@pytest.mark.parametrize("scheme", ["BIO", "BIOES", "BILOU"])
@given(words=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_the_best_sequence_is_one_that_the_scheme_can_write(
    scheme: str, words: int, seed: int
) -> None:
    names = LABELS[scheme]
    draw = torch.Generator().manual_seed(seed)
    logp_WL = (3 * torch.randn(words, len(names), generator=draw)).log_softmax(-1)
    allowed = {written(scheme, spans) for spans in pieces_of(words)}
    ids = torch.tensor([[names.index(tag) for tag in tags] for tags in allowed])
    total = logp_WL[range(words), ids].sum(1)
    assert best_labels(logp_WL, names) == ids[total.argmax()].tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("LABEL_0", "LABEL_1"), "LABEL_0, LABEL_1: no O among the tags"),
        (("O", "LABEL_1"), "'LABEL_1': neither O, B-TYPE"),
        (("NN", "VB", "DT"), "NN, VB, DT: no O among the tags"),
        (("O", "B_PER", "I_PER"), "'B_PER': neither O, B-TYPE or I-TYPE"),
        (("O", "PER-B"), "'PER-B': neither"),
        (("O", "B-X", "PER"), "'PER': not a tag of BIO, unlike B-X"),
        (("O", "S-X", "U-X"), "of BIOES and of BILOU"),
    ],
)
def test_other_schemes_are_refused_by_name(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(MinibertError, match="here: ") as raised:
        scheme_of(labels, "here")
    assert message in str(raised.value)


@pytest.fixture(params=LABELS)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_model_of_any_scheme_finds_the_same(scheme: str, tmp_path: Path) -> None:
    """The scores are set: word i gets the tag that the sentence has at i in that scheme."""
    labels, tags = LABELS[scheme], (SAME | ALIKE)[scheme]
    save(small_bert(labels=labels), tmp_path)
    tagger = Tagger.from_pretrained(tmp_path, dtype="fp32")
    scores_WL = torch.full((len(tags), len(labels)), -9.0)
    for row, tag in zip(scores_WL, tags):
        row[labels.index(tag)] = 0
    found = [label.name for label in tagger._decode(scores_WL)]
    assert found == (BIO if scheme in SAME else APART)
    assert set(found) <= set(tagger.labels)
    assert set(tagger.labels) == {"O", "B-X", "I-X", "B-Y", "I-Y"}
    assert tagger("abc def") == next(tagger.tag_texts(["abc def"]))


def columns(tags: list[str], row: str = "{w}\t{t}\n") -> str:
    return "".join(row.format(i=i, w=w, t=t) for i, (w, t) in enumerate(zip(WORDS, tags), 1))


NAMES = ["O", "B-X", "I-X", "B-Y"]
SPANS = [(2, 7, "X"), (8, 9, "X"), (12, 13, "Y")]  # in "a b c d e f g"
JSON = {
    "datasets": {"tokens": [*WORDS], "ner_tags": BIO},
    "numbers": {"id": "0", "tokens": [*WORDS], "ner_tags": [NAMES.index(tag) for tag in BIO]},
    "prodigy": {
        "text": " ".join(WORDS),
        "tokens": [{"text": "a", "start": 0}],
        "spans": [{"start": a, "end": b, "label": label} for a, b, label in SPANS],
        "answer": "accept",
    },
    "spacy": [" ".join(WORDS), {"entities": SPANS}],
    "doccano": {"text": " ".join(WORDS), "label": SPANS[::-1]},
}


@pytest.mark.parametrize(
    "text",
    [
        *(columns(tags) for tags in SAME.values()),
        columns(SAME["BIOES"], "{w} NN B-NP {t}\n"),
        columns(BIO, "{i}\t{w}\t{t}\n"),
        "token\tlabel\n" + columns(SAME["IOB1"]),
        "Sentence #,Word,POS,Tag\n" + columns(BIO, ",{w},NN,{t}\n").replace(",a", "Sentence: 1,a"),
        "word;tag\n" + columns(SAME["BILOU"], "{w};{t}\n"),
        *(json.dumps(row) + "\n" for row in JSON.values()),
        json.dumps([JSON["datasets"]], indent=1),
    ],
)
def test_every_format_converts_to_the_same(text: str, tmp_path: Path, command: Callable) -> None:
    given, out = tmp_path / "in", tmp_path / "out.bio"
    given.write_text(text)
    status, said, error = command("convert", given, out, "--labels", ",".join(NAMES))
    assert (status, error) == (0, "")
    assert "1 sentences with X, Y written to" in said
    assert [(s.words, s.tags) for s in read_bio(out)] == [(tuple(WORDS), tuple(BIO))]


def test_plain_names_in_columns_are_converted(tmp_path: Path, command: Callable) -> None:
    given, out = tmp_path / "in", tmp_path / "out.bio"
    given.write_text(columns(ALIKE["plain names"], "{t} {w}\n"))
    assert "(columns, plain names)" in command("convert", given, out)[1]
    assert read_bio(out)[0].tags == tuple(APART)


def test_rows_of_a_dataset_are_read() -> None:
    rows = [JSON["numbers"], {"tokens": [], "ner_tags": []}, JSON["prodigy"]]
    assert [s.tags for s in sentences_of(rows, "data", NAMES)] == [tuple(BIO)] * 2
    split = {"text": "Ann's dog", "spans": [{"start": 0, "end": 3, "label": "A B"}]}
    assert sentences_of([split], "data") == [Sentence(("Ann", "'s", "dog"), ("B-A_B", "O", "O"), 1)]
    refused = {"text": "a b", "spans": SPANS[:1], "answer": "reject"}
    with pytest.raises(MinibertError, match="data: no sentence in it"):
        sentences_of([refused], "data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1, "annotations": []}]', "looks like Label Studio JSON: export it as CoNLL2003"),
        ("<?xml version='1.0'?><a/>", "this looks like XML"),
        ('{"tokens": ["a"], "ner_tags": [1]}\n', "in:1: 1 is the number of a tag: give --labels"),
        ('{"tokens": ["a"], "ner_tags": []}\n', "in:1: ner_tags is not a list with a tag for"),
        ('{"tokens": ["a"]}\n', "in:1: an object with tokens: give tokens and ner_tags"),
        ('{"text": "ab", "spans": [[0, 3, "X"]]}\n', "in:1: X from 0 to 3: the text has 2"),
        ('{"text": "ab", "spans": [[0, 2, "X"], [1, 2, "Y"]]}\n', "X and Y overlap at 1"),
        ('{"text": "ab", "spans": [7]}\n', "in:1: 7 is not a span"),
        ('{"tokens": ["a\\tb"], "ner_tags": ["O"]}\n', "'a\\tb' is empty or holds a tab"),
        ('{"tokens": ["a"\n', "in:1: not valid JSON"),
        ("word,tag\na,O\nb\n", "in:3: 1 columns"),
        ("", "no sentence in it"),
    ],
)
def test_what_cannot_be_converted_is_said(text: str, message: str, tmp_path, refused) -> None:
    (tmp_path / "in").write_text(text)
    assert message in refused("convert", tmp_path / "in", tmp_path / "out.bio")
    assert not (tmp_path / "out.bio").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (columns(SAME["BIOES"]), ":4: E-X is a tag of BIOES, not BIO: minibert convert"),
        (columns(SAME["BILOU"]), ":4: L-X is a tag of BILOU"),
        (columns(SAME["IOB1"]), "--orphans repair, as for IOB1 and IO"),
        (json.dumps(JSON["datasets"]), "this looks like JSON: minibert convert"),
        ("word,tag\nwho,O\n", "this looks like CSV: minibert convert"),
        ('[{"data": {}, "annotations": []}]', "Label Studio JSON"),
    ],
)
def test_another_format_is_named_with_the_remedy(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text(text)
    with pytest.raises(MinibertError) as raised:
        read_bio(tmp_path / "in")
    assert message in str(raised.value)


def test_numbered_words_and_several_columns_are_read_and_said(tmp_path: Path) -> None:
    indexed = "# source\n1\tAngela\tB-PER\n2\tMerkel\tI-PER\n\n1\tHamburg\tB-LOC\n"
    (tmp_path / "in").write_text(indexed)
    said: list[str] = []
    first, second = read_bio(tmp_path / "in", say=said.append)
    assert first == Sentence(("Angela", "Merkel"), ("B-PER", "I-PER"), 2)
    assert second.words == ("Hamburg",)
    assert not said
    (tmp_path / "in").write_text("1\tAngela\tB-PER\tO\n2\tMerkel\tI-PER\tO\n")
    assert read_bio(tmp_path / "in", say=said.append)[0].words == ("Angela", "Merkel")
    (tmp_path / "in").write_text("1 O\n2 O\n")  # two columns: the numbers are the words
    assert read_bio(tmp_path / "in", say=said.append)[0].words == ("1", "2")
    assert [line.partition(": ")[2] for line in said] == [
        "3 columns: words from the first, tags from the last"
    ]


@pytest.mark.parametrize("word", ["word,tag", "{", "[", '["', "<html>", "a,b;c", '"', "#"])
def test_words_that_look_like_another_format_stay_words(word: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text(f"{word} O\njaws B-X\n")
    assert read_bio(tmp_path / "in")[0].words == (word, "jaws")


def test_nothing_but_o_is_said(tmp_path: Path, command: Callable, refused: Callable) -> None:
    (tmp_path / "in").write_text("a O\nb O\n")
    save(small_bert(), tmp_path / "model")
    status, out, _ = command("evaluate", tmp_path / "model", tmp_path / "in")
    assert status == 0
    assert "every tag is O: there is no entity to find" in out
    train = ("train", "--model", tmp_path / "model", "--train", tmp_path / "in")
    status, _, error = command(*train, "--output", tmp_path / "run")
    assert status == 2
    assert "in: every tag is O, so there is no entity to learn" in error
