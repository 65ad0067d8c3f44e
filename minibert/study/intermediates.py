"""The intermediates of a model: one table of their names, axes, place in transformers and meaning.

``trace`` records them, ``parity`` compares them with those of transformers. A leading dot stands
for "in every layer": ``.q`` is ``layers.0.q``, ``layers.1.q``, ... in minibert, and
``.attention.self.query`` is ``encoder.layer.0.attention.self.query``, ... in transformers.

Shape legend: model/layout.py.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

# In the order of computation. The columns:
#   name
#   axes, without those of the tokens: (B, S) of a padded batch, (N,) of a packed one. Attention
#     maps HSS have a leading B in a padded batch; a packed one has a list of them, one a sentence.
#   where transformers computes it: the input or output of a module of its base model, or of the
#     softmax; "-" where it cannot be seen
#   what it is
TABLE = """
embeddings.sum     D    in   embeddings.LayerNorm         (word + segment) + position (+ task)
embeddings         D    out  embeddings                   LayerNorm of the embeddings
.q                 HK   out  .attention.self.query        query projection
.k                 HK   out  .attention.self.key          key projection
.v                 HK   out  .attention.self.value        value projection
.scores            HSS  in   softmax                      q kᵀ / √K + mask
.probs             HSS  out  softmax                      softmax of the scores
.probs_dropped     HSS  -    -                            dropout of the probabilities
.context           HK   in   .attention.output.dense      probabilities times values
.attention_output  D    out  .attention.output.dense      output projection of attention
.attention_norm    D    out  .attention.output.LayerNorm  LayerNorm of attention output + residual
.pre_gelu          F    out  .intermediate.dense          first linear layer of the FFN
.post_gelu         F    in   .output.dense                GELU (or ReLU)
.ffn_output        D    out  .output.dense                second linear layer of the FFN
.ffn_norm          D    out  .output.LayerNorm            LayerNorm of FFN output + residual
logits             L    out  logits                       head (masked LM: V instead of L)
"""


class Intermediate(NamedTuple):
    """One row of the table."""

    name: str  # without its layer
    axes: str
    end: str  # "in" or "out" of ``theirs``
    theirs: str
    what: str
    in_layer: bool

    @property
    def is_map(self) -> bool:
        """Whether it has one value for every pair of tokens of a sentence."""
        return self.axes == "HSS"


def _parsed(line: str) -> Intermediate:
    name, axes, end, theirs, what = line.split(maxsplit=4)
    return Intermediate(name.removeprefix("."), axes, end, theirs, what, name.startswith("."))


INTERMEDIATES = {row.name: row for row in map(_parsed, TABLE.strip().splitlines())}


def names(layers: int) -> list[str]:
    """Every name in a model of ``layers`` layers, in the order of computation."""
    found = []
    for in_layer, group in groupby(INTERMEDIATES.values(), attrgetter("in_layer")):
        rows = list(group)
        prefixes = [f"layers.{i}." for i in range(layers)] if in_layer else [""]
        found += [prefix + row.name for prefix in prefixes for row in rows]
    return found


def intermediate_of(name: str) -> Intermediate:
    """The row of "layers.3.q", "embeddings", ...

    Raises:
        KeyError: the table has no such name.
    """
    return INTERMEDIATES[name.rpartition(".")[2] if name.startswith("layers.") else name]
