"""BIO files, word-pieces, windows and batches: every word gets exactly one label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import Tokenizer
from minibert.files import MinibertError, sha256_of
from minibert.text import demo
from minibert.text.batches import epoch_batches, examples_of, packed, padded, windows
from minibert.text.bio import Sentence, label_ids, labels_of, read_bio
from minibert.text.metrics import strict_entities


@pytest.fixture(scope="module")
def tokenizer(minilm: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(minilm)


def bio(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "data.bio"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


EXPECTED = [
    Sentence(("who", "directed", "jaws"), ("O", "O", "B-TITLE"), 1),
    Sentence(("mel", "gibson"), ("B-ACTOR", "I-ACTOR"), 5),
]


@pytest.mark.parametrize(
    "content",
    [
        "O\twho\nO\tdirected\nB-TITLE\tjaws\n\nB-ACTOR\tmel\nI-ACTOR\tgibson\n",
        "O\twho\r\nO\tdirected\r\nB-TITLE\tjaws\r\n\r\nB-ACTOR\tmel\r\nI-ACTOR\tgibson\r\n",
        "O who\nO directed\nB-TITLE jaws\n \t \nB-ACTOR mel\nI-ACTOR gibson",
        "who O\ndirected O\njaws B-TITLE\n\nmel B-ACTOR\ngibson I-ACTOR\n",
        "who W X O\ndirected V X O\njaws N X B-TITLE\n\nmel N X B-ACTOR\ngibson N X I-ACTOR",
        "\ufeffO\twho\nO\tdirected\nB-TITLE\tjaws\n-DOCSTART- O\nB-ACTOR\tmel\nI-ACTOR\tgibson",
    ],
    ids=["tag first", "crlf", "spaces", "tag last", "conll", "bom and docstart"],
)
def test_every_form_of_bio_is_read(tmp_path: Path, content: str) -> None:
    assert read_bio(bio(tmp_path, content)) == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("O\twho\nB-TITLE\n", ":2: .*one column"),
        ("O\twho\nB-TITLE\t\n", ":2: .*one column"),
        ("O\twho\nX-TITLE\tjaws\n", ":2: 'X-TITLE' is not a tag"),
        ("O\twho\nI-TITLE\tjaws\n", ":2: I-TITLE follows O.*--orphans repair"),
        ("B-ACTOR\tmel\nI-TITLE\tjaws\n", ":2: I-TITLE follows B-ACTOR"),
        ("I-TITLE\tjaws\n", ":1: I-TITLE follows O"),
        ("", "no sentence"),
        ("\n\n\r\n", "no sentence"),
        (b"O\twho\nO\t\xff\xfe\n", ":2: byte 0xff is not UTF-8"),
    ],
)
def test_bad_bio_names_file_and_line(tmp_path: Path, content, message: str) -> None:
    path = bio(tmp_path, content)
    with pytest.raises(MinibertError, match=message) as raised:
        read_bio(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_orphans_can_be_repaired(tmp_path: Path) -> None:
    path = bio(tmp_path, "I-A\tx\nI-A\ty\nI-B\tz\nO\to\nI-A\tw\n")
    tags = read_bio(path, orphans="repair")[0].tags
    assert tags == ("B-A", "I-A", "B-B", "O", "B-A")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MinibertError, match=r"nowhere\.bio: cannot be read"):
        read_bio(tmp_path / "nowhere.bio")


def test_labels_do_not_depend_on_order() -> None:
    sentences = [Sentence(("a", "b"), ("B-Z", "O")), Sentence(("c",), ("B-A",))]
    expected = ("O", "B-A", "I-A", "B-Z", "I-Z")
    assert labels_of(sentences) == labels_of(sentences[::-1]) == expected
    with pytest.raises(MinibertError, match=r"f\.bio:1: the model has no label B-Z: it knows O"):
        label_ids(sentences, ["O"], "f.bio")


def test_mit_movie_has_the_published_counts(mit_movie: Path) -> None:
    train, test = (read_bio(mit_movie / f"{name}.bio") for name in ("engtrain", "engtest"))
    assert (len(train), len(test)) == (9775, 2443)
    assert (sum(len(s.words) for s in train), sum(len(s.words) for s in test)) == (99491, 24686)
    assert len(labels_of(train)) == 25
    assert labels_of(train) == labels_of(test)


def test_pieces_equal_those_of_transformers(tokenizer: Tokenizer, minilm: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(minilm)
    words = ["Who", "directed", "Amélie", "?", "supercalifragilistic", "star-wars", "2001", "電影"]
    encoded = reference(words, is_split_into_words=True)
    flat = [piece for ids in tokenizer.pieces([words])[0] for piece in ids]
    assert [tokenizer.cls_id, *flat, tokenizer.sep_id] == encoded["input_ids"]
    assert tokenizer.encode("Who directed Amélie?") == reference("Who directed Amélie?").input_ids


def test_a_word_without_pieces_is_unknown(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces([["jaws", "\u200b\x00", ""]])[0][1:] == [[tokenizer.unk_id]] * 2


def test_cased_and_uncased_vocabularies(mit_movie: Path, tmp_path: Path, minilm: Path) -> None:
    """From tokenizer.json, and from vocab.txt with do_lower_case alone."""
    cased = mit_movie.parent.parent / "weights" / "bert-base-cased"
    for source, lowercase in ((cased, False), (minilm, True)):
        whole = Tokenizer.from_pretrained(source)
        assert whole.lowercase is lowercase
        folder = tmp_path / str(lowercase)
        folder.mkdir()
        for name in ("vocab.txt", "tokenizer_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
        bare = Tokenizer.from_pretrained(folder)
        words = [["Bruce", "WILLIS", "naïve", "movies"]]
        assert bare.pieces(words) == whole.pieces(words)
        assert (whole.pieces([["Bruce"]]) == whole.pieces([["bruce"]])) is lowercase


def test_a_saved_tokenizer_opens_in_transformers(
    tokenizer: Tokenizer, tmp_path: Path, minilm: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    words = [["Who", "directed", "Amélie", "?"]]
    assert Tokenizer.from_pretrained(tmp_path).pieces(words) == tokenizer.pieces(words)
    assert (tmp_path / "vocab.txt").read_bytes() == (minilm / "vocab.txt").read_bytes()
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = reference(words, is_split_into_words=True)["input_ids"]
    assert encoded[0][1:-1] == [i for ids in tokenizer.pieces(words)[0] for i in ids]


@settings(max_examples=500)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 10))
def test_every_word_is_labelled_by_one_window(sizes: list[int], limit: int, stride: int) -> None:
    found = windows(sizes, limit, min(stride, limit // 2))
    assert [word for _, own in found for word in own] == list(range(len(sizes)))
    for words, own in found:
        assert words.start <= own.start < own.stop <= words.stop
        assert len(words) == 1 or sum(sizes[word] for word in words) <= limit


def test_a_word_in_an_overlap_is_labelled_where_it_has_more_context() -> None:
    assert windows([1] * 10, limit=6, stride=4) == [
        (range(0, 6), range(0, 4)),
        (range(2, 8), range(4, 6)),
        (range(4, 10), range(6, 10)),
    ]


@pytest.mark.parametrize("limit", [8, 50, 512])
def test_long_sentences_keep_every_label(tokenizer: Tokenizer, limit: int) -> None:
    train, _ = demo.generate()
    words = [word for sentence in train[:60] for word in sentence.words]
    labels = [i % 7 for i in range(len(words))]
    examples = examples_of([words], tokenizer, limit, [labels])
    assert [label for e in examples for label in e.labels] == labels
    pieces = tokenizer.pieces([words])[0]
    for example in examples:
        assert len(example.ids) <= limit
        assert example.ids[0] == tokenizer.cls_id
        assert example.ids[-1] == tokenizer.sep_id
        for offset, first in enumerate(example.firsts):
            assert example.ids[first] == pieces[example.first_word + offset][0]


def test_a_word_longer_than_the_model_is_cut_and_labelled(tokenizer: Tokenizer) -> None:
    words = ["jaws", "?!" * 40, "alien"]
    examples = examples_of([words], tokenizer, 12, [[1, 2, 3]])
    assert [label for e in examples for label in e.labels] == [1, 2, 3]
    assert max(len(e.ids) for e in examples) == 12


def test_padded_and_packed_hold_the_same(tokenizer: Tokenizer) -> None:
    train, _ = demo.generate()
    labels = labels_of(train)
    examples = examples_of(
        [s.words for s in train[:9]], tokenizer, 512, label_ids(train[:9], labels, "demo")
    )
    wide, flat = padded(examples, 0), packed(examples)
    mask = wide.inputs["attention_mask"].bool()
    assert wide.tokens == flat.tokens == int(mask.sum()) == len(flat.inputs["input_ids"])
    assert (wide.inputs["labels"][~mask] == -100).all()
    for batch in (wide, flat):
        ids = batch.inputs["input_ids"].flatten()
        found = batch.inputs["labels"].flatten()
        assert found[batch.first_W].tolist() == [x for e in batch.examples for x in e.labels]
        assert (found != -100).sum() == sum(len(e.labels) for e in examples)
        firsts = [e.ids[first] for e in batch.examples for first in e.firsts]
        assert ids[batch.first_W].tolist() == firsts
    assert [len(e.ids) for e in flat.examples] == sorted(len(e.ids) for e in examples)
    with pytest.raises(ValueError, match="length is 3"):
        padded(examples, 0, length=3)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(1, 9), st.integers(1, 5))
def test_an_epoch_shows_every_example_once(lengths: list[int], size: int, bucket: int) -> None:
    batches = epoch_batches(lengths, size, 3, 1, bucket)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches == epoch_batches(lengths, size, 3, 1, bucket)
    assert sum(len(batch) != size for batch in batches) <= 1


def test_epochs_and_seeds_differ_and_buckets_reduce_padding() -> None:
    lengths = torch.randint(5, 40, (3200,), generator=torch.Generator().manual_seed(0)).tolist()

    def waste(bucket: int) -> int:
        batches = epoch_batches(lengths, 32, 0, 1, bucket)
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) - sum(lengths)

    assert epoch_batches(lengths, 32, 0, 1) != epoch_batches(lengths, 32, 0, 2)
    assert epoch_batches(lengths, 32, 0, 1) != epoch_batches(lengths, 32, 1, 1)
    assert waste(50) < waste(1) / 10


def test_the_demo_corpus_is_always_the_same(tmp_path: Path) -> None:
    train, test = demo.generate()
    assert (len(train), len(test)) == (1500, 300)
    assert len(labels_of(train)) == 25
    assert labels_of(train) == labels_of(test)
    demo.write(tmp_path)
    assert read_bio(tmp_path / "train.bio") == train
    assert read_bio(tmp_path / "test.bio") == test
    assert sha256_of(tmp_path / "train.bio")[:12] == "8f91f3e8c1ae"


def test_the_demo_test_set_is_not_in_the_training_set() -> None:
    train, test = demo.generate()
    assert not {s.words for s in train} & {s.words for s in test}
    for type_ in ("ACTOR", "TITLE", "SONG", "CHARACTER"):
        names = [
            {
                " ".join(s.words[start:stop])
                for s in part
                for type_of, start, stop in strict_entities(s.tags)
                if type_of == type_
            }
            for part in (train, test)
        ]
        assert all(names)
        assert not names[0] & names[1], type_
