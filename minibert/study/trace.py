"""Look inside a model while it runs, and change what it computes on the way.

    with minibert.trace(model) as t:
        model(input_ids, attention_mask)
    t["layers.3.probs"]         # (B, H, S, S)
    t.axes("layers.3.probs")    # "BHSS"

    def silence(context):       # ablate head 5 of layer 0
        context[..., 5, :] = 0
        return context

    with minibert.trace(model, {"layers.0.context": silence}):
        logits = model(input_ids, attention_mask).logits

What can be read and written, in the order in which it is computed (``names`` lists it):

  embeddings.sum             word + segment + position, before LayerNorm    D
  embeddings                 what enters the first layer                    D
  layers.I.q  .k  .v         queries, keys, values                          HK
  layers.I.scores            q kᵀ / √K + mask                               (B, H, S, S)
  layers.I.probs             their softmax                                  (B, H, S, S)
  layers.I.context           the values weighted by it                      HK
  layers.I.attention_output  context through the output projection          D
  layers.I.attention_norm    LayerNorm(attention output + x)                D
  layers.I.pre_gelu          the wide layer                                 F
  layers.I.post_gelu         GELU of it                                     F
  layers.I.ffn_output        back to D                                      D
  layers.I.ffn_norm          LayerNorm(ffn output + x): the layer's output  D
  logits                     classes, V or L                                L

The model knows nothing of this: it is watched by hooks, which are gone when the block ends, after
an error too. Only attention and the head are wrapped, because hooks cannot reach inside them.
Shape legend: layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import attention, encoder
from minibert.model.attention import Attended, AttentionFn
from minibert.model.encoder import EncoderLayer
from minibert.model.heads import BertWithHead
from minibert.model.layout import Layout, Padded

Write = Callable[[Tensor], Tensor]

LAYER_AXES = {  # what a layer computes, in order; the token axis comes before each but the maps
    "q": "HK",
    "k": "HK",
    "v": "HK",
    "scores": "HSS",
    "probs": "HSS",
    "context": "HK",
    "attention_output": "D",
    "attention_norm": "D",
    "pre_gelu": "F",
    "post_gelu": "F",
    "ffn_output": "D",
    "ffn_norm": "D",
}
MAPS = {"scores", "probs"}


def names(layers: int) -> list[str]:
    """Every name of a model of that many layers, in the order of computation."""
    inside = [f"layers.{i}.{name}" for i in range(layers) for name in LAYER_AXES]
    return ["embeddings.sum", "embeddings", *inside, "logits"]


class Trace:
    """What a traced model computed in its latest call, by name."""

    def __init__(self, writes: Mapping[str, Write]):
        self._writes = writes
        self._layout: Layout | None = None
        self._seen: dict[str, Tensor | list[Tensor]] = {}  # flat over tokens; maps: by block

    def __getitem__(self, name: str) -> Tensor | list[Tensor]:
        """The tensor of that name, as it was used: after a write, what was written.

        For a padded batch the leading axes are (B, S), for a packed one (N,); the maps are
        (B, H, S, S), and of a packed batch a list with one (H, S, S) a sentence.

        Raises:
            KeyError: no call of the model yet, or no such name.
        """
        if name not in self._seen:
            raise KeyError(
                f"{name!r}: " + (_unknown(name, self._seen) if self._seen else "nothing ran yet")
            )
        value = self._seen[name]
        assert self._layout is not None
        if isinstance(value, list):
            return self._layout.unflatten_maps(value)
        return self._layout.unflatten(value)

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of computation."""
        return iter(self._seen)

    def __contains__(self, name: str) -> bool:
        return name in self._seen

    def axes(self, name: str) -> str:
        """The axes of ``t[name]``, a letter each (legend: layout.py).

        "BSHK" for a padded batch, "NHK" for a packed one; maps "BHSS", packed "HSS" a sentence.
        """
        padded = isinstance(self._layout, Padded)
        last = name.rpartition(".")[2]
        if last in MAPS:
            return "BHSS" if padded else "HSS"
        own = "L" if name == "logits" else LAYER_AXES.get(last, "D")
        return ("BS" if padded else "N") + own

    def __repr__(self) -> str:
        return "\n".join(f"{name:28} {self.axes(name):5} {_shape(self[name])}" for name in self)

    def _start(self, layout: Layout) -> None:
        self._layout = layout
        self._seen = {}

    def _see(self, name: str, x_N: Tensor) -> Tensor:
        """Let a write change a tensor that is flat over tokens, keep it, and hand it on."""
        if name in self._writes:
            assert self._layout is not None
            x_N = self._written(name, self._layout.unflatten(x_N)).reshape(x_N.shape)
        self._seen[name] = x_N
        return x_N

    def _written(self, name: str, x: Tensor) -> Tensor:
        # A copy, so that a write may work in place on what the model still needs.
        new = self._writes[name](x.clone())
        if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype:
            got = f"{_shape(new)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the write of {name} gave {got}: return a tensor of {_shape(x)} {x.dtype}"
            )
        return new


