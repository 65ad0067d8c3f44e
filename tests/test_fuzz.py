"""Bad input: mutated files and texts, and cases that mutations rarely produce."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import fuzz
import mutate
import pytest
from builders import python
from hypothesis import given
from hypothesis import strategies as st

from minibert import BertConfig, Tagger, Tokenizer
from minibert.files import LINE, MinibertError, parse_json
from minibert.pretrained import config_json, weights
from minibert.pretrained.config_json import MOST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fuzz.good(tmp_path)
    return tmp_path


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_mutated_inputs_are_accepted_or_refused_in_one_line(count: int) -> None:
    counts, failures = fuzz.fuzz(seed=1, first=0, count=count)
    assert not failures, "\n".join(failures)
    assert sum(sum(ended.values()) for ended in counts.values()) == count
    for target, ended in counts.items():
        # If all of its mutations were refused, or none was, a target would test nothing.
        assert min(ended["accepted"], ended["refused"]) >= 1, target


def test_the_harness_detects_each_fault(monkeypatch, capfd) -> None:
    """A target that fails in each way that the harness must detect."""
    played = """
import fuzz, json, sys
def bad(draw, folder):
    kind = fuzz.KINDS.pop(0)
    if kind == "traceback": raise KeyError("x")
    if kind == "file": (folder / ".half").write_text("")
    if kind == "memory": bytes(2 * fuzz.MEMORY)
    while kind == "hang": pass
    return True
fuzz.SECONDS, fuzz.MEMORY = 1.0, 512 << 20
fuzz.TARGETS.clear(); fuzz.TARGETS["played"] = bad
fuzz.KINDS = ["traceback", "file", "memory", "good", "hang"]
fuzz.child(*json.loads(sys.argv[1]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", played, json.dumps([0, 0, 5, 1])],
        env=fuzz.os.environ | fuzz.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    ended = [json.loads(line)[1] for line in ran.stdout.splitlines()]
    assert [e.split("\n")[0] for e in ended] == ["failed", "failed", "failed", "accepted"]
    for how, what in zip(ended, ("KeyError", "left ['.half']", "MemoryError")):
        assert what in how
    assert ran.returncode == -fuzz.signal.SIGPROF


# config.json


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("value", [10**12, 2**64, -1, 0, True, 8.0, "8", None, [8], {}])
def test_absurd_sizes_are_refused_by_name(name: str, value) -> None:
    with pytest.raises(MinibertError) as raised:
        config_json.parse({name: value}, "config.json")
    said = str(raised.value)
    assert said.startswith(f"config.json: {name} must be an integer from 1 to ")
    assert f"got {value!r}" in said
    assert said.endswith(": use the config.json that belongs to the weights")


@pytest.mark.parametrize(
    "name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"]
)
@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), float("inf"), True, False, "0.1", None])
def test_absurd_rates_are_refused_by_name(name: str, value) -> None:
    with pytest.raises(MinibertError, match=rf"^config\.json: {name} must be in .*got .*: use the"):
        config_json.parse({name: value}, "config.json")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"id2label": {str(i): f"B-{i}" for i in range(10**6)}},
            "1000000 labels, more than 100000",
        ),
        ({"num_labels": 10**6}, "num_labels must be a count, at most 100000"),
        ({"num_labels": True}, "num_labels must be a count"),
        ({"id2label": {"0": "O", "1": "O"}}, "labels must be distinct"),
        ({"id2label": {"0": "B-\ud800"}}, "id2label: .* is not Unicode"),
        ({"id2label": {"0": "O", "1" * 5000: "B-X"}}, "without a gap"),
        ({"pad_token_id": 10**9}, "pad_token_id must be a vocabulary id, 0 to 28995"),
        ({"pad_token_id": False}, "pad_token_id must be a vocabulary id"),
    ],
)
def test_absurd_labels_and_ids_are_refused(raw: dict, message: str) -> None:
    with pytest.raises(MinibertError, match=message) as raised:
        config_json.parse(raw, "config.json")
    assert len(str(raised.value)) <= LINE + 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("O"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(
    st.dictionaries(st.sampled_from([*config_json.to_dict(BertConfig(), "X"), "num_labels"]), JSON)
)
def test_any_config_is_taken_or_refused_in_a_line(raw: dict) -> None:
    try:
        config = config_json.parse(raw, "config.json")
    except MinibertError as error:
        said = str(error)
    else:
        said = "config.json: taken"
        assert all(type(vars(config)[name]) is int for name in MOST)
    assert said.startswith("config.json: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"b": 1, "a": 1, "a": 2}', "the key 'a' occurs 2 times"),
        ('{"a": ' + "[" * 10**6 + "]" * 10**6 + "}", "recursion"),
        ('{"a": ' + "1" * 10**4 + "}", "4300 digits"),
        ("", "Expecting value"),
    ],
)
def test_invalid_or_ambiguous_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(MinibertError, match=f"^file: not valid JSON .*{message}.*fetch the file"):
        parse_json(text, "file")


