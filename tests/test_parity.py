"""Bit equality with transformers, in one process on one CPU.

Outputs, loss, every gradient and the state of the random generator are compared with
``torch.equal``. Odd head sizes reveal an order of operations that a head size of 64 hides, because
its scale of 1/8 is exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_FAMILIES, config_of, small_bert, small_config, twin

from minibert import BertConfig, BertForMaskedLM, BertForTokenClassification
from minibert.machine import choose_dtype
from minibert.pretrained import config_json
from minibert.pretrained.weights import names_of

LABELS = tuple(f"L{i}" for i in range(25))
SMALL = {"vocab_size": 211, "max_position_embeddings": 512, "labels": LABELS}
SHAPES = {
    "K48": {"hidden_size": 144, "num_attention_heads": 3, "intermediate_size": 300} | SMALL,
    "5 heads": {"hidden_size": 80, "num_attention_heads": 5, "type_vocab_size": 3} | SMALL,
}
FAMILIES = {name: SMALL | sizes for name, sizes in SMALL_FAMILIES.items()}
# Of the published roberta-base and ERNIE 1.0, 2.0 and 3.0 nano, without the number of layers.
OFFICIAL = {
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    },
    "ernie-1.0-base-zh": {
        "model_type": "ernie",
        "vocab_size": 18000,
        "max_position_embeddings": 513,
        "layer_norm_eps": 1e-5,
        "hidden_act": "relu",
    },
    "ernie-2.0-base-en": {
        "model_type": "ernie",
        "vocab_size": 30522,
        "type_vocab_size": 4,
        "layer_norm_eps": 1e-5,
    },
    "ernie-3.0-nano-zh": {
        "model_type": "ernie",
        "vocab_size": 40000,
        "hidden_size": 312,
        "intermediate_size": 1248,
        "max_position_embeddings": 2048,
        "type_vocab_size": 4,
        "task_type_vocab_size": 16,
        "layer_norm_eps": 1e-5,
    },
}
MASKS = ("none", "full", "right", "random", "dead row")
ATTN = pytest.mark.parametrize("attn", ["eager", "sdpa"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def is_slow(dtype: torch.dtype) -> bool:
    """Without bf16 instructions, torch's bf16 products take minutes instead of seconds."""
    return dtype not in (torch.float32, choose_dtype("auto", torch.device("cpu")).value)


