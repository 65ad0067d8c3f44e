"""The view of a text as one HTML page that needs neither a network nor other files.

The page is ``look_page.html`` with ``look_page.css``, ``look_page.js`` and the data filled in. Its
Content-Security-Policy allows this style and this script only, and no requests. The data is JSON
that cannot close its element, and the script inserts it as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable
from importlib import resources
from itertools import pairwise
from string import Template

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.study.look import View, window_note
from minibert.tagging.words import Label
from minibert.text.schemes import types_of

THUMB = 32  # most pixels along a side of a map in the overview
FINE, COARSE, LONG = 255, 63, 128  # levels of weights; COARSE for texts longer than LONG pieces


def page(title: str, view: View) -> str:
    """The HTML of the whole page.

    Attention weights are rounded to 256 levels, for texts longer than 128 pieces to 64, which
    compress to half the size: 144 maps of 512 x 512 weights take about 11 MB. The levels are evenly
    spaced in the square root of the weight, so that small weights stay visible.

    Args:
        title: the model, say its directory.
        view: from ``look``.
    """
    files = {
        kind: resources.files("minibert.study").joinpath(f"look_page.{kind}").read_text("utf-8")
        for kind in ("html", "css", "js")
    }
    policy = (
        f"default-src 'none'; style-src {_hash(files['css'])}; script-src {_hash(files['js'])}; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(files["html"]).substitute(
        policy=policy,
        style=files["css"],
        script=files["js"],
        data=_json(_data(title, view)),
    )


def _hash(text: str) -> str:
    """The hash source of an inline style or script (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """ASCII JSON without "<", so that it holds no tag, line separator or lone surrogate."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _data(title: str, view: View) -> dict:
    """What look_page.js reads."""
    S, layers, heads = len(view.pieces), len(view.maps), len(view.maps[0])
    levels = FINE if S <= LONG else COARSE
    codes = [quantised(map_HSS, levels) for map_HSS in view.maps]
    size = min(S, THUMB)
    thumbs = b"".join(
        # The maximum of each patch: a mean would hide a line one piece wide.
        F.adaptive_max_pool2d(code_HSS.float(), size).to(torch.uint8).numpy().tobytes()
        for code_HSS in codes
    )
    facts = [
        title,
        f"{layers} layers of {heads} heads",
        f"{view.attn} attention, {view.dtype}, {view.layout}",
        f"{len(view.words)} words",
        f"{S} word-pieces",
    ]
    return {
        "facts": " · ".join(facts),
        "window": window_note(view) or "",
        "rounding": f"Attention weights are rounded to {levels + 1} levels, evenly spaced in their "
        f"square root: the error is at most {1 / levels:.3f}, less for small weights. "
        "Label probabilities are rounded to 0.001.",
        "segments": _segments(view),
        "text_length": len(view.text),
        "types": types_of(view.label_names),
        "words": [
            [view.text[start:stop], label.name, round(label.score, 3)]
            for (start, stop), label in zip(view.spans, view.labels or [Label("", 0.0)] * S)
        ],
        "pieces": view.pieces,
        "ids": view.ids,
        "word_of": view.word_of,
        "predictions": [_rounded(layer) for layer in view.predictions],
        "best": [[_rounded(best) for best in layer] for layer in view.best],
        "erased": [
            [label and [label.name, round(label.score, 3)] for label in row] for row in view.erased
        ],
        "layers": layers,
        "heads": heads,
        "start": _first_shown(view),
        "focus": [[round(x, 3) for x in focus(map_HSS).tolist()] for map_HSS in view.maps],
        "levels": levels,
        "maps": [
            [_base64(zlib.compress(code_SS.numpy().tobytes())) for code_SS in code_HSS]
            for code_HSS in codes
        ],
        "thumb_size": size,
        "thumbs": _base64(thumbs),
    }


def _rounded(labels: Iterable[Label]) -> list[list]:
    return [[label.name, round(label.score, 3)] for label in labels]


def quantised(probs: Tensor, levels: int) -> Tensor:
    """Weights from 0 to 1 as uint8: the square root in ``levels`` equal steps."""
    return (probs.sqrt() * levels).round().to(torch.uint8)


def focus(map_HSS: Tensor) -> Tensor:
    """How focused each head is, from 0 to 1: the largest weight of a row, on average over rows.

    [CLS] and [SEP] do not count, on which a head rests that looks for nothing.
    """
    return map_HSS[:, 1:-1, 1:-1].amax(-1).mean(-1)


def _segments(view: View) -> list[list]:
    """The text cut into [text, whether the window labels it, entity type or None, score].

    JavaScript counts characters in UTF-16 units, so the text is cut here.
    """
    own = [word for word in view.word_of if word is not None]
    here = range(view.spans[own[0]][0], view.spans[own[-1]][1])
    within_entities = {at for e in view.entities for at in range(e.start + 1, e.stop)}
    cuts = {0, here.start, here.stop, len(view.text)} - within_entities
    cuts |= {at for entity in view.entities for at in (entity.start, entity.stop)}
    found = {entity.start: entity for entity in view.entities}
    parts: list[list] = []
    for start, stop in pairwise(sorted(cuts)):
        entity = found.get(start)
        type_, score = (entity.type, round(entity.score, 3)) if entity else (None, 0)
        parts.append([view.text[start:stop], start in here, type_, score])
    return parts


def _first_shown(view: View) -> int:
    """The piece selected at first: a mask, that of the first labelled word, or the first word."""
    labels = dict(enumerate(view.labels))
    labelled = [
        first
        for first in view.firsts
        if (word := view.word_of[first]) in labels and labels[word].name != "O"
    ]
    return (view.masks or labelled or view.firsts)[0]


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
