"""Long and unusual text: entities have correct offsets, and each input line gives one line."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import fuzz
import mutate
import pytest
from builders import python
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minibert import Tagger

STRANGE = st.one_of(
    st.text(),
    st.text(st.characters()),  # includes lone surrogates
    st.lists(st.sampled_from([c for a in mutate.ALPHABETS for c in a]), max_size=80).map("".join),
    st.lists(st.sampled_from(["who", "Jaws", " ", "\n", "\ud83d", "\udc4d", "👍"])).map("".join),
)
CASES = [
    "",
    " \t\r\n",
    "\x00",
    "jaws\x00jaws",
    "\ud800",
    "\ud83d\udc4d jaws",  # the two halves of an emoji
    "👨\u200d👩\u200d👧 jaws",
    "e\u0301" * 300,
    "\u202ejaws\u202c gibson",
    "שלום jaws مرحبا",
    "\u200b\u200d\ufeff",
    "\U0010ffff\uffff",
    "İstanbul ﬁlm ß",  # lower case is longer
    "\u2028jaws\u2029\x85\x0b\x0c\x1c",
    "[MASK] [PAD] ##a",
    "?" * 1000,
    "a" * 100_000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    fuzz.good(folder)
    return folder


@pytest.fixture(scope="module", params=["uncased", "cased"])
def tagger(request, tmp_path_factory) -> Tagger:
    folder = tmp_path_factory.mktemp(request.param)
    fuzz.good(folder, lowercase=request.param == "uncased")
    found = Tagger.from_pretrained(folder, dtype="fp32")
    assert found.tokenizer.lowercase is (request.param == "uncased")
    return found


def test_the_tagger_finds_entities(tagger: Tagger) -> None:
    assert len(tagger(" ".join(fuzz.WORDS * 3))) > 3


@settings(max_examples=300)
@given(STRANGE)
def test_entity_offsets_are_correct(tagger: Tagger, text: str) -> None:
    check(tagger, text)


@pytest.mark.parametrize("text", CASES, ids=lambda text: ascii(text)[:20])
def test_entity_offsets_are_correct_in(tagger: Tagger, text: str) -> None:
    check(tagger, text)


def check(tagger: Tagger, text: str) -> None:
    (found,) = tagger.tag_texts([text])
    end = 0
    for entity in found:
        assert text[entity.start : entity.stop] == entity.text
        assert entity.text.strip() == entity.text != ""
        assert entity.start >= end, "entities are ordered and disjoint"
        assert 0 <= entity.score <= 1
        end = entity.stop


@settings(max_examples=100)
@given(st.lists(STRANGE.map(lambda text: text.replace("\n", " ")), max_size=5))
@example(["a\rb", "\u2028", "", "c\r"])
def test_each_input_line_gives_one_output_line(folder: Path, lines: list[str]) -> None:
    """Lines of UTF-8 end at line feeds only."""
    raw = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
    assert fuzz.tag(folder, raw)


def test_only_lf_and_crlf_end_a_line(folder: Path, command, monkeypatch) -> None:
    raw = "who\r\n\njaws\x0b\x0cx\u2028y\x85z\rw\r\r\n\r\nlast line".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    status, out, _ = command("tag", folder, "--json")
    assert status == 0
    texts = [json.loads(line)["text"] for line in out.split("\n")[:-1]]
    assert texts == ["who", "", "jaws\x0b\x0cx\u2028y\x85z\rw\r", "", "last line"]


def test_output_is_always_utf8(folder: Path) -> None:
    """Whatever the encoding of the terminal or pipe."""
    text = "who directed 電影 é 👍"
    ran = subprocess.run(
        [sys.executable, "-m", "minibert.cli", "tag", folder, text, "--json"],
        env=fuzz.os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert json.loads(ran.stdout.decode())["text"] == text


LONG = """
import sys
import fuzz
from minibert import Tagger
words, tagger = int(sys.argv[2]), Tagger.from_pretrained(sys.argv[1], dtype="fp32")
before = fuzz.peak_mib()
text = " ".join(fuzz.WORDS[i * 7919 % 12] for i in range(words))
found = tagger(text)
assert all(text[e.start : e.stop] == e.text for e in found)
print(len(found), fuzz.peak_mib() - before)
"""


@pytest.mark.parametrize(
    "words", [20_000, pytest.param(10**6, marks=[pytest.mark.slow])], ids=["20k", "1M"]
)
def test_a_text_of_very_many_words(folder: Path, words: int) -> None:
    """Measured with this model: 0.7 kB and 40 µs per word."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found, peak_mib = map(int, python("-c", LONG, folder, words, **fuzz.ENVIRONMENT).split())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found > words / 10
    assert peak_mib < 100 + words * 1.5e-3
    assert after.ru_utime - before.ru_utime < 20 + words * 2e-4