def batch(config: BertConfig, rows: int, length: int, mask: str, segments: bool = True) -> dict:
    draw = torch.Generator().manual_seed(rows * 1000 + length)
    shape = (rows, length)
    inputs = {"input_ids": torch.randint(0, config.vocab_size, shape, generator=draw)}
    inputs["input_ids"][:, length // 2] = config.pad_token_id  # inside a sentence
    if mask != "none":
        attention_mask = torch.ones(shape, dtype=torch.long)
        if mask == "right":
            for row in range(1, rows):
                attention_mask[row, max(1, length - 3 * row) :] = 0
        elif mask == "random":
            attention_mask = torch.randint(0, 2, shape, generator=draw)
            attention_mask[:, 0] = 1
        elif mask == "dead row":
            attention_mask[-1] = 0
        inputs["attention_mask"] = attention_mask
    if segments:
        kinds = config.type_vocab_size
        inputs["token_type_ids"] = torch.randint(0, kinds, shape, generator=draw)
    labels = torch.randint(0, config.num_labels, shape, generator=draw)
    labels[torch.rand(shape, generator=draw) < 0.3] = -100
    labels[0, 0] = 1
    return inputs | {"labels": labels}


def assert_same_step(theirs, ours, inputs: dict, train: bool) -> None:
    """A forward and a backward of both, from the same generator state, give the same bits."""
    eager = ours.attn_implementation == "eager"
    outputs = []
    for model in (theirs, ours):
        model.train(train).zero_grad(set_to_none=True)
        torch.manual_seed(7)
        outputs.append(model(**inputs, output_hidden_states=True, output_attentions=eager))
        outputs[-1].loss.backward()
        outputs.append(torch.get_rng_state())
    expected, state_after, got, our_state_after = outputs
    assert torch.equal(our_state_after, state_after), "other random numbers were drawn"
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


@DTYPE
@ATTN
@pytest.mark.parametrize("shape", [*SHAPES, *FAMILIES])
def test_odd_shapes(shape: str, attn: str, dtype: torch.dtype) -> None:
    ours = small_bert(attn=attn, **(SHAPES | FAMILIES)[shape]).to(dtype)
    theirs = twin(ours, attn)
    cases = [(1, 1, "none"), *((3, 33, mask) for mask in MASKS), (40, 9, "right")]
    for rows, length, mask in cases if is_slow(dtype) else [*cases, (1, 512, "full")]:
        inputs = batch(ours.config, rows, length, mask, segments=mask in ("full", "random"))
        for train in (False, True):
            assert_same_step(theirs, ours, inputs, train)


@ATTN
@pytest.mark.parametrize("shape", ["K48", "RoBERTa"])
def test_autocast(attn: str, shape: str) -> None:
    """Training in bf16 autocast with float32 weights: the same casts in the same places."""
    ours = small_bert(attn=attn, **(SHAPES | FAMILIES)[shape])
    theirs = twin(ours, attn)
    for mask in ("none", "right", "dead row"):
        for train in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                assert_same_step(theirs, ours, batch(ours.config, 3, 33, mask), train)


@pytest.mark.parametrize(
    ("attn", "dtype", "cases"),
    [
        ("eager", torch.float32, [(2, 33, "right")]),
        ("sdpa", torch.bfloat16, [(2, 33, "right")]),
        *(
            pytest.param(
                *(attn, dtype, [(1, 1, "none"), (2, 128, "random"), (1, 512, "full")]),
                marks=pytest.mark.slow,
            )
            for attn in ("eager", "sdpa")
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_bert_base(attn: str, dtype: torch.dtype, cases: list) -> None:
    layers = 1 if is_slow(dtype) else 12
    torch.manual_seed(0)
    config = BertConfig(labels=LABELS, num_hidden_layers=layers)
    ours = BertForTokenClassification(config, attn).to(dtype)
    theirs = twin(ours, attn)
    for rows, length, mask in cases:
        for train in (False, True):
            assert_same_step(theirs, ours, batch(config, rows, length, mask), train)


@pytest.mark.slow
@DTYPE
@ATTN
@pytest.mark.parametrize("family", OFFICIAL)
def test_official_shapes(family: str, attn: str, dtype: torch.dtype) -> None:
    layers = 1 if is_slow(dtype) else 2
    torch.manual_seed(0)
    config = BertConfig(**OFFICIAL[family], labels=LABELS, num_hidden_layers=layers)
    ours = BertForTokenClassification(config, attn).to(dtype)
    theirs = twin(ours, attn)
    cases = [(2, 17, "dead row")] if is_slow(dtype) else [(5, 33, "dead row"), (1, 512, "full")]
    for rows, length, mask in cases:
        for train in (False, True):
            assert_same_step(theirs, ours, batch(config, rows, length, mask), train)


@pytest.mark.slow
@pytest.mark.parametrize("family", OFFICIAL)
def test_official_masked_language_models(family: str) -> None:
    torch.manual_seed(0)
    ours = BertForMaskedLM(BertConfig(**OFFICIAL[family], num_hidden_layers=1), "sdpa")
    theirs = twin(ours)
    assert_same_step(theirs, ours, batch(ours.config, 3, 33, "right"), train=True)


@DTYPE
@ATTN
def test_real_weights_and_a_fresh_head(minilm: Path, attn: str, dtype: torch.dtype) -> None:
    """MiniLM through both libraries' loaders; both initialise the head from the same seed."""
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
    rows, length = (2, 9) if is_slow(dtype) else (3, 17)
    for train in (False, True):
        for mask in ("none", "right", "dead row"):
            inputs = batch(ours.config, rows, length, mask, segments=False)
            assert_same_step(theirs, ours, inputs, train)


@pytest.mark.parametrize("family", ["K48", *FAMILIES])
def test_initialisation(family: str) -> None:
    """From one seed both libraries draw the same weights and leave the same generator state."""
    torch.manual_seed(5)
    ours = BertForTokenClassification(small_config(**(SHAPES | FAMILIES)[family]))
    state_after = torch.get_rng_state()
    config = config_of(ours)
    torch.manual_seed(5)
    theirs = transformers.AutoModelForTokenClassification.from_config(config)
    assert torch.equal(torch.get_rng_state(), state_after)
    for name, their_name in names_of(ours).items():
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(their_name)), name


@ATTN
@pytest.mark.parametrize("shape", ["K48", *FAMILIES])
def test_masked_language_model(attn: str, shape: str) -> None:
    ours = small_bert(BertForMaskedLM, attn, **(SHAPES | FAMILIES)[shape])
    theirs = twin(ours, attn)
    for train in (False, True):
        assert_same_step(theirs, ours, batch(ours.config, 3, 33, "right"), train)


@pytest.mark.parametrize("shape", ["5 heads", *FAMILIES])
def test_the_saved_config_is_the_one_transformers_reads(tmp_path: Path, shape: str) -> None:
    config = small_config(**(SHAPES | FAMILIES)[shape])
    raw = config_json.to_dict(config, "BertForTokenClassification")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == config.model_type
    assert tuple(theirs.id2label[i] for i in range(25)) == LABELS
    assert theirs.hidden_size == config.hidden_size
    assert config_json.read(tmp_path / "config.json") == config
