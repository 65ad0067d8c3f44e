"""Zero difference to transformers: the same bits, not nearly the same numbers.

One process, one machine, CPU: outputs, loss, every gradient and the generator's state are compared
with ``torch.equal``. BERT-base runs with random weights, MiniLM with its real ones, and odd shapes
hunt for orders of operations that a head size of 64 (whose scale 1/8 is exact) would hide.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from minibert import BertConfig, BertForMaskedLM, BertForTokenClassification
from minibert.machine import choose_dtype
from minibert.pretrained import config_json
from minibert.pretrained.weights import names_of

LABELS = tuple(f"L{i}" for i in range(25))
SMALL = {"vocab_size": 211, "num_hidden_layers": 2, "labels": LABELS}
SHAPES = {
    "base": BertConfig(labels=LABELS),
    "K32": BertConfig(hidden_size=128, num_attention_heads=4, intermediate_size=512, **SMALL),
    "K48": BertConfig(hidden_size=144, num_attention_heads=3, intermediate_size=300, **SMALL),
    "5 heads": BertConfig(
        hidden_size=80, num_attention_heads=5, intermediate_size=96, type_vocab_size=3, **SMALL
    ),
}


def is_slow(dtype: torch.dtype) -> bool:
    """Without an instruction for it torch's bf16 products take minutes for what else takes one."""
    return dtype not in (torch.float32, choose_dtype("auto", torch.device("cpu")).value)


def reference(config: BertConfig, attn: str, dtype: torch.dtype):
    raw = config_json.to_dict(config, "BertForTokenClassification")
    model = transformers.BertForTokenClassification(
        transformers.BertConfig(**raw, attn_implementation=attn)
    )
    return model.to(dtype)


def ours_like(theirs, config: BertConfig, attn: str, dtype: torch.dtype):
    model = BertForTokenClassification(config, attn).to(dtype)
    state = theirs.state_dict()
    model.load_state_dict({ours: state[name] for ours, name in names_of(model).items()})
    return model


def batch(config: BertConfig, rows: int, length: int, mask: str, segments: bool) -> dict:
    draw = torch.Generator().manual_seed(rows * 1000 + length)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=draw)
    inputs = {"input_ids": ids}
    if mask != "none":
        attention_mask = torch.ones(rows, length, dtype=torch.long)
        if mask == "right":
            for row in range(1, rows):
                attention_mask[row, max(1, length - 3 * row) :] = 0
        elif mask == "random":
            attention_mask = torch.randint(0, 2, (rows, length), generator=draw)
            attention_mask[:, 0] = 1
        elif mask == "dead row":
            attention_mask[-1] = 0
        inputs["attention_mask"] = attention_mask
    if segments:
        inputs["token_type_ids"] = torch.randint(
            0, config.type_vocab_size, (rows, length), generator=draw
        )
    labels = torch.randint(0, config.num_labels, (rows, length), generator=draw)
    labels[torch.rand(rows, length, generator=draw) < 0.3] = -100
    labels[0, 0] = 1
    inputs["labels"] = labels
    return inputs


def assert_same_step(theirs, ours, inputs: dict, train: bool) -> None:
    """One forward and backward of both from the same generator state; everything equal."""
    theirs.train(train)
    ours.train(train)
    eager = ours.attn_implementation == "eager"
    wanted = {"output_hidden_states": True, "output_attentions": eager}
    theirs.zero_grad(set_to_none=True)
    ours.zero_grad(set_to_none=True)

    torch.manual_seed(7)
    expected = theirs(**inputs, **wanted)
    expected.loss.backward()
    state_after = torch.get_rng_state()

    torch.manual_seed(7)
    got = ours(**inputs, **wanted)
    got.loss.backward()

    assert torch.equal(torch.get_rng_state(), state_after), "drew other random numbers"
    assert torch.isfinite(expected.logits).all()
    assert len(got.hidden_states) == len(expected.hidden_states)
    for depth, (a, b) in enumerate(zip(got.hidden_states, expected.hidden_states)):
        assert torch.equal(a, b), f"hidden state {depth} differs by {(a - b).abs().max()}"
    if eager:
        assert len(got.attentions) == len(expected.attentions)
        assert all(torch.equal(a, b) for a, b in zip(got.attentions, expected.attentions))
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, their_name in names_of(ours).items():
        assert torch.equal(ours.get_parameter(name).grad, gradients[their_name]), f"grad of {name}"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", ["K32", "K48", "5 heads"])
