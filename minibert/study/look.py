"""What a tagger computes for one text: labels by layer, attention by head, words and their pieces.

    view = look(tagger, "who directed jaws")
    view.maps[3][5]        # attention of layer 3, head 5: (S, S), each row attends to the columns
    view.predictions[2]    # the head's best label of every piece after layer 1
    print(terminal(view))

look_page.py writes it as an HTML page and look_png.py as a picture. ``trace`` reads everything, so
any attention implementation will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.files import MinibertError
from minibert.machine import name_of
from minibert.pretrained.tokenizer import Tokenizer
from minibert.study.trace import trace
from minibert.tagging.tagger import Tagger
from minibert.tagging.words import Entity, Label, entities, split
from minibert.text.batches import Example, examples_of, packed, padded

WIDEST = 12  # characters of a label in the terminal
ERASED = 64  # most words of a text for which every word is erased in turn


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
    label_names: tuple[str, ...]
    predictions: list[list[Label]]  # [embeddings, layer 0, ...][S]: best label of each piece
    maps: list[Tensor]  # by layer: (H, S, S) float32 on the CPU
    # [erased word][word]: the labels without that word, itself None; empty for more than ERASED
    erased: list[list[Label | None]]
    attn: str
    dtype: str
    layout: str


def look(tagger: Tagger, text: str, window: int = 1) -> View:
    """Run a text through a tagger and keep its attention maps and the predictions of each layer.

    Args:
        tagger: with plain layers (``prepack=False``); ``pack`` decides the layout.
        text: with at least one word.
        window: which window of a text longer than the model, from 1.

    Raises:
        MinibertError: the text has no word or no such window.
        ValueError: the layers are prepacked.
    """
    model, tokenizer, words = tagger.model, tagger.tokenizer, split(text)
    examples = examples_of([words.words], tokenizer, model.config.max_length)
    if not examples:
        raise MinibertError("the text has no word: give a sentence")
    count = len(examples)
    if not 1 <= window <= count:
        raise MinibertError(f"window {window}: the text has {count}: give one from 1 to {count}")
    example = examples[window - 1]
    device = model.device
    if tagger.pack:
        batch = packed([example], device)
    else:
        batch = padded([example], tokenizer.pad_id, device=device)
    layers = range(model.config.num_hidden_layers)
    with torch.no_grad():
        with trace(model) as t:
            model(**batch.inputs)
        states = [t["embeddings"], *(t[f"layers.{i}.ffn_norm"] for i in layers)]
        logits = [model.head(_flat(state)) for state in states]
    (labels,) = tagger.label([words.words])
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
        word_of=_word_of(tokenizer, words.words, example),
        firsts=list(example.firsts),
        label_names=model.config.labels,
        predictions=[_best(logits_SL, model.config.labels) for logits_SL in logits],
        # A batch of one: [0] of (1, H, S, S) when padded, of a list of (H, S, S) when packed.
        maps=[t[f"layers.{i}.probs"][0].float().cpu() for i in layers],
        erased=_without_each(tagger, words.words),
        attn=model.attn_implementation,
        dtype=name_of(model.dtype),
        layout="packed" if tagger.pack else "padded",
    )


def _without_each(tagger: Tagger, words: list[str]) -> list[list[Label | None]]:
    """What the words would be labelled if one were not there, for each of them."""
    if not 1 < len(words) <= ERASED:
        return []
    fewer = [words[:i] + words[i + 1 :] for i in range(len(words))]
    return [[*row[:i], None, *row[i:]] for i, row in enumerate(tagger.label(fewer))]


def _word_of(tokenizer: Tokenizer, words: list[str], example: Example) -> list[int | None]:
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


def _best(logits_SL: Tensor, names: tuple[str, ...]) -> list[Label]:
    best = logits_SL.float().softmax(-1).cpu().max(-1)
    return [Label(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]


def terminal(view: View) -> str:
    """A table of the best label of every piece after each layer, in percent; "." stands for O."""
    layers = [f"layer {i}" for i in range(len(view.maps))]
    rows = [["piece", "embeddings", *layers, "label"]]
    for place, piece in enumerate(view.pieces):
        predicted = [_cell(layer[place]) for layer in view.predictions]
        word = view.word_of[place] if place in view.firsts else None
        rows.append([piece, *predicted, "" if word is None else _cell(view.labels[word])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *filter(None, [window_note(view)])])


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
