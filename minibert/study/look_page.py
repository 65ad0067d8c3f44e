"""What a model saw in one text as one HTML page: no network, nothing beside it.

The page is ``look_page.html`` with ``look_page.css``, ``look_page.js`` and the data put in. A
Content-Security-Policy lets exactly this style and this script run and nothing be fetched. Whatever
comes from outside travels as JSON that cannot end its element, and is shown as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from importlib import resources
from itertools import pairwise
from string import Template

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.study.look import Inside, shown

THUMB = 32  # pixels along a side of a map in the overview, at most
FINE, COARSE, LONG = 255, 63, 128  # levels of weights; of texts longer than that many pieces


def page(title: str, inside: Inside) -> str:
    """The whole page.

    Attention weights are rounded to one of 256 levels, of texts longer than 128 pieces to one of
    64, which take half the space: 144 maps of 512 x 512 weights come to about 11 MB. The levels lie
    evenly on the square root, so that small weights are not lost.

    Args:
        title: what was looked into, say the directory.
        inside: as ``look`` gives it.
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
        data=_json(_data(title, inside)),
    )


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls a text by (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """JSON of ASCII alone and without <: no tag, no line separator, no lone surrogate in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _data(title: str, inside: Inside) -> dict:
    """What look_page.js reads."""
    S, layers, heads = len(inside.pieces), len(inside.maps), len(inside.maps[0])
    levels = FINE if S <= LONG else COARSE
    codes = [quantised(map_HSS, levels) for map_HSS in inside.maps]
    size = min(S, THUMB)
    thumbs = b"".join(
        # The largest weight of each patch: a line one piece wide would vanish from the mean.
        F.adaptive_max_pool2d(code_HSS.float(), size).to(torch.uint8).numpy().tobytes()
        for code_HSS in codes
    )
    types = [name[2:] for name in inside.label_names if name != "O"]
    facts = [
        title,
        f"{layers} layers of {heads} heads",
        f"{inside.attn} attention, {inside.dtype}, {inside.layout}",
        f"{len(inside.words)} words",
        f"{S} word-pieces",
    ]
    return {
        "facts": " · ".join(facts),
        "window": shown(inside) or "",
        "rounding": f"Attention weights are rounded to {levels + 1} levels, evenly spaced in their "
        f"square root: off by at most {1 / levels:.3f}, small ones by less. "
        "Probabilities of labels are rounded to 0.001.",
        "segments": _segments(inside),
        "text_length": len(inside.text),
        "types": list(dict.fromkeys(types)),
        "words": [
            [inside.text[start:stop], label.name, round(label.score, 3)]
            for (start, stop), label in zip(inside.spans, inside.labels)
        ],
        "pieces": inside.pieces,
        "ids": inside.ids,
        "word_of": inside.word_of,
        "predictions": [
            [[label.name, round(label.score, 3)] for label in layer] for layer in inside.predictions
        ],
        "layers": layers,
        "heads": heads,
        "start": _start(inside),
        "levels": levels,
        "maps": [
            [_base64(zlib.compress(code_SS.numpy().tobytes())) for code_SS in code_HSS]
            for code_HSS in codes
        ],
        "thumb_size": size,
        "thumbs": _base64(thumbs),
    }


def quantised(probs: Tensor, levels: int) -> Tensor:
    """Weights from 0 to 1 as uint8: the square root in so many even steps, off by half of one."""
    return (probs.sqrt() * levels).round().to(torch.uint8)


def _segments(inside: Inside) -> list[list]:
    """The text cut into [text, in the window, type or null, score].

    Here and not in the script, which counts characters otherwise.
    """
    own = [word for word in inside.word_of if word is not None]
    here = range(inside.spans[own[0]][0], inside.spans[own[-1]][1])
    inside_entities = {at for e in inside.entities for at in range(e.start + 1, e.stop)}
    cuts = {0, here.start, here.stop, len(inside.text)} - inside_entities
    cuts |= {at for entity in inside.entities for at in (entity.start, entity.stop)}
    found = {entity.start: entity for entity in inside.entities}
    parts: list[list] = []
    for start, stop in pairwise(sorted(cuts)):
        entity = found.get(start)
        type_, score = (entity.type, round(entity.score, 3)) if entity else (None, 0)
        parts.append([inside.text[start:stop], start in here, type_, score])
    return parts


def _start(inside: Inside) -> int:
    """The token that is lit first: one with a label, or else the first word."""
    labelled = [
        first for first in inside.firsts if inside.labels[inside.word_of[first] or 0].name != "O"
    ]
    return (labelled or inside.firsts)[0]


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
