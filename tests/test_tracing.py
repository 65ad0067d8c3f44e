"""A trace shows what the model computes, changes it where asked, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minibert
from minibert import BertConfig, BertForMaskedLM, BertForTokenClassification, Packed
from minibert.study.trace import LAYER_AXES, names

CONFIG = BertConfig(
    vocab_size=53,
    hidden_size=24,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=40,
    max_position_embeddings=32,
    labels=tuple("abcde"),
)
LENGTHS = [5, 5, 9, 2]


def model(attn: str = "sdpa", kind: type = BertForTokenClassification):
    torch.manual_seed(3)
    built = kind(CONFIG, attn).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built


def inputs(layout: str) -> dict:
    draw = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 53, mask.shape, generator=draw).masked_fill(~mask, 0)
    if layout == "padded":
        return {"input_ids": ids, "attention_mask": mask.long()}
    return {"input_ids": ids[mask], "layout": Packed.from_lengths(LENGTHS)}


def state(net: nn.Module) -> list:
    """Everything a trace could leave on a model."""
    return [
        (path, dict(m._forward_hooks), dict(m._forward_pre_hooks), sorted(vars(m)), vars(m))
        for path, m in net.named_modules()
    ]


def snapshot(net: nn.Module) -> list:
    return [(*entry[:4], dict(entry[4])) for entry in state(net)]


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_every_intermediate_is_what_the_model_computes(attn: str, layout: str, kind: type) -> None:
    net, batch = model(attn, kind), inputs(layout)
    expected = net(**batch, output_hidden_states=True, output_attentions=attn == "eager")
    with minibert.trace(net) as t:
        got = net(**batch)
    assert torch.equal(got.logits, expected.logits)
    assert list(t) == names(2)
    assert torch.equal(t["logits"], expected.logits)
    assert torch.equal(t["embeddings"], expected.hidden_states[0])
    embeddings = net.bert.embeddings
    assert torch.equal(embeddings.norm(t["embeddings.sum"]), t["embeddings"])
    x = t["embeddings"]
    for i, layer in enumerate(net.bert.layers):

        def at(name: str, i: int = i) -> Tensor:
            return t[f"layers.{i}.{name}"]

        assert torch.equal(at("q").flatten(-2), layer.attention.query(x))
        assert torch.equal(at("k").flatten(-2), layer.attention.key(x))
        assert torch.equal(at("v").flatten(-2), layer.attention.value(x))
        scores, probs, v, context = at("scores"), at("probs"), at("v"), at("context")
        if layout == "padded":  # one sentence after the other, as a packed batch gives them
            scores, probs = [s[:, :n, :n] for s, n in zip(scores, LENGTHS)], list(probs)
            v = torch.cat([row[:n] for row, n in zip(v, LENGTHS)])
            context = torch.cat([row[:n] for row, n in zip(context, LENGTHS)])
            if attn == "eager":
                assert torch.equal(at("probs"), expected.attentions[i])
            assert all((p[:, :, n:] == 0).all() for p, n in zip(probs, LENGTHS))
            probs = [p[:, :n, :n] for p, n in zip(probs, LENGTHS)]
        elif attn == "eager":
            assert all(torch.equal(a, b) for a, b in zip(probs, expected.attentions[i]))
        for n, s, p, v_NHK, c_NHK in zip(
            LENGTHS, scores, probs, v.split(LENGTHS), context.split(LENGTHS)
        ):
            assert p.shape == (3, n, n)
            torch.testing.assert_close(p, s.softmax(-1))
            torch.testing.assert_close(c_NHK, torch.einsum("hst,thk->shk", p, v_NHK))
        assert torch.equal(
            at("attention_output"), layer.attention.output(at("context").flatten(-2))
        )
        x = layer.attention_norm(at("attention_output") + x)
        assert torch.equal(at("attention_norm"), x)
        assert torch.equal(at("pre_gelu"), layer.feed_forward.up(x))
        assert torch.equal(at("post_gelu"), F.gelu(at("pre_gelu")))
        assert torch.equal(at("ffn_output"), layer.feed_forward.down(at("post_gelu")))
        x = layer.feed_forward_norm(at("ffn_output") + x)
        assert torch.equal(at("ffn_norm"), x)
        assert torch.equal(x, expected.hidden_states[i + 1])
    assert torch.equal(net.head(x), t["logits"])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_axes_name_the_shape(layout: str) -> None:
    net, batch = model(), inputs(layout)
    with minibert.trace(net) as t:
        net(**batch)
    sizes = {"B": 4, "N": sum(LENGTHS), "D": 24, "H": 3, "K": 8, "F": 40, "L": 5}
    sizes["S"] = max(LENGTHS)
    for name in t:
        axes, value = t.axes(name), t[name]
        if axes == "HSS":
            assert [x.shape for x in value] == [(3, n, n) for n in LENGTHS]
        else:
            assert value.shape == tuple(sizes[axis] for axis in axes), name
    assert len(repr(t).splitlines()) == len(names(2))
    assert t.axes("layers.1.q") == ("BSHK" if layout == "padded" else "NHK")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_step_in_training_is_the_same_with_and_without(attn: str) -> None:
    net, batch = model(attn).train(), inputs("padded")
    labels = batch["input_ids"] % 5

    def step() -> list[Tensor]:
        net.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        net(**batch, labels=labels).loss.backward()
        return [p.grad for p in net.parameters()] + [torch.get_rng_state()]

    plain = step()
    with minibert.trace(net):
        traced = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, traced))


def test_nothing_is_left_on_the_model() -> None:
    net, batch = model("eager"), inputs("padded")
    before = snapshot(net)
    with minibert.trace(net) as t, minibert.trace(net) as inner:
        net(**batch)
    assert list(t) == list(inner) == names(2)
    assert snapshot(net) == before

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("in a write")

    with pytest.raises(RuntimeError, match="in a write"), minibert.trace(net, {"logits": fail}):
        net(**batch)
    assert snapshot(net) == before


def test_the_traces_own_check_sees_a_hook() -> None:
    net = model()
    before = snapshot(net)
    with minibert.trace(net):
        assert snapshot(net) != before


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_silencing_a_head_is_dropping_its_columns_of_the_output(attn: str, layout: str) -> None:
    net, batch = model(attn), inputs(layout)

    def silence(context: Tensor) -> Tensor:
        context[..., 1, :] = 0
        return context

    with torch.no_grad():
        untouched = net(**batch).logits
        with minibert.trace(net, {"layers.0.context": silence}) as t:
            silenced = net(**batch).logits
        assert (t["layers.0.context"][..., 1, :] == 0).all()
        assert torch.equal(net(**batch).logits, untouched)
        net.bert.layers[0].attention.output.weight[:, 8:16] = 0  # head 1 holds K = 8 columns
        torch.testing.assert_close(net(**batch).logits, silenced)
    assert not torch.allclose(silenced, untouched, atol=1e-3)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", names(2))
def test_every_name_can_be_written(name: str, attn: str, layout: str) -> None:
    """Handing back what was given changes nothing (to rounding, where attention is spelled out);
    handing back something else changes the logits."""
    net, batch = model(attn), inputs(layout)
    calls = []

    def same(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x

    def other(x: Tensor) -> Tensor:
        return x.flip(-1) * 1.5

    with torch.no_grad():
        untouched = net(**batch).logits
        with minibert.trace(net, {name: same}):
            torch.testing.assert_close(net(**batch).logits, untouched, rtol=1e-5, atol=1e-5)
        blocks = 3 if layout == "packed" and name.endswith(("scores", "probs")) else 1
        assert len(calls) == blocks  # lengths 5 5 9 2 make three rectangles
        with minibert.trace(net, {name: other}) as t:
            written = net(**batch).logits
    assert torch.equal(t["logits"], written)
    assert not torch.allclose(written, untouched, atol=1e-3)


def test_patching_a_layer_from_another_sentence_carries_its_answer_over() -> None:
    net = model()
    one, two = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[9, 8, 7, 1]])
    with minibert.trace(net) as t:
        answer = net(two).logits
    last = t["layers.1.ffn_norm"]
    with minibert.trace(net, {"layers.1.ffn_norm": lambda x: last}):
        assert torch.equal(net(one).logits, answer)
    first = t["layers.0.v"]
    with minibert.trace(net, {"layers.0.v": lambda x: first}):
        patched = net(one).logits
    assert not torch.allclose(patched, answer, atol=1e-3)
    assert not torch.allclose(patched, net(one).logits, atol=1e-3)


def test_written_probs_are_the_ones_that_weight_the_values() -> None:
    net, batch = model("sdpa"), inputs("padded")
    uniform = {"layers.0.probs": lambda p: torch.full_like(p, 1 / p.shape[-1])}
    with minibert.trace(net, uniform) as t:
        net(**batch)
    mean = t["layers.0.v"].mean(1, keepdim=True).expand_as(t["layers.0.v"])
    torch.testing.assert_close(t["layers.0.context"], mean)


def test_mistakes_are_named() -> None:
    net, batch = model(), inputs("padded")
    with pytest.raises(ValueError, match=r"did you mean layers\.0\.post_gelu"):
        with minibert.trace(net, {"layers.0.postgelu": lambda x: x}):
            pass
    with pytest.raises(ValueError, match=r"layers\.0\.q gave \(4, 9, 3\)"):
        with minibert.trace(net, {"layers.0.q": lambda x: x[..., 0]}):
            net(**batch)
    with pytest.raises(ValueError, match="gave NoneType"):
        with minibert.trace(net, {"logits": lambda x: None}):
            net(**batch)
    with minibert.trace(net) as t:
        with pytest.raises(KeyError, match="nothing ran yet"):
            t["logits"]
        net(**batch)
    with pytest.raises(KeyError, match="no such name"):
        t["layers.7.q"]
    assert "layers.7.q" not in t
    assert set(LAYER_AXES) == {n.rpartition(".")[2] for n in names(1) if n.startswith("layers")}


def test_trace_stays_a_function_after_its_module_is_imported() -> None:
    code = "import minibert.study.trace, minibert; minibert.trace(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # a generator context manager: nothing runs yet
