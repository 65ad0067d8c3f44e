"""BIO labels: which may follow which, and the most probable sequence that obeys.

A linear head judges every word alone: an I-TITLE may follow an O. ``best_labels`` finds the most
probable well-formed sequence from its log-probabilities (Viterbi's algorithm, crf.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from minibert.model.crf import Chain, pack

IGNORE = -100  # the label of a token that does not count in the loss
TAG = re.compile(r"O|[BI]-\S+")


def may_follow(label: str, previous: str, names: Collection[str] | None = None) -> bool:
    """B- and O follow anything, I-X only B-X or I-X; if ``names`` lack B-X, anything as well."""
    orphan = label[0] == "I" and previous[1:] != label[1:]
    return not orphan or (names is not None and "B" + label[1:] not in names)


@lru_cache(maxsize=8)
def well_formed_chain(names: tuple[str, ...]) -> Chain:
    """Scores 0 for every well-formed sequence and -inf for any other."""
    known = set(names)

    def weight(label: str, previous: str) -> float:
        return 0.0 if may_follow(label, previous, known) else -torch.inf

    with torch.inference_mode(False):
        start_L = torch.tensor([weight(label, "O") for label in names])
        transition_LL = torch.tensor([[weight(b, a) for b in names] for a in names])
        return Chain(start_L, transition_LL, torch.zeros(len(names)))


def best_labels(logp_WL: Tensor, names: Sequence[str]) -> list[int]:
    """The ids of the most probable well-formed labels of one sentence, from log-probabilities."""
    best = logp_WL.argmax(-1).tolist()
    previous = ["O", *(names[i] for i in best)]
    if all(may_follow(names[i], before, names) for i, before in zip(best, previous)):
        return best  # no sequence is more probable than the best label of every word
    return well_formed_chain(tuple(names)).best(pack(logp_WL, [len(logp_WL)])).data.tolist()