def test_odd_shapes(shape: str, attn: str, dtype: torch.dtype, train: bool) -> None:
    torch.manual_seed(0)
    config = SHAPES[shape]
    theirs = reference(config, attn, dtype)
    ours = ours_like(theirs, config, attn, dtype)
    sizes = ((1, 1), (3, 33), (2, 128), (1, 512))
    for rows, length in sizes[:2] if is_slow(dtype) else sizes:
        for mask in ("none", "full", "right", "random", "dead row"):
            inputs = batch(config, rows, length, mask, segments=mask in ("full", "random"))
            assert_same_step(theirs, ours, inputs, train)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", ["K32", "K48"])
def test_autocast(shape: str, attn: str) -> None:
    """Training in bf16 autocast, which keeps float32 weights: the same casts in the same places."""
    torch.manual_seed(0)
    config = SHAPES[shape]
    theirs = reference(config, attn, torch.float32)
    ours = ours_like(theirs, config, attn, torch.float32)
    for mask in ("none", "right", "dead row"):
        for train in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                assert_same_step(theirs, ours, batch(config, 3, 33, mask, True), train)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_bert_base(attn: str, dtype: torch.dtype, train: bool) -> None:
    torch.manual_seed(0)
    config = SHAPES["base"]
    batches = [(1, 1, "none"), (4, 33, "right"), (2, 128, "random")]
    if is_slow(dtype):
        config, batches = replace(config, num_hidden_layers=1), batches[:2]
    theirs = reference(config, attn, dtype)
    ours = ours_like(theirs, config, attn, dtype)
    for rows, length, mask in batches:
        assert_same_step(theirs, ours, batch(config, rows, length, mask, True), train)
    if dtype == torch.float32 and train:
        assert_same_step(theirs, ours, batch(config, 1, 512, "full", False), train)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_real_weights_and_a_fresh_head(minilm: Path, attn: str, dtype: torch.dtype) -> None:
    """MiniLM through both libraries' own loaders; the new head is drawn from the same seed."""
    torch.manual_seed(11)
    theirs = transformers.BertForTokenClassification.from_pretrained(
        minilm, num_labels=25, attn_implementation=attn, dtype=dtype
    )
    state_after = torch.get_rng_state()
    ours = BertForTokenClassification.from_pretrained(
        minilm, num_labels=25, attn_implementation=attn, dtype=dtype, seed=11
    )
    assert torch.equal(torch.get_rng_state(), state_after)
    assert ours.load_report.initialised == ("classifier.weight", "classifier.bias")
    assert torch.equal(ours.head.classifier.weight, theirs.classifier.weight)
    rows, length = (2, 9) if is_slow(dtype) else (4, 33)
    for train in (False, True):
        for mask in ("none", "right", "dead row"):
            assert_same_step(theirs, ours, batch(ours.config, rows, length, mask, False), train)


def test_a_wholly_fresh_model() -> None:
    config = SHAPES["K48"]
    torch.manual_seed(5)
    theirs = reference(config, "eager", torch.float32)
    state_after = torch.get_rng_state()
    torch.manual_seed(5)
    ours = BertForTokenClassification(config, "eager")
    assert torch.equal(torch.get_rng_state(), state_after)
    state = theirs.state_dict()
    for name, their_name in names_of(ours).items():
        assert torch.equal(ours.get_parameter(name), state[their_name]), name


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_masked_language_model(attn: str) -> None:
    torch.manual_seed(0)
    config = SHAPES["K48"]
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            **config_json.to_dict(config, "BertForMaskedLM"), attn_implementation=attn
        )
    )
    ours = BertForMaskedLM(config, attn)
    state = theirs.state_dict()
    ours.load_state_dict({name: state[other] for name, other in names_of(ours).items()})
    inputs = batch(config, 3, 33, "right", True)
    for train in (False, True):
        assert_same_step(theirs, ours, inputs, train)


def test_the_saved_config_is_the_one_transformers_reads(tmp_path: Path) -> None:
    config = SHAPES["5 heads"]
    (tmp_path / "config.json").write_text(
        json.dumps(config_json.to_dict(config, "BertForTokenClassification"))
    )
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    assert tuple(theirs.id2label[i] for i in range(25)) == LABELS
    assert theirs.hidden_size == 80
    assert config_json.read(tmp_path / "config.json") == config