def test_too_many_labels_and_too_few_positions_are_refused(folder: Path) -> None:
    tagger = Tagger.from_pretrained(folder)
    for change, message in (
        (
            {"labels": tuple(f"B-{i}" for i in range(1001))},
            "1001 labels, but decoding handles at most 1000",
        ),
        (
            {"labels": ("O",), "max_position_embeddings": 2},
            "max_position_embeddings is 2: a text needs at least 3",
        ),
    ):
        tagger.model.config = BertConfig(**(vars(BertConfig()) | {"vocab_size": 99} | change))
        with pytest.raises(MinibertError, match=message):
            Tagger(tagger.model, tagger.tokenizer)


def test_scores_that_are_not_finite_are_an_error(folder: Path) -> None:
    tagger = Tagger.from_pretrained(folder, dtype="fp32", prepack=False)
    tagger.model.head.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(MinibertError, match=r"not finite for 'who .*try --dtype fp32"):
        tagger("who directed jaws")


# safetensors


def repacked(path: Path, header: dict | str, body: bytes = b"", claim: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((claim or len(text)).to_bytes(8, "little") + text + body)


def tensor(start: int, stop: int, *shape: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, "damaged"),  # overlapping
        ({"a": tensor(0, 4), "b": tensor(8, 16)}, "damaged"),  # a gap
        ({"a": tensor(0, 4 * 10**12)}, "damaged"),  # beyond the file
        ({"a": tensor(0, 16, 10**12)}, "damaged"),  # a shape beyond its offsets
        ({"a": tensor(0, 16, 2**32, 2**32)}, "damaged"),  # 2^64 wraps to 0
        ({"a": tensor(0, 0, 0, 2**62, 2**62), "b": tensor(0, 16)}, "no tensor of a BERT"),
        ({"a": tensor(8, 0), "b": tensor(0, 16)}, "damaged"),
        ({"a": {**tensor(0, 16), "data_offsets": [-1, 16]}}, "damaged"),
        ({"a": {**tensor(0, 16), "dtype": "OBJECT"}}, "damaged"),
        ({"../../etc/passwd": tensor(0, 16)}, r"'../../etc/passwd' is not a tensor name"),
        ({"/etc/passwd": tensor(0, 16)}, "is not a tensor name"),
        ({"a\nb": tensor(0, 16)}, "is not a tensor name"),
        ({"a" * 301: tensor(0, 16)}, "is not a tensor name"),
        ('{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 16)),) * 2), "'a' occurs 2 times"),
        ("[" * 10**5 + "]" * 10**5, "recursion"),
        ("[]", "is not a JSON object"),
        ("{}" + " " * (10 << 20), "a header of 10485762 bytes, more than 10485760"),
        ({"a": tensor(0, 16)}, "no tensor of a BERT"),
        (
            {
                "embeddings.LayerNorm.beta": tensor(0, 8),
                "bert.embeddings.LayerNorm.bias": tensor(8, 16),
            },
            "embeddings.LayerNorm.beta and bert.embeddings.LayerNorm.bias name the same",
        ),
    ],
)
def test_inconsistent_headers_are_refused(folder: Path, header, message: str) -> None:
    path = folder / "model.safetensors"
    repacked(path, header, bytes(16))
    with pytest.raises(MinibertError, match=f"^{re.escape(str(path))}: .*{message}"):
        Tagger.from_pretrained(folder)


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1, 10**9, 11 << 20])
def test_a_header_longer_than_the_file_is_not_read(folder: Path, claim: int) -> None:
    path = folder / "model.safetensors"
    repacked(path, {"a": tensor(0, 16)}, bytes(16), claim)
    with pytest.raises(MinibertError, match=f"a header of {claim} bytes, more than"):
        weights.opened(path, "bert").__enter__()


