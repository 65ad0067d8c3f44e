"""From scores of single words to labels that make sense together.

The classifier judges every word alone, so its best labels need not fit: an I-TITLE may follow an O.
The most probable sequence among those that are well-formed BIO is found by dynamic programming
(Viterbi 1967), with the classifier's log-probabilities and no learned transitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def may_follow(label: str, previous: str) -> bool:
    """B- and O follow anything, I-X only B-X or I-X; before a sentence stands O."""
    return label[0] != "I" or previous[1:] == label[1:]


@lru_cache(maxsize=8)
def _forbidden(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """What may not follow what, (labels, labels), row before column; and what may not begin."""
    follow_LL = torch.tensor([[not may_follow(b, a) for b in names] for a in names])
    return follow_LL, torch.tensor([not may_follow(b, "O") for b in names])


def best_labels(logp_WL: Tensor, names: Sequence[str]) -> list[int]:
    """The most probable well-formed labels of one sentence.

    Args:
        logp_WL: log-probabilities, (words, labels).
        names: "O", "B-TYPE" or "I-TYPE" of each label.

    Returns:
        A label id for every word.
    """
    best = logp_WL.argmax(-1).tolist()
    fits = (may_follow(names[b], names[a] if a >= 0 else "O") for a, b in zip([-1, *best], best))
    if all(fits):
        return best  # nothing can be more probable than the best label of every word
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
