"""A packed batch gives the results of the padded one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from builders import SMALL_FAMILIES, padded_and_packed, small_bert, small_config, twin
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import BertForMaskedLM, BertForTokenClassification, Packed
from minibert.machine import Chosen
from minibert.model.layout import Padded
from minibert.pretrained.weights import names_of
from minibert.speed import fused
from minibert.speed.cuda import FusedUnavailableError
from minibert.speed.fused import choose

MIXES = {
    "one": [1],
    "mixed": [1, 12, 7, 31, 7, 7, 2],
    "sorted": [3, 3, 3, 8, 8, 40],
    "long": [128, 5, 127],
}


def model(attn: str, dtype: torch.dtype) -> BertForTokenClassification:
    sizes = {"hidden_size": 96, "intermediate_size": 200, "max_position_embeddings": 128}
    return small_bert(attn=attn, **sizes).to(dtype)


def batch(lengths: list[int]) -> tuple[dict, dict, torch.Tensor]:
    return padded_and_packed(lengths, small_config())


def run(model: BertForTokenClassification, inputs: dict):
    model.zero_grad()
    output = model(**inputs, output_hidden_states=True)
    output.loss.backward()
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    return output, gradient


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("mix", MIXES)
def test_packed_equals_padded_in_float64(mix: str, attn: str) -> None:
    padded_inputs, packed_inputs, mask = batch(MIXES[mix])
    net = model(attn, torch.float64)
    padded, padded_gradient = run(net, padded_inputs)
    packed, packed_gradient = run(net, packed_inputs)
    assert packed.logits.shape == (sum(MIXES[mix]), 5)
    for a, b in zip(packed.hidden_states, padded.hidden_states):
        assert (a - b[mask]).abs().max() < 1e-10
    assert (packed.logits - padded.logits[mask]).abs().max() < 1e-10
    assert abs(packed.loss - padded.loss) < 1e-10
    assert (packed_gradient - padded_gradient).abs().max() < 1e-10


@pytest.mark.parametrize("family", SMALL_FAMILIES)
@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
def test_packed_equals_padded_in_every_family(family: str, kind: type) -> None:
    """Padding pieces inside sentences included: RoBERTa counts positions without them."""
    net = small_bert(kind, **SMALL_FAMILIES[family]).double()
    lengths = MIXES["mixed"]
    padded_inputs, packed_inputs, mask = padded_and_packed(lengths, net.config)
    pad = net.config.pad_token_id
    ids = padded_inputs["input_ids"].masked_fill(~mask, pad)
    ids[1, [0, 4, 5]] = ids[3, 30] = pad
    padded_inputs["input_ids"], packed_inputs["input_ids"] = ids, ids[mask]
    padded, padded_gradient = run(net, padded_inputs)
    packed, packed_gradient = run(net, packed_inputs)
    assert (packed.logits - padded.logits[mask]).abs().max() < 1e-10
    assert abs(packed.loss - padded.loss) < 1e-10
    assert (packed_gradient - padded_gradient).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("mix", MIXES)
def test_packed_error_is_within_twice_the_references_own(
    mix: str, attn: str, dtype: torch.dtype
) -> None:
    """Errors are measured against float64, with the weights already rounded to ``dtype``."""
    padded_inputs, packed_inputs, mask = batch(MIXES[mix])
    net = model(attn, dtype)
    truth, true_gradient = run(model(attn, dtype).double(), padded_inputs)
    theirs = twin(net, attn)
    expected = theirs(**padded_inputs)
    expected.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    their_gradient = torch.cat([grads[n].flatten().double() for n in names_of(net).values()])

    packed, gradient = run(net, packed_inputs)
    floor = torch.finfo(dtype).eps  # the reference can be exact by accident
    error = (packed.logits - truth.logits[mask]).abs().max()
    their_error = (expected.logits - truth.logits).abs()[mask].max()
    assert error <= 2 * their_error + floor
    assert (gradient - true_gradient).norm() <= 2 * (their_gradient - true_gradient).norm() + floor


def test_attention_maps_of_a_packed_batch() -> None:
    padded_inputs, packed_inputs, _ = batch(MIXES["mixed"])
    net = model("eager", torch.float64)
    padded = net(**padded_inputs, output_attentions=True).attentions
    packed = net(**packed_inputs, output_attentions=True).attentions
    assert len(packed) == 2
    for maps, rectangle in zip(packed, padded):
        assert len(maps) == len(MIXES["mixed"])
        for row, (map_HSS, length) in enumerate(zip(maps, MIXES["mixed"])):
            assert map_HSS.shape == (3, length, length)
            assert (map_HSS - rectangle[row, :, :length, :length]).abs().max() < 1e-12


def test_dropout_is_drawn_in_a_packed_batch() -> None:
    _, packed_inputs, _ = batch(MIXES["mixed"])
    net = model("sdpa", torch.float32).train()
    torch.manual_seed(0)
    first = net(**packed_inputs).loss
    assert net(**packed_inputs).loss != first
    torch.manual_seed(0)
    assert net(**packed_inputs).loss == first


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread has one order")
def test_a_packed_gradient_is_the_same_every_time() -> None:
    """The order in which threads add to the position table's gradient is fixed."""
    draw = torch.Generator().manual_seed(0)
    layout = Packed.from_lengths([20] * 400)
    table_PD = torch.randn(64, 96, generator=draw, requires_grad=True)
    upstream_ND = torch.randn(8000, 96, generator=draw)
    gradients = []
    for _ in range(10):
        table_PD.grad = None
        layout.spread_positions(table_PD).backward(upstream_ND)
        gradients.append(table_PD.grad)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_a_packed_layout_covers_every_token_once(lengths: list[int]) -> None:
    layout = Packed.from_lengths(lengths)
    assert layout.starts.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert layout.starts.dtype == torch.int32
    assert layout.position_N.tolist() == [i for length in lengths for i in range(length)]
    assert [block.length for block in layout.blocks for _ in range(block.rows)] == lengths
    neighbours = [block.length for block in layout.blocks]
    assert all(a != b for a, b in pairwise(neighbours)), "a block is as long as it can be"