def test_a_config_larger_than_the_weights_takes_no_memory(folder: Path) -> None:
    """A missing head is initialised, but not a model of 40 GB."""
    path = folder / "model.safetensors"
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"vocab_size": 10**7, "hidden_size": 1000, "num_attention_heads": 10}
    (folder / "config.json").write_text(json.dumps(raw))
    repacked(path, {"classifier.bias": tensor(0, 20)}, bytes(20))
    with pytest.raises(MinibertError, match=r"holds 5 of the 100\d+ parameters that config.json"):
        Tagger.from_pretrained(folder)


PEAK = """
import sys
import fuzz
from minibert import Tagger
before = fuzz.peak_mib()
Tagger.from_pretrained(sys.argv[1])("who directed jaws")
print(fuzz.peak_mib() - before)
"""


def test_a_tensor_that_is_not_used_takes_no_memory(folder: Path) -> None:
    """An unused tensor of 2 GiB, in a sparse file."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    del header["__metadata__"]
    end = len(body) + (2 << 30)
    repacked(path, {**header, "pooler.weight": tensor(len(body), end)}, body)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (2 << 30))
    assert int(python("-c", PEAK, folder, **fuzz.ENVIRONMENT)) < 200


# Tokenizer files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace(b"[UNK]\n", b""), "the vocabulary lacks|not a tokenizer"),
        (lambda t: t + b"who\n", r"vocab\.txt:\d+: 'who' is on line \d+ already"),
        (lambda t: b"", r"vocab\.txt: "),
        (lambda t: b"[PAD]\n\n\nx\n", r"vocab\.txt:3: '' is on line 2 already"),
        (lambda t: b"[PAD]\n\x80\x81\n", r"vocab\.txt:2: byte 0x80 is not UTF-8"),
    ],
)
def test_invalid_vocabularies_are_refused(folder: Path, change, message: str) -> None:
    (folder / "tokenizer.json").unlink()
    path = folder / "vocab.txt"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(MinibertError, match=message):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("normalizer",), None, "has NoneType where a BERT has BertNormalizer"),
        (("normalizer",), {"type": "NFC"}, "has NFC where a BERT has BertNormalizer"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "has Whitespace where a BERT has BertPre"),
        (("model", "max_input_chars_per_word"), 10**9, "max_input_chars_per_word is 1000000000"),
        (("model", "max_input_chars_per_word"), 0, "max_input_chars_per_word is 0: use the 100"),
        (("model", "continuing_subword_prefix"), "", "continuing_subword_prefix is '': use the ##"),
        (("model", "continuing_subword_prefix"), "@@", "continuing_subword_prefix is '@@'"),
        (("post_processor",), None, r"does not write \[CLS\] before"),
        (("post_processor", "cls"), ["[MASK]", 4], r"does not write \[CLS\] before"),
        (("model", "unk_token"), "who", "unk_token is 'who'"),
        (("model", "vocab", "who"), 10**9, r"has \d+ pieces, but numbers them up to 1000000000"),
        (("model", "vocab", "who"), 5, "2 pieces have the number 5"),
        (("model", "vocab"), {}, "where a BERT|lacks|numbers|unk_token"),
        (("version",), "\u2028", "not a tokenizer"),
    ],
)
def test_other_tokenizers_are_refused(folder: Path, path, value, message: str) -> None:
    file = folder / "tokenizer.json"
    raw = holder = json.loads(file.read_text())
    *keys, last = path
    for key in keys:
        holder = holder[key]
    holder[last] = value
    file.write_text(json.dumps(raw))
    with pytest.raises(MinibertError, match=message):
        Tokenizer.from_pretrained(folder)


def test_an_error_is_always_one_line() -> None:
    assert str(MinibertError("a\nb\u2028c\x85d\re")) == "a b c d e"
    long = str(MinibertError("where: " + "x" * 10**6 + ": remedy"))
    assert len(long) <= LINE + 5
    assert long.startswith("where: ")
    assert long.endswith(": remedy")


def test_an_input_depends_on_seed_and_number_only() -> None:
    draws = [mutate.text_(fuzz.Random("7 3"), 5) for _ in range(2)]
    assert draws[0] == draws[1] != mutate.text_(fuzz.Random("7 4"), 5)
    raw = {"a": [1, {"b": 2}], "c": {}}
    before = str(mutate.VALUES)
    for number in range(500):
        made = [mutate.json_(fuzz.Random(str(number)), raw) for _ in range(2)]
        assert made[0] == made[1]
    assert str(mutate.VALUES) == before, "an input depends on earlier ones"
    assert raw == {"a": [1, {"b": 2}], "c": {}}
