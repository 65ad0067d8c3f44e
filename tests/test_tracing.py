"""A trace records what the model computes, applies writes, and leaves the model unchanged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minibert
from minibert import BertForMaskedLM, BertForTokenClassification, Packed
from minibert.speed.prepacked import prepack
from minibert.study.intermediates import names
from tests.builders import small_bert

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [5, 5, 9, 2]
IN_EVAL = [name for name in names(2) if not name.endswith("probs_dropped")]


def inputs(layout: str) -> dict:
    draw = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 53, mask.shape, generator=draw).masked_fill(~mask, 0)
    if layout == "padded":
        return {"input_ids": ids, "attention_mask": mask.long()}
    return {"input_ids": ids[mask], "layout": Packed.from_lengths(LENGTHS)}


def snapshot(net: nn.Module) -> list:
    """Everything a trace could change on a model."""
    return [
        (path, dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(vars(m)))
        for path, m in net.named_modules()
    ]


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_every_intermediate_is_what_the_model_computes(attn: str, layout: str, kind: type) -> None:
    net, batch = small_bert(kind, attn), inputs(layout)
    expected = net(**batch, output_hidden_states=True, output_attentions=attn == "eager")
    with minibert.trace(net) as t:
        got = net(**batch)
    assert torch.equal(got.logits, expected.logits)
    assert list(t) == IN_EVAL
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
        if layout == "padded":  # cut into sentences, as a packed batch has them
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
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_probs_are_before_dropout_in_every_implementation(attn: str, layout: str) -> None:
    net, batch = small_bert(attn=attn, attention_probs_dropout_prob=0.5).train(), inputs(layout)
    torch.manual_seed(2)
    with minibert.trace(net) as t:
        output = net(**batch, output_attentions=attn == "eager")
    for i in range(2):
        scores, probs = t[f"layers.{i}.scores"], t[f"layers.{i}.probs"]
        for s, p in zip(scores, probs):
            assert torch.equal(p, s.softmax(-1))
        name = f"layers.{i}.probs_dropped"
        assert (name in t) == (attn == "eager")
        if attn == "eager":
            assert t.axes(name) == t.axes(f"layers.{i}.probs")
            shares = []
            for p, d, returned in zip(probs, t[name], output.attentions[i]):
                assert torch.equal(d, returned)
                assert torch.equal(d, p.masked_fill(d == 0, 0) * 2)  # 1 / (1 - 0.5)
                shares.append((d == 0)[p > 0].float().mean().item())
            assert 0.4 < sum(shares) / len(shares) < 0.6


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_axes_name_the_shape(layout: str, kind: type) -> None:
    net, batch = small_bert(kind), inputs(layout)
    with minibert.trace(net) as t:
        net(**batch)
    sizes = {"B": 4, "N": sum(LENGTHS), "D": 36, "H": 3, "K": 12, "F": 50, "L": 5, "V": 57}
    sizes["S"] = max(LENGTHS)
    for name in t:
        axes, value = t.axes(name), t[name]
        if axes == "HSS":
            assert [x.shape for x in value] == [(3, n, n) for n in LENGTHS]
        else:
            assert value.shape == tuple(sizes[axis] for axis in axes), name
    assert len(repr(t).splitlines()) == len(IN_EVAL)
    assert t.axes("layers.1.q") == ("BSHK" if layout == "padded" else "NHK")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_tracing_does_not_change_a_training_step(attn: str) -> None:
    net, batch = small_bert(attn=attn).train(), inputs("padded")
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


def test_the_model_is_restored() -> None:
    net, batch = small_bert(attn="eager"), inputs("padded")
    before = snapshot(net)
    with minibert.trace(net) as t, minibert.trace(net) as inner:
        assert snapshot(net) != before
        net(**batch)
    assert list(t) == list(inner) == IN_EVAL
    assert snapshot(net) == before

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("in a write")

    with pytest.raises(RuntimeError, match="in a write"), minibert.trace(net, {"logits": fail}):
        net(**batch)
    assert snapshot(net) == before


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_silencing_a_head_equals_zeroing_its_output_columns(attn: str, layout: str) -> None:
    net, batch = small_bert(attn=attn), inputs(layout)

    def silence(context: Tensor) -> Tensor:
        context[..., 1, :] = 0
        return context

    with torch.no_grad():
        untouched = net(**batch).logits
        with minibert.trace(net, {"layers.0.context": silence}) as t:
            silenced = net(**batch).logits
        assert (t["layers.0.context"][..., 1, :] == 0).all()
        assert torch.equal(net(**batch).logits, untouched)
        net.bert.layers[0].attention.output.weight[:, 12:24] = 0  # head 1 has K = 12 columns
        torch.testing.assert_close(net(**batch).logits, silenced)
    assert not torch.allclose(silenced, untouched, atol=1e-3)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in names(2) if not name.startswith("layers.0")])
def test_every_name_can_be_written(name: str, attn: str, layout: str) -> None:
    """Returning the tensor unchanged keeps the logits (to rounding, where attention is computed
    step by step); returning another one changes them."""
    net, batch = small_bert(attn=attn), inputs(layout)
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
        by_block = name.endswith(("scores", "probs", "probs_dropped"))
        assert len(calls) == (3 if layout == "packed" and by_block else 1)  # 5 5, 9 and 2
        with minibert.trace(net, {name: other}) as t:
            written = net(**batch).logits
    assert torch.equal(t["logits"], written)
    assert name in t
    assert not torch.allclose(written, untouched, atol=1e-3)


def test_a_patched_layer_carries_the_result_of_another_sentence() -> None:
    net = small_bert()
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


@pytest.mark.parametrize("name", ["probs", "probs_dropped"])
def test_written_probs_weight_the_values(name: str) -> None:
    net, batch = small_bert(), inputs("padded")
    uniform = {f"layers.0.{name}": lambda p: torch.full_like(p, 1 / p.shape[-1])}
    with minibert.trace(net, uniform) as t:
        net(**batch)
    mean = t["layers.0.v"].mean(1, keepdim=True).expand_as(t["layers.0.v"])
    torch.testing.assert_close(t["layers.0.context"], mean)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_trace_acts_in_its_own_thread_only(attn: str) -> None:
    """Two threads trace the model with other writes, and end in the order in which they began."""
    net, batch = small_bert(attn=attn), inputs("padded")
    expected, before = net(**batch).logits, snapshot(net)

    def zeroed(name: str):
        return minibert.trace(net, {name: torch.zeros_like})

    with zeroed("layers.0.probs"):
        alone = [net(**batch).logits]
    with zeroed("layers.1.context"):
        alone.append(net(**batch).logits)
    with ThreadPoolExecutor(1) as other:

        def there(call, *arguments):
            return other.submit(call, *arguments).result()

        with zeroed("layers.0.probs") as mine:
            theirs = zeroed("layers.1.context")
            their = there(theirs.__enter__)
            assert torch.equal(there(lambda: net(**batch).logits), alone[1])
            assert not list(mine), "another thread's call was recorded"
            assert torch.equal(net(**batch).logits, alone[0])
            assert torch.equal(their["logits"], alone[1])
            assert torch.equal(mine["logits"], alone[0])
        assert torch.equal(net(**batch).logits, expected)
        assert torch.equal(there(lambda: net(**batch).logits), alone[1])
        there(theirs.__exit__, None, None, None)
        assert torch.equal(there(lambda: net(**batch).logits), expected)
    assert not torch.equal(alone[0], alone[1])
    assert snapshot(net) == before


def test_mistakes_are_named() -> None:
    net, batch = small_bert(), inputs("padded")
    with pytest.raises(ValueError, match=r"did you mean layers\.0\.post_gelu"):
        with minibert.trace(net, {"layers.0.postgelu": lambda x: x}):
            pass
    with pytest.raises(ValueError, match=r"layers\.0\.q returned \(4, 9, 3\)"):
        with minibert.trace(net, {"layers.0.q": lambda x: x[..., 0]}):
            net(**batch)
    with pytest.raises(ValueError, match="returned NoneType"):
        with minibert.trace(net, {"logits": lambda x: None}):
            net(**batch)
    with minibert.trace(net) as t:
        with pytest.raises(KeyError, match="has not run yet"):
            t["logits"]
        net(**batch)
    with pytest.raises(KeyError, match="no such name"):
        t["layers.7.q"]
    assert "layers.7.q" not in t
    prepack(net)
    before = snapshot(net)
    with pytest.raises(ValueError, match="layers are prepacked"):
        with minibert.trace(net):
            pass
    assert snapshot(net) == before