def test_a_mask_that_hides_nothing_is_no_mask() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert Padded.from_mask(ids, torch.ones(2, 3)).valid_BS is None
    assert Padded.from_mask(ids, None).valid_BS is None
    hidden = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert Padded.from_mask(ids, hidden).valid_BS.tolist() == hidden.bool().tolist()


def test_starts_of_a_padded_batch() -> None:
    ids = torch.zeros(3, 4, dtype=torch.long)
    full = Padded.from_mask(ids, None)
    full_starts = fused.starts(full, torch.device("cpu"))
    assert full_starts.tolist() == [0, 4, 8, 12]
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    holed = Padded.from_mask(ids, mask)
    tokens, starts = fused.real_tokens(holed)
    assert starts.tolist() == [0, 2, 2, 6]
    assert tokens.tolist() == [0, 2, 8, 9, 10, 11]
    assert full_starts.dtype == starts.dtype == torch.int32


def test_fused_without_a_gpu_says_so() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    net = small_bert(attn="fused")
    with pytest.raises(FusedUnavailableError, match="needs a CUDA device, not cpu: use attn_impl"):
        net(ids)
    choice = choose("auto", torch.device("cpu"), torch.float32, 32)
    assert choice == Chosen("sdpa", "fused attention needs a CUDA device, not cpu")
    with pytest.raises(FusedUnavailableError):
        choose("fused", torch.device("cpu"), torch.float16, 64)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_sentences_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be positive"):
        Packed.from_lengths(lengths)


def test_arguments_that_do_not_fit_are_refused() -> None:
    net = model("sdpa", torch.float32)
    ids = torch.ones(2, 5, dtype=torch.long)
    layout = Packed.from_lengths([2, 3])
    with pytest.raises(ValueError, match="eager"):
        net(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        net(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="labels has shape"):
        net(ids, labels=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="has no padding"):
        net(ids[0], attention_mask=torch.ones(5), layout=layout)
    with pytest.raises(ValueError, match="holds 5 tokens"):
        net(ids.flatten(), layout=layout)
    with pytest.raises(ValueError, match="128 positions"):
        net(torch.ones(1, 129, dtype=torch.long))
    with pytest.raises(ValueError, match="give \\(B, S\\)"):
        net(ids[0])
    with pytest.raises(ValueError, match="choose one of eager"):
        small_bert(attn="flash")
