"""Layers with their weights laid out for inference give what the plain ones give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minibert
from minibert import BertForTokenClassification, Tagger, Tokenizer, cli
from minibert.data import Example, packed, rounded
from minibert.numerics import max_abs
from minibert.prepacked import PrepackedLayer, choose, prepack
from tests.test_packing import MIXES, batch, model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_the_error_is_within_twice_that_of_the_plain_layers(attn: str, dtype: torch.dtype) -> None:
    """Judged against float64, over all mixes: a single token's error is small by luck at times."""
    if not choose(CPU, dtype).prepack:
        pytest.skip(choose(CPU, dtype).reason)
    net, exact, fast = model(attn, dtype), model(attn, dtype).double(), model(attn, dtype)
    prepack(fast)
    assert all(isinstance(layer, PrepackedLayer) for layer in fast.bert.layers)
    truth, plain, ours, padded = [], [], [], []
    for lengths in MIXES.values():
        padded_inputs, packed_inputs, mask = batch(lengths)
        with torch.no_grad():
            truth.append(exact(**packed_inputs).logits)
            plain.append(net(**packed_inputs).logits)
            ours.append(fast(**packed_inputs).logits)
            padded.append(fast(**padded_inputs).logits[mask])
    allowed = 2 * max_abs(torch.cat(plain), torch.cat(truth))
    assert max_abs(torch.cat(ours), torch.cat(truth)) <= allowed
    assert max_abs(torch.cat(padded), torch.cat(truth)) <= allowed


def test_attention_maps_are_those_of_the_plain_layers() -> None:
    _, inputs, _ = batch(MIXES["mixed"])
    net = model("eager", torch.float32)
    with torch.no_grad():
        expected = net(**inputs, output_attentions=True).attentions
        prepack(net)
        got = net(**inputs, output_attentions=True).attentions
    for maps, expected_maps in zip(got, expected, strict=True):
        assert all(max_abs(a, b) < 1e-5 for a, b in zip(maps, expected_maps, strict=True))


@pytest.fixture
def directory(minilm: Path, tmp_path: Path) -> Path:
    net = BertForTokenClassification.from_pretrained(minilm, labels=["O", "B-X", "I-X"], seed=0)
    net.save_pretrained(tmp_path)
    Tokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    return tmp_path


def test_a_tagger_has_them_unless_it_is_to_be_looked_into(directory: Path, tmp_path: Path) -> None:
    fast = Tagger.from_pretrained(directory, dtype="fp32", device="cpu")
    plain = Tagger.from_pretrained(directory, dtype="fp32", device="cpu", prepack=False)
    assert all(isinstance(layer, PrepackedLayer) for layer in fast.model.bert.layers)
    assert len(plain.model.bert.plain_layers()) == len(plain.model.bert.layers)
    with minibert.trace(plain.model):
        plain("who directed jaws")

    with pytest.raises(ValueError, match="prepack=False"), minibert.trace(fast.model):
        pass
    with pytest.raises(ValueError, match="prepack=False"):
        fast.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="cannot be trained"):
        fast.model.train()
    assert not fast.model.eval().training


def test_it_says_why_not() -> None:
    assert choose(CPU, torch.float32).prepack
    assert "CPU" in choose(torch.device("cuda"), torch.float16).reason
    assert not choose(torch.device("cuda"), torch.float16).prepack
    assert not choose(CPU, torch.float64).prepack


@given(st.integers(1, 100_000))
def test_a_rounded_number_is_at_most_an_eighth_larger(tokens: int) -> None:
    assert tokens <= rounded(tokens) <= tokens * 9 / 8
    assert rounded(rounded(tokens)) == rounded(tokens)


def test_there_are_few_rounded_numbers() -> None:
    assert len({rounded(tokens) for tokens in range(1, 2049)}) == 72


@given(st.lists(st.integers(3, 40), min_size=1, max_size=30))
def test_what_fills_a_batch_up_changes_nothing(lengths: list[int]) -> None:
    examples = [
        Example(tuple(range(1, n + 1)), (1,), sentence=i, first_word=0, labels=(2,))
        for i, n in enumerate(lengths)
    ]
    net = model("sdpa", torch.float64)
    tight, filled = packed(examples), packed(examples, filler=7)
    layout = filled.inputs["layout"]
    assert sum(layout.lengths) == rounded(sum(lengths))
    assert max(layout.lengths) == max(lengths)
    assert (filled.examples, filled.tokens) == (tight.examples, tight.tokens)
    with torch.no_grad():
        expected, got = net(**tight.inputs), net(**filled.inputs)
    assert max_abs(got.logits[filled.first_W], expected.logits[tight.first_W]) < 1e-10
    assert abs(got.loss - expected.loss) < 1e-10


def test_padded_on_the_command_line_is_the_way_of_the_reference(directory: Path) -> None:
    options = cli._parser().parse_args(["tag", str(directory), "who", "--padded"])
    tagger = cli._tagger(options)
    assert not tagger.pack
    assert tagger.model.bert.plain_layers()
