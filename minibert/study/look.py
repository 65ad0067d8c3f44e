"""What a tagger saw in one text: labels by layer, attention by head, words and their pieces.

    inside = look(tagger, "who directed jaws")
    inside.maps[3][5]        # attention of layer 3, head 5: (S, S), a row looks at its columns
    inside.predictions[2]    # what the head would say of every piece after layer 1
    print(terminal(inside))

look_page.py makes a page of it and look_png.py a picture. Everything is read by ``trace``, under
whatever attention implementation the model has.
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


@dataclass(frozen=True)
class Window:
    """Which part of a text too long for the model is shown; number and count from 1."""

    number: int
    count: int


@dataclass(frozen=True)
class Inside:
    """One text inside a model; S word-pieces, [CLS] and [SEP] included.

    ``words``, ``spans``, ``labels`` and ``entities`` are those of the whole text, everything else
    is that of the window.
    """

    text: str
    words: list[str]
    spans: list[tuple[int, int]]  # of each word in the text, in characters
    labels: list[Label]  # of each word, as the tagger chose it
    entities: list[Entity]
    window: Window
    pieces: list[str]  # S
    ids: list[int]  # S
    word_of: list[int | None]  # S; None: a frame, or a word that another window answers for
    firsts: list[int]  # of every word the window answers for, its first piece: it has the label
    label_names: tuple[str, ...]
    predictions: list[list[Label]]  # [embeddings, layer 0, ...][S]: each piece's best label
    maps: list[Tensor]  # a layer: (H, S, S) float32 on the CPU
    attn: str
    dtype: str
    layout: str


def look(tagger: Tagger, text: str, window: int = 1) -> Inside:
    """Run a text through a tagger and keep what is worth seeing.

    Args:
        tagger: its ``pack`` says whether the batch is packed.
        text: of a length that the model has positions for; of a longer one a window is shown.
        window: which, from 1.

    Raises:
        MinibertError: there is no word in the text, or no such window.
    """
    model, tokenizer, words = tagger.model, tagger.tokenizer, split(text)
    examples = examples_of([words.words], tokenizer, model.config.max_position_embeddings)
    if not examples:
        raise MinibertError("no word in the text: give a sentence")
    if not 1 <= window <= len(examples):
        raise MinibertError(
            f"window {window}: the text has {len(examples)}: give a number from 1 on"
        )
    example = examples[window - 1]
    device = model.device
    if tagger.pack:
        batch = packed([example], device)
    else:
        batch = padded([example], tokenizer.pad_id, device=device)
    layers = range(model.config.num_hidden_layers)
    with torch.no_grad(), trace(model) as t:
        model(**batch.inputs)
        # A batch of one: (1, S, D) padded and (S, D) packed, (1, H, S, S) and a list of (H, S, S).
        names = ["embeddings", *(f"layers.{i}.ffn_norm" for i in layers)]
        logits = [model.head(_flat(t[name])) for name in names]
        maps = [t[f"layers.{i}.probs"][0].float().cpu() for i in layers]
    (labels,) = tagger.label([words.words])
    return Inside(
        text=text,
        words=words.words,
        spans=words.spans,
        labels=labels,
        entities=entities(words, labels),
        window=Window(window, len(examples)),
        pieces=[str(tokenizer.backend.id_to_token(i)) for i in example.ids],
        ids=list(example.ids),
        word_of=_word_of(tokenizer, words.words, example),
        firsts=list(example.firsts),
        label_names=model.config.labels,
        predictions=[_best(logits_SL, model.config.labels) for logits_SL in logits],
        maps=maps,
        attn=model.attn_implementation,
        dtype=name_of(model.dtype),
        layout="packed" if tagger.pack else "padded",
    )


def _word_of(tokenizer: Tokenizer, words: list[str], example: Example) -> list[int | None]:
    """For every piece of an example the word it is of, if the example answers for that word."""
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


def terminal(inside: Inside) -> str:
    """A table: what the head would say of every piece after each layer, in percent; "." is O."""
    layers = [f"layer {i}" for i in range(len(inside.maps))]
    rows = [["piece", "embeddings", *layers, "label"]]
    for place, piece in enumerate(inside.pieces):
        said = [_cell(layer[place]) for layer in inside.predictions]
        word = inside.word_of[place] if place in inside.firsts else None
        rows.append([piece, *said, "" if word is None else _cell(inside.labels[word])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *filter(None, [shown(inside)])])


def _cell(label: Label) -> str:
    name = label.name if len(label.name) <= WIDEST else label.name[: WIDEST - 1] + "…"
    return f"{'.' if name == 'O' else name} {100 * label.score:.0f}"


def shown(inside: Inside) -> str | None:
    """Which part of a long text the window is, in one sentence; None where it is the whole."""
    number, count = inside.window.number, inside.window.count
    if count == 1:
        return None
    own = [word for word in inside.word_of if word is not None]
    return (
        f"The text is longer than the model: this is window {number} of {count}, which answers "
        f"for words {own[0] + 1} to {own[-1] + 1} of {len(inside.words)} (--window shows another)"
    )
