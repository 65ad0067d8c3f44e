"""Sentence vectors: those of sentence-transformers, the same in every batch, line by line."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import small_checkpoint

from minibert import Embedder
from minibert.files import MinibertError
from minibert.text.demo import generate

TEXTS = [" ".join(sentence.words) for sentence in generate()[1][:8]]
LONG = " ".join(TEXTS * 8)
TEXTS += ["", "[SEP] in a text", "élan vital 電影", " ".join(TEXTS * 2), LONG]


@pytest.fixture(scope="module")
def embedder(minilm: Path) -> Embedder:
    return Embedder.from_pretrained(minilm, device="cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("small"))


def recipe(minilm: Path, dtype: torch.dtype) -> torch.Tensor:
    """What sentence-transformers does with all-MiniLM-L6-v2, in transformers' words."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=dtype).eval()
    batches = []
    for texts in (TEXTS[:-1], TEXTS[-1:]):
        given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            x_BSD = model(**given).last_hidden_state
        mask_BS1 = given["attention_mask"][:, :, None].to(dtype)
        mean_BD = (x_BSD * mask_BS1).sum(1) / mask_BS1.sum(1).clamp(min=1e-9)
        batches.append(F.normalize(mean_BD, p=2, dim=1))
    assert mask_BS1.sum() == 256, "the long text is cut off"
    return torch.cat(batches)


def test_vectors_are_those_of_sentence_transformers(embedder: Embedder, minilm: Path) -> None:
    """Within twice the rounding error that transformers itself has in float32."""
    exact, theirs = recipe(minilm, torch.float64), recipe(minilm, torch.float32)
    ours = embedder(TEXTS)
    assert ours.shape == (len(TEXTS), 384)
    bound = 2 * (theirs - exact).abs().max()
    assert 0 < bound < 2e-6
    assert (ours - exact).abs().max() <= bound


def test_a_text_has_the_same_bits_in_every_batch(embedder: Embedder) -> None:
    alone = {text: embedder(text) for text in TEXTS}
    for seed in range(2):
        texts = TEXTS * 2
        random.Random(seed).shuffle(texts)
        for text, vector in zip(texts[seed:], embedder(texts[seed:])):
            assert torch.equal(vector, alone[text]), text


def test_what_a_call_takes_and_gives(directory: Path) -> None:
    embedder = Embedder.from_pretrained(directory, device="cpu")
    assert embedder.max_length == 64, "a model with fewer positions than 256"
    one = embedder("who directed jaws")
    assert one.shape == (embedder.size,)
    assert one.dtype == torch.float32
    assert abs(one.norm() - 1) < 1e-6
    assert embedder([]).shape == (0, embedder.size)
    assert torch.equal(embedder(iter(["jaws", "who directed jaws"]))[1], one)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder("who directed jaws"), one)
    assert torch.equal(embedder("a \ud800 surrogate"), embedder("a ? surrogate"))
    with pytest.raises(TypeError, match="a text must be a str, got NoneType"):
        embedder([None])
    with pytest.raises(TypeError, match="call the embedder"):
        next(embedder.embed_texts("jaws"))
    for wrong in (0, 1, 65):
        with pytest.raises(ValueError, match="max_length must be from 2 to 64"):
            Embedder.from_pretrained(directory, device="cpu", max_length=wrong)


def test_a_long_text_is_cut_off_and_counted(directory: Path) -> None:
    embedder = Embedder.from_pretrained(directory, device="cpu", max_length=5)
    assert torch.equal(embedder("a b c d e f"), embedder("a b c"))
    assert embedder.truncated == 1


def test_a_stream_reads_no_more_than_a_pool_ahead(directory: Path) -> None:
    read = 0

    def texts():
        nonlocal read
        for _ in range(3000):
            read += 1
            yield "jaws"

    next(Embedder.from_pretrained(directory, device="cpu").embed_texts(texts()))
    assert read == 1024


def test_weights_that_are_not_finite(directory: Path) -> None:
    embedder = Embedder.from_pretrained(directory, device="cpu", prepack=False)
    with torch.no_grad():
        embedder.model.bert.embeddings.word.weight[embedder.tokenizer.encode("b")[1]] = torch.inf
    with pytest.raises(MinibertError, match="the vector is not finite for 'a b': the model's"):
        embedder(["a", "a b", "a a a"])


def test_the_command_writes_json_lines_and_arrays(
    directory: Path, tmp_path: Path, command, refused, monkeypatch
) -> None:
    lines = ["who directed jaws", "", "a \x1b b", "alien " * 80]
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines))
    vectors = Embedder.from_pretrained(directory, device="cpu")(lines).numpy()
    on_cpu = ("embed", directory, "--device", "cpu")

    status, out, said = command(*on_cpu, "--file", tmp_path / "in.txt")
    assert status == 0
    assert (
        said == "minibert: 1 texts have more than 64 word-pieces: the rest of them was not read\n"
    )
    assert "\x1b" not in out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == lines
    read_back = np.array([row["embedding"] for row in rows], dtype=np.float32)
    assert (read_back == vectors).all(), "the text of a number gives back its bits"

    array = tmp_path / "out.npy"
    status, out, said = command(*on_cpu, "--file", tmp_path / "in.txt", "--output", array, "--npy")
    assert (status, out) == (0, "")
    assert (np.load(array) == vectors).all()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert command(*on_cpu, "--output", array, "--npy")[0] == 0
    assert np.load(array).shape == (0, 36)

    status, out, _ = command(*on_cpu, "who", "directed", "jaws")
    assert json.loads(out)["embedding"] == rows[0]["embedding"]
    assert "add --output" in refused(*on_cpu, "a text", "--npy")
    assert "from 2 to 64" in refused(*on_cpu, "a text", "--max-length", "65")
    assert "neither a directory nor a known" in refused("embed", "nothing", "a text")