@contextmanager
def trace(model: BertWithHead, writes: Mapping[str, Write] | None = None) -> Iterator[Trace]:
    """Within the block, every call of ``model`` is recorded and its intermediates may be replaced.

    The tensors are those of the computation, graph included; ``detach()`` what outlives it. No
    attention implementation keeps scores and only eager keeps maps, so what is missing is computed
    once more from q and k (without a graph, and without dropout). A write to them makes this
    recomputation the one that counts: softmax, dropout and the weighted sum are then spelled out,
    whatever the implementation.

    Args:
        model: either head.
        writes: by name, a function that is given a copy of the tensor, shaped as ``t[name]`` is,
            and returns the one to go on with (of the same shape and dtype). ``scores`` and
            ``probs`` are given (rows, H, S, S), for a packed batch once for every block of
            ``layout.blocks``.

    Raises:
        ValueError: a write to a name that does not exist, or one that returns another shape; or
            the model's layers are prepacked.
    """
    writes = dict(writes or {})
    known = names(len(model.bert.layers))
    for name in writes:
        if name not in known:
            raise ValueError(f"{name!r} cannot be written: {_unknown(name, known)}")
    t = Trace(writes)
    with ExitStack() as undo:

        def on_output(module: nn.Module, name: str) -> None:
            hook = module.register_forward_hook(lambda _m, _args, out: t._see(name, out))
            undo.callback(hook.remove)

        def on_input(module: nn.Module, name: str) -> None:
            hook = module.register_forward_pre_hook(lambda _m, args: (t._see(name, args[0]),))
            undo.callback(hook.remove)

        start = model.bert.register_forward_pre_hook(lambda _m, args: t._start(args[2]))
        undo.callback(start.remove)
        on_input(model.bert.embeddings.norm, "embeddings.sum")
        on_output(model.bert.embeddings, "embeddings")
        for i, layer in enumerate(plain_layers(model)):
            prefix = f"layers.{i}."
            attend = layer.attention.attend
            undo.callback(setattr, layer.attention, "attend", attend)
            layer.attention.attend = partial(_attend, t, prefix, attend)
            # The fused one would pass by the hooks.
            undo.callback(setattr, layer, "add_norm", layer.add_norm)
            layer.add_norm = encoder.add_norm
            on_output(layer.attention.output, prefix + "attention_output")
            on_output(layer.attention_norm, prefix + "attention_norm")
            on_output(layer.feed_forward.up, prefix + "pre_gelu")
            on_input(layer.feed_forward.down, prefix + "post_gelu")
            on_output(layer.feed_forward.down, prefix + "ffn_output")
            on_output(layer.feed_forward_norm, prefix + "ffn_norm")
        on_output(model.head, "logits")
        yield t


def plain_layers(model: BertWithHead) -> list[EncoderLayer]:
    """The encoder layers of a model.

    Raises:
        ValueError: they are prepacked and have no parts to look into.
    """
    layers = [layer for layer in model.bert.layers if isinstance(layer, EncoderLayer)]
    if len(layers) < len(model.bert.layers):
        raise ValueError(
            "the encoder layers are prepacked and keep no plain weights: load the model with "
            "from_pretrained, or the Tagger with prepack=False"
        )
    return layers


def _attend(
    t: Trace,
    prefix: str,
    attend: AttentionFn,
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    layout: Layout,
    dropout_p: float,
) -> Attended:
    """``attend`` with q, k, v, scores, probabilities and context seen and written."""
    q_NHK, k_NHK, v_NHK = (
        t._see(prefix + name, x) for name, x in zip("qkv", (q_NHK, k_NHK, v_NHK))
    )
    if prefix + "scores" in t._writes or prefix + "probs" in t._writes:
        scores, probs, attended = _spelled_out(t, prefix, q_NHK, k_NHK, v_NHK, layout, dropout_p)
    else:
        attended = attend(q_NHK, k_NHK, v_NHK, layout, dropout_p)
        with torch.no_grad():
            blocks = attention.rectangles(layout, q_NHK, k_NHK, v_NHK)
            scores = [attention.scores(block, q, k) for block, q, k, _ in blocks]
            probs = attended.probs or [F.softmax(s_BHSS, dim=-1) for s_BHSS in scores]
    t._seen[prefix + "scores"] = scores
    t._seen[prefix + "probs"] = probs
    return Attended(t._see(prefix + "context", attended.context_NHK), attended.probs)


def _spelled_out(
    t: Trace,
    prefix: str,
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    layout: Layout,
    dropout_p: float,
) -> tuple[list[Tensor], list[Tensor], Attended]:
    """Scores, probabilities and what follows from them, with the writes to them done."""

    def written(name: str, x_BHSS: Tensor) -> Tensor:
        return t._written(name, x_BHSS) if name in t._writes else x_BHSS

    scores, probs, dropped, contexts = [], [], [], []
    for block, q, k, v in attention.rectangles(layout, q_NHK, k_NHK, v_NHK):
        scores.append(written(prefix + "scores", attention.scores(block, q, k)))
        probs.append(written(prefix + "probs", F.softmax(scores[-1], dim=-1)))
        dropped.append(F.dropout(probs[-1], dropout_p))
        contexts.append(torch.matmul(dropped[-1], v).transpose(1, 2).flatten(0, 1))
    return scores, probs, Attended(torch.cat(contexts), dropped)


def _unknown(name: str, known: Mapping[str, object] | list[str]) -> str:
    close = get_close_matches(name, list(known), 3)
    return "no such name" + (f", did you mean {', '.join(close)}" if close else "")


def _shape(value: Tensor | list[Tensor]) -> str:
    if isinstance(value, list):
        return " ".join(_shape(x) for x in value)
    return "(" + ", ".join(map(str, value.shape)) + ")"
