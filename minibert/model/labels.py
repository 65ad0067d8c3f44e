"""BIO labels: which may follow which, and the most probable sequence that obeys.

A linear head judges every word alone: an I-TITLE may follow an O. ``best_labels`` finds the most
probable well-formed sequence from its log-probabilities, by Viterbi's algorithm (1967).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache

import torch
from torch import Tensor

IGNORE = -100  # the label of a token that does not count in the loss
TAG = re.compile(r"O|[BI]-\S+")


def may_follow(label: str, previous: str, names: Collection[str] | None = None) -> bool:
    """B- and O follow anything, I-X only B-X or I-X; if ``names`` lack B-X, anything as well."""
    orphan = label[0] == "I" and previous[1:] != label[1:]
    return not orphan or (names is not None and "B" + label[1:] not in names)


@lru_cache(maxsize=8)
def _forbidden(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(L, L) bool: the label of the column may not follow that of the row; (L,): nor start."""
    known = set(names)
    follow_LL = torch.tensor([[not may_follow(b, a, known) for b in names] for a in names])
    return follow_LL, torch.tensor([not may_follow(b, "O", known) for b in names])


def best_labels(logp_WL: Tensor, names: Sequence[str]) -> list[int]:
    """The most probable well-formed labels of one sentence.

    Args:
        logp_WL: log-probabilities, (words, labels); at least one word.
        names: "O", "B-TYPE" or "I-TYPE" of each label.

    Returns:
        A label id for every word.
    """
    best = logp_WL.argmax(-1).tolist()
    previous = ["O", *(names[i] for i in best)]
    if all(may_follow(names[i], before, names) for i, before in zip(best, previous)):
        return best  # no sequence is more probable than the best label of every word
    forbidden_LL, forbidden_first_L = _forbidden(tuple(names))
    score_L = logp_WL[0].masked_fill(forbidden_first_L, -torch.inf)
    came_from = []
    for logp_L in logp_WL[1:]:
        into_LL = score_L[:, None].masked_fill(forbidden_LL, -torch.inf)  # from row to column
        score_L, origin_L = into_LL.max(0)
        score_L = score_L + logp_L
        came_from.append(origin_L.tolist())
    path = [int(score_L.argmax())]
    for origin in reversed(came_from):
        path.append(origin[path[-1]])
    return path[::-1]
