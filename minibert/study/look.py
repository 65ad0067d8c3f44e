"""What a model computes for one text: predictions by layer, attention by head, and word-pieces.

    view = look(tagger, "who directed jaws")
    view.maps[3][5]        # attention of layer 3, head 5: (S, S), each row attends to the columns
    view.predictions[2]    # the head's best label of every piece after layer 1
    print(terminal(view))

A masked language model predicts word-pieces instead: its head applied to every layer is the "logit
lens" (nostalgebraist 2020). An encoder without a head has attention only.

look_page.py writes it as an HTML page and look_png.py as a picture. ``trace`` reads everything, so
any attention implementation will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from minibert.files import MinibertError
from minibert.machine import name_of
from minibert.model.heads import BertForMaskedLM
from minibert.pretrained.tokenizer import BYTE_LEVEL, WORDPIECE, Tokenizer
from minibert.study.trace import trace
from minibert.tagging.tagger import Tagger
from minibert.tagging.words import Entity, Label, Words, entities, split
from minibert.text.batches import Example, examples_of, packed, padded

# A mask in a text, as BERT or as RoBERTa writes it: either stands for that of the tokenizer.
MASK = re.compile("|".join(re.escape(kind.mask) for kind in (WORDPIECE, BYTE_LEVEL)))
WIDEST = 12  # characters of a label in the terminal
ERASED = 64  # most words of a text for which every word is erased in turn
BEST = 5  # predictions of a masked language model that are kept for each piece
COLUMNS = 80  # of the terminal


@dataclass(frozen=True)
class Untagged:
    """A model that does not label words: a masked language model, or an encoder alone.

    Args:
        model: its head counts only if the checkpoint has one.
        tokenizer: of the same checkpoint.
        pack: run a packed batch.
    """

    model: BertForMaskedLM
    tokenizer: Tokenizer
    pack: bool = True

    @property
    def has_head(self) -> bool:
        """Whether the head comes from the checkpoint."""
        report = self.model.load_report
        return not any(name.startswith(("cls.", "lm_head.")) for name in report.initialised)


@dataclass(frozen=True, eq=False)
class View:
    """One text in a model, as S word-pieces with [CLS] and [SEP].

    A text longer than the model is split into windows, and the view is of one of them. ``words``,
    ``spans``, ``labels`` and ``entities`` are those of the whole text, the other fields those of
    the window.
    """

    text: str
    words: list[str]
    spans: list[tuple[int, int]]  # of each word in the text, in characters
    labels: list[Label]  # of each word, chosen by the tagger
    entities: list[Entity]
    window: int  # from 1
    windows: int
    pieces: list[str]  # S
    ids: list[int]  # S
    word_of: list[int | None]  # S; None: [CLS], [SEP], or a word that another window labels
    firsts: list[int]  # the first piece of every word that this window labels
    label_names: tuple[str, ...]  # empty, as ``labels`` and ``entities``, unless of a tagger
    predictions: list[list[Label]]  # [embeddings, layer 0, ...][S]: best of each piece; or empty
    best: list[list[list[Label]]]  # the same for a masked language model: the ``BEST`` best
    masks: list[int]  # the pieces that it was asked to predict
    maps: list[Tensor]  # by layer: (H, S, S) float32 on the CPU
    # [erased word][word]: the labels without that word, itself None; empty for more than ERASED
    erased: list[list[Label | None]]
    attn: str
    dtype: str
    layout: str

    def _repr_html_(self) -> str:
        """The page of ``minibert trace --html`` in a notebook, kept apart from its scripts."""
        from minibert.study.look_page import page

        return (
            f'<iframe srcdoc="{escape(page("minibert", self))}" sandbox="allow-scripts" '
            'style="width: 100%; height: 900px; border: 0" title="minibert trace"></iframe>'
        )


def look(reader: Tagger | Untagged, text: str, window: int = 1) -> View:
    """Run a text through a model and keep its attention maps and the predictions of each layer.

    Args:
        reader: a tagger with plain layers (``prepack=False``), or a model that does not tag, in
            whose text ``[MASK]`` or ``<mask>`` is a piece to predict; ``pack`` decides the layout.
        text: with at least one word.
        window: which window of a text longer than the model, from 1.

    Raises:
        MinibertError: the text has no word or no such window.
        ValueError: the layers are prepacked.
    """
    tagger = reader if isinstance(reader, Tagger) else None
    model, tokenizer = reader.model, reader.tokenizer
    words = split(text) if tagger else _split_at_masks(text)
    read = [None if not tagger and MASK.fullmatch(word) else word for word in words.words]
    examples = examples_of([read], tokenizer, model.config.max_length)
    if not examples:
        raise MinibertError("the text has no word: give a sentence")
    count = len(examples)
    if not 1 <= window <= count:
        raise MinibertError(f"window {window}: the text has {count}: give one from 1 to {count}")
    example = examples[window - 1]
    device = model.device
    if reader.pack:
        batch = packed([example], device)
    else:
        batch = padded([example], tokenizer.pad_id, device=device)
    layers = range(model.config.num_hidden_layers)
    with torch.no_grad():
        with trace(model) as t:
            model(**batch.inputs)
        states = [
            _flat(t[name]) for name in ("embeddings", *(f"layers.{i}.ffn_norm" for i in layers))
        ]
        names: Sequence[str] = model.config.labels
        labels: list[Label] = []
        predictions: list[list[Label]] = []
        best: list[list[list[Label]]] = []
        if isinstance(reader, Tagger):
            predictions = [[row[0] for row in _best(model.head(x_SD), names, 1)] for x_SD in states]
            (labels,) = reader.label([words.words])
        elif reader.has_head:
            names = _pieces_by_id(tokenizer, model.config.vocab_size)
            best = [_best(model.head(x_SD), names, BEST) for x_SD in states]
            predictions = [[row[0] for row in layer] for layer in best]
    return View(
        text=text,
        words=words.words,
        spans=words.spans,
        labels=labels,
        entities=entities(words, labels),
        window=window,
        windows=count,
        pieces=[str(tokenizer.backend.id_to_token(i)) for i in example.ids],
        ids=list(example.ids),
        word_of=_word_of(tokenizer, read, example),
        firsts=list(example.firsts),
        label_names=model.config.labels if tagger else (),
        predictions=predictions,
        best=best,
        masks=[place for place, i in enumerate(example.ids) if best and i == tokenizer.mask_id],
        # A batch of one: [0] of (1, H, S, S) when padded, of a list of (H, S, S) when packed.
        maps=[t[f"layers.{i}.probs"][0].float().cpu() for i in layers],
        erased=_without_each(tagger, words.words) if tagger else [],
        attn=model.attn_implementation,
        dtype=name_of(model.dtype),
        layout="packed" if reader.pack else "padded",
    )


def _without_each(tagger: Tagger, words: list[str]) -> list[list[Label | None]]:
    """What the words would be labelled if one were not there, for each of them."""
    if not 1 < len(words) <= ERASED:
        return []
    fewer = [words[:i] + words[i + 1 :] for i in range(len(words))]
    return [[*row[:i], None, *row[i:]] for i, row in enumerate(tagger.label(fewer))]


def _split_at_masks(text: str) -> Words:
    """Words as for a tagger, except that a ``MASK`` is one word."""
    words: list[str] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for part in re.split(f"({MASK.pattern})", text):
        own = [(0, len(part))] if MASK.fullmatch(part) else split(part).spans
        spans += [(start + first, start + stop) for first, stop in own]
        words += [part[first:stop] for first, stop in own]
        start += len(part)
    return Words(text, words, spans)


def _pieces_by_id(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    return [tokenizer.backend.id_to_token(i) or f"[{i}]" for i in range(vocab_size)]


def _word_of(
    tokenizer: Tokenizer, words: Sequence[str | None], example: Example
) -> list[int | None]:
    """The word of every piece, if this example labels the word."""
    owner: list[int | None] = [None] * len(example.ids)
    (pieces,) = tokenizer.pieces([words])
    for word, first in enumerate(example.firsts, start=example.first_word):
        for place in range(first, min(first + len(pieces[word]), len(owner) - 1)):
            owner[place] = word
    return owner


def _flat(x: Tensor | list[Tensor]) -> Tensor:
    """(1, S, D) or (S, D) to (S, D)."""
    assert isinstance(x, Tensor)  # only maps come as lists
    return x.flatten(end_dim=-2)


def _best(logits_SC: Tensor, names: Sequence[str], count: int) -> list[list[Label]]:
    """The ``count`` most probable classes of every piece."""
    best = logits_SC.float().softmax(-1).topk(min(count, len(names)))
    rows = zip(best.values.tolist(), best.indices.tolist())
    return [[Label(names[i], p) for p, i in zip(*row)] for row in rows]


def terminal(view: View) -> str:
    """Tables of the best prediction of every piece after each layer, in percent.

    "." stands for O. Layers that do not fit into 80 columns go into further tables. The
    best predictions at every mask follow. Without predictions, it says where attention is.
    """
    notes = list(filter(None, [window_note(view)]))
    if not view.predictions:
        return "\n".join(["no head, so no predictions: --html or --png shows attention", *notes])
    layers = ["embeddings", *(f"layer {i}" for i in range(len(view.maps)))]
    columns = [[name, *map(_cell, predicted)] for name, predicted in zip(layers, view.predictions)]
    if view.labels:
        chosen = {place: view.word_of[place] for place in view.firsts}
        words = [chosen.get(place) for place in range(len(view.pieces))]
        columns.append(["label", *("" if w is None else _cell(view.labels[w]) for w in words)])
    blocks = ["\n".join(table) for table in _tables(["piece", *view.pieces], columns)]
    for place in view.masks:
        rows = [[name, *map(_cell, best[place])] for name, best in zip(layers, view.best)]
        blocks.append(f"{view.pieces[place]} at {place}\n" + "\n".join(_aligned(zip(*rows))))
    return "\n".join(["\n\n".join(blocks), *notes])


def _tables(first: list[str], columns: list[list[str]]) -> Iterator[list[str]]:
    """Tables that fit into ``COLUMNS``, each with the same first column and at least one other."""
    start = max(map(len, first))
    shown, used = [first], start
    for column in columns:
        width = 2 + max(map(len, column))
        if len(shown) > 1 and used + width > COLUMNS:
            yield _aligned(shown)
            shown, used = [first], start
        shown.append(column)
        used += width
    yield _aligned(shown)


def _aligned(columns: Iterable[Sequence[str]]) -> list[str]:
    columns = list(columns)
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns)]


def _cell(label: Label) -> str:
    name = label.name if len(label.name) <= WIDEST else label.name[: WIDEST - 1] + "…"
    return f"{'.' if name == 'O' else name} {100 * label.score:.0f}"


def window_note(view: View) -> str | None:
    """Which part of a long text the view shows; None when it shows all of it."""
    if view.windows == 1:
        return None
    own = [word for word in view.word_of if word is not None]
    return (
        f"The text is longer than the model: this is window {view.window} of {view.windows}, which "
        f"labels words {own[0] + 1} to {own[-1] + 1} of {len(view.words)} "
        "(--window shows another)"
    )
