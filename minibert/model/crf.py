"""A chain of labels: the conditional random field of Lafferty, McCallum & Pereira (2001).

The labels y of a sentence have the probability exp(s(y)) / Z, where Z sums exp(s) over all of them:

    s(y) = start[y_1] + Σ_t score_t[y_t] + Σ_t transition[y_t-1, y_t] + end[y_last]

One recursion gives log Z (the forward algorithm) and the best y (Viterbi 1967).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence


def pack(x_N: Tensor, lengths: Sequence[int]) -> PackedSequence:
    """Words (N, ...) of sentences end to end as torch's LSTM takes them; empty ones are dropped.

    ``data`` holds all first words, then all second ones; long sentences first.
    """
    return pack_sequence(list(x_N.split([n for n in lengths if n])), enforce_sorted=False)


class Chain(nn.Module):
    """Weights of the labels, (L,), and from row to column, (L, L). Scores (N, L) are packed."""

    def __init__(self, start_L: Tensor, transition_LL: Tensor, end_L: Tensor):
        super().__init__()
        self.start_L = nn.Parameter(start_L)
        self.transition_LL = nn.Parameter(transition_LL)
        self.end_L = nn.Parameter(end_L)

    def loss(self, scores: PackedSequence, labels: PackedSequence) -> Tensor:
        """-log p(labels) of each sentence: (B,). s(labels) is log Z with the others ruled out."""
        others_NL = F.one_hot(labels.data, len(self.start_L)) == 0
        alone = scores._replace(data=scores.data.masked_fill(others_NL, -torch.inf))
        return self.log_partition(scores) - self.log_partition(alone)

    def log_partition(self, scores: PackedSequence) -> Tensor:
        """log Z of each sentence: (B,)."""
        total_BL = self._run(scores, lambda into_BLL: into_BLL.logsumexp(1))
        return total_BL.logsumexp(1)[scores.unsorted_indices]

    @torch.enable_grad()
    def probabilities(self, scores: PackedSequence) -> PackedSequence:
        """Of every label of every word, (N, L): the derivative of log Z by its score.

        Backpropagation through the forward algorithm is the backward algorithm (Eisner 2016).
        """
        data_NL = scores.data.detach().clone().requires_grad_()
        log_Z_B = self.log_partition(scores._replace(data=data_NL))
        return scores._replace(data=torch.autograd.grad(log_Z_B.sum(), data_NL)[0].clamp(max=1))

    @torch.no_grad()
    def best(self, scores: PackedSequence) -> PackedSequence:
        """The labels of highest s(y): (N,)."""
        sizes = scores.batch_sizes.tolist()
        origin_NL = torch.zeros_like(scores.data, dtype=torch.long)  # best label before each
        label_N, stop = origin_NL[:, 0].clone(), sizes[0]

        def best_previous(into_BLL: Tensor) -> Tensor:
            nonlocal stop
            start, stop = stop, stop + len(into_BLL)
            score_BL, origin_NL[start:stop] = into_BLL.max(1)
            return score_BL

        label_B = self._run(scores, best_previous).argmax(1)
        for size in reversed(sizes):
            start = stop - size
            label_N[start:stop] = label_B[:size]
            label_B[:size] = origin_NL[start:stop].gather(1, label_B[:size, None])[:, 0]
            stop = start
        return scores._replace(data=label_N)

    def _run(self, scores: PackedSequence, over_previous: Callable[[Tensor], Tensor]) -> Tensor:
        """Totals by last label, (B, L), longest sentence first; axis 1 is the previous label."""
        first_BL, *later = scores.data.split(scores.batch_sizes.tolist())
        total_BL, ended = self.start_L + first_BL, []
        for score_BL in later:
            n = len(score_BL)  # sentences that are this long
            ended.append(total_BL[n:])
            total_BL = over_previous(total_BL[:n, :, None] + self.transition_LL) + score_BL
        return torch.cat([total_BL, *reversed(ended)]) + self.end_L
