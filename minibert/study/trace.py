"""Record what a model computes while it runs, and change it on the way.

    with minibert.trace(model) as t:
        model(input_ids, attention_mask)
    t["layers.3.probs"]         # (B, H, S, S)
    t.axes("layers.3.probs")    # "BHSS"

    def silence(context):       # ablate head 5 of layer 0
        context[..., 5, :] = 0
        return context

    with minibert.trace(model, {"layers.0.context": silence}):
        logits = model(input_ids, attention_mask).logits

intermediates.py has the table of the names. The model knows nothing of tracing: hooks record it.
They are removed when the block ends, also after an error. Only attention and the add-norm are
wrapped, because hooks cannot see inside them. A trace acts in the thread that began it: what other
threads compute with the same model at the same time is neither recorded nor changed.

Shape legend: model/layout.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.files import did_you_mean
from minibert.model import attention, encoder
from minibert.model.attention import Attended, AttentionFn
from minibert.model.encoder import EncoderLayer
from minibert.model.heads import BertForMaskedLM, BertWithHead
from minibert.model.layout import Layout, Padded
from minibert.study.intermediates import INTERMEDIATES, intermediate_of, names

Write = Callable[[Tensor], Tensor]
MAPS = [row.name for row in INTERMEDIATES.values() if row.is_map]


class Trace:
    """What the latest call of a traced model computed, by name."""

    def __init__(self, writes: Mapping[str, Write], classes: str):
        self._thread = threading.get_ident()
        self._writes = writes
        self._classes = classes  # the axis of the logits
        self._layout: Layout | None = None
        self._seen: dict[str, Tensor | list[Tensor]] = {}  # flat over tokens; maps: by block

    def __getitem__(self, name: str) -> Tensor | list[Tensor]:
        """The tensor of this name as the model used it: after a write, what was written.

        Its leading axes are (B, S) for a padded batch and (N,) for a packed one. Scores and
        probabilities are (B, H, S, S), for a packed batch a list with one (H, S, S) per sentence.

        Raises:
            KeyError: the model has not run yet, or did not compute anything of this name.
        """
        if name not in self._seen:
            reason = _unknown(name, self._seen) if self._seen else "the model has not run yet"
            raise KeyError(f"{name!r}: {reason}")
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
        """The axes of ``t[name]``, one letter each.

        "BSHK" for a padded batch, "NHK" for a packed one; for the maps "BHSS", and "HSS" for each
        sentence of a packed batch.

        Raises:
            KeyError: no model computes anything of this name.
        """
        padded, row = isinstance(self._layout, Padded), intermediate_of(name)
        if row.is_map:
            return "BHSS" if padded else "HSS"
        return ("BS" if padded else "N") + (self._classes if name == "logits" else row.axes)

    def __repr__(self) -> str:
        return "\n".join(f"{name:28} {self.axes(name):5} {_shape(self[name])}" for name in self)

    @property
    def _acts(self) -> bool:
        """Whether this is the thread of the trace."""
        return threading.get_ident() == self._thread

    def _start(self, layout: Layout) -> None:
        self._layout = layout
        self._seen = {}

    def _see(self, name: str, x_N: Tensor) -> Tensor:
        """Apply the write to a tensor that is flat over tokens, record the result and return it."""
        if name in self._writes:
            assert self._layout is not None
            x_N = self._written(name, self._layout.unflatten(x_N)).reshape(x_N.shape)
        self._seen[name] = x_N
        return x_N

    def _written(self, name: str, x: Tensor) -> Tensor:
        if name not in self._writes:
            return x
        # A copy: the write may work in place, and the model may still need the original.
        new = self._writes[name](x.clone())
        if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype:
            got = f"{_shape(new)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the write to {name} returned {got}: return a tensor of {_shape(x)} {x.dtype}"
            )
        return new


@contextmanager
def trace(model: BertWithHead, writes: Mapping[str, Write] | None = None) -> Iterator[Trace]:
    """Record this thread's calls of ``model`` inside the block, and replace intermediates.

    The recorded tensors belong to the autograd graph: ``detach()`` those that you keep.

    An attention implementation does not return its scores, and only eager returns probabilities.
    The missing ones are computed again from q and k, without a graph. ``probs`` are always those
    before dropout. ``probs_dropped`` exist only where dropout is visible: in train mode with eager
    attention, and wherever one of the three is written. Attention is then computed step by step
    (scores, softmax, dropout, weighted sum), whatever the implementation.

    Args:
        model: with either head; its layers must not be prepacked.
        writes: maps a name to a function that takes a copy of the tensor, shaped like
            ``t[name]``, and returns the tensor to use instead, of the same shape and dtype. For
            scores and probabilities it takes (rows, H, S, S): a packed batch calls it once for each
            block of ``layout.blocks``.

    Raises:
        ValueError: a write to an unknown name or one that returns another shape or dtype, or a
            model with prepacked layers.
    """
    writes = dict(writes or {})
    known = names(len(model.bert.layers))
    for name in writes:
        if name not in known:
            raise ValueError(f"{name!r} cannot be written: {_unknown(name, known)}")
    t = Trace(writes, "V" if isinstance(model, BertForMaskedLM) else "L")
    with ExitStack() as undo:

        def on_output(module: nn.Module, name: str) -> None:
            hook = module.register_forward_hook(
                lambda _m, _args, out: t._see(name, out) if t._acts else None
            )
            undo.callback(hook.remove)

        def on_input(module: nn.Module, name: str) -> None:
            hook = module.register_forward_pre_hook(
                lambda _m, args: (t._see(name, args[0]),) if t._acts else None
            )
            undo.callback(hook.remove)

        start = model.bert.register_forward_pre_hook(
            lambda _m, args: t._start(args[2]) if t._acts else None
        )
        undo.callback(start.remove)
        on_input(model.bert.embeddings.norm, "embeddings.sum")
        on_output(model.bert.embeddings, "embeddings")
        for i, layer in enumerate(model.bert.layers):
            if not isinstance(layer, EncoderLayer):
                raise ValueError(
                    "the encoder layers are prepacked and have no plain weights to trace: load the "
                    "model with from_pretrained, or the Tagger with prepack=False"
                )
            prefix = f"layers.{i}."
            undo.enter_context(_wrapped(layer.attention, "attend", t, partial(_attend, t, prefix)))
            # The fused add-norm does not call the LayerNorm module, so hooks would not see it.
            undo.enter_context(_wrapped(layer, "add_norm", t, lambda _, *x: encoder.add_norm(*x)))
            on_output(layer.attention.output, prefix + "attention_output")
            on_output(layer.attention_norm, prefix + "attention_norm")
            on_output(layer.feed_forward.up, prefix + "pre_gelu")
            on_input(layer.feed_forward.down, prefix + "post_gelu")
            on_output(layer.feed_forward.down, prefix + "ffn_output")
            on_output(layer.feed_forward_norm, prefix + "ffn_norm")
        on_output(model.head, "logits")
        yield t


class _Wrapped:
    """A function of a module, and the traces that change it, each in its own thread."""

    def __init__(self, function: Callable):
        self.function = function
        self.changes: list[tuple[Trace, Callable]] = []  # the latest last

    def __call__(self, *arguments):
        function = self.function
        for t, change in tuple(self.changes):
            if t._acts:
                function = partial(change, function)
        return function(*arguments)


_LOCK = threading.Lock()  # traces in several threads may begin and end in any order


@contextmanager
def _wrapped(module: nn.Module, name: str, t: Trace, change: Callable) -> Iterator[None]:
    """Inside the block, in the trace's thread, call ``change(function, ...)`` for a function.

    Args:
        module: has the function.
        name: of its attribute.
        t: the trace.
        change: takes the function and its arguments.
    """
    with _LOCK:
        function = getattr(module, name)
        if not isinstance(function, _Wrapped):
            function = _Wrapped(function)
            setattr(module, name, function)
        function.changes.append((t, change))
    try:
        yield
    finally:
        with _LOCK:
            function.changes.remove((t, change))
            if not function.changes:
                setattr(module, name, function.function)


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
    """``attend``, recorded and written: q, k, v, scores, probabilities and context."""
    q_NHK, k_NHK, v_NHK = (
        t._see(prefix + name, x) for name, x in zip("qkv", (q_NHK, k_NHK, v_NHK))
    )
    if t._writes.keys() & {prefix + name for name in MAPS}:
        maps, attended = _step_by_step(t, prefix, q_NHK, k_NHK, v_NHK, layout, dropout_p)
    else:
        attended = attend(q_NHK, k_NHK, v_NHK, layout, dropout_p)
        with torch.no_grad():
            blocks = attention.rectangles(layout, q_NHK, k_NHK, v_NHK)
            scores = [attention.scores(block, q, k) for block, q, k, _ in blocks]
            maps = [scores, [F.softmax(scores_BHSS, dim=-1) for scores_BHSS in scores]]
        if attended.probs is not None:  # those of the computation: dropped, or the probs themselves
            maps = [*maps, attended.probs] if dropout_p else [scores, attended.probs]
    t._seen |= zip([prefix + name for name in MAPS], maps)
    return Attended(t._see(prefix + "context", attended.context_NHK), attended.probs)


def _step_by_step(
    t: Trace,
    prefix: str,
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    layout: Layout,
    dropout_p: float,
) -> tuple[list[list[Tensor]], Attended]:
    """Attention with writes to its scores and probabilities: these maps, and the result."""
    scores, probs, dropped, contexts = [], [], [], []
    for block, q, k, v in attention.rectangles(layout, q_NHK, k_NHK, v_NHK):
        scores.append(t._written(prefix + "scores", attention.scores(block, q, k)))
        probs.append(t._written(prefix + "probs", F.softmax(scores[-1], dim=-1)))
        dropped.append(t._written(prefix + "probs_dropped", F.dropout(probs[-1], dropout_p)))
        contexts.append(torch.matmul(dropped[-1], v).transpose(1, 2).flatten(0, 1))
    return [scores, probs, dropped], Attended(torch.cat(contexts), dropped)


def _unknown(name: str, known: Iterable[str]) -> str:
    return "no such name" + did_you_mean(name, known)


def _shape(value: Tensor | list[Tensor]) -> str:
    if isinstance(value, list):
        return " ".join(_shape(x) for x in value)
    return "(" + ", ".join(map(str, value.shape)) + ")"
