"""BIO labels: which may follow which, and the most probable sequence that obeys.

A linear head judges every word alone: an I-TITLE may follow an O. ``best_labels`` finds the most
probable well-formed sequence (Viterbi, crf.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from minibert.model.crf import Chain, pack

IGNORE = -100  # the label of a token that does not count in the loss
TAG = re.compile(r"O|[BI]-\S+")


def may_follow(label: str, previous: str, names: Collection[str] | None = None) -> bool:
    """I-X, E-X and L-X follow B-X and I-X; if ``names`` lack B-X, anything.

    If ``names`` have E-X or L-X, nothing else follows B-X and I-X (BIOES, BILOU).
    """
    inside, opened = label[0] in "IEL", previous[0] in "BI"
    begins = not inside or (names is not None and "B" + label[1:] not in names)
    ends = not opened or not {"E" + previous[1:], "L" + previous[1:]}.intersection(names or ())
    return (begins and ends) or (inside and opened and label[1:] == previous[1:])


@lru_cache(maxsize=8)
def well_formed_chain(names: tuple[str, ...]) -> Chain:
    """Scores 0 for well-formed sequences, -inf for others."""
    known, states = set(names), ["O", *names]
    with torch.inference_mode(False):
        weight_SS = torch.tensor([[may_follow(b, a, known) for b in states] for a in states]).log()
        return Chain(weight_SS[0, 1:], weight_SS[1:, 1:], weight_SS[1:, 0])


def best_labels(logp_WL: Tensor, names: Sequence[str]) -> list[int]:
    """The ids of the most probable well-formed labels of one sentence, from log-probabilities."""
    best = logp_WL.argmax(-1).tolist()
    found = ["O", *(names[i] for i in best), "O"]
    if all(may_follow(label, before, names) for before, label in pairwise(found)):
        return best  # no sequence is more probable than the best label of every word
    return well_formed_chain(tuple(names)).best(pack(logp_WL, [len(logp_WL)])).data.tolist()
