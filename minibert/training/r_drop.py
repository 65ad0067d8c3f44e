"""R-Drop: every batch runs twice, and the two passes should agree (Liang et al. 2021).

    loss = (CE(p) + CE(q)) / 2  +  weight * (KL(p || q) + KL(q || p)) / 2

p and q are a word's probabilities under two dropout masks. Inference runs without a mask, as no
pass of training did; passes that agree with each other are closer to it. Training takes twice as
long, and inference stays as it is.

The second pass may also see some word-pieces as [MASK], as in token cutoff (Shen et al. 2020,
arXiv:2009.13818, who drop them altogether). Hidden words keep their labels, which must then follow
from their neighbours.

The paper is arXiv:2106.14448. The weight is alpha as in the authors' example on
https://github.com/dropreg/R-Drop; the paper adds the two cross-entropies, so that its alpha is
twice this one. Shape legend: model/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from minibert.model.heads import BertOutput, BertWithHead
from minibert.model.labels import IGNORE
from minibert.model.layout import Packed


class RDrop(nn.Module):
    """A model in train mode, as one with another loss.

    Args:
        model: its head scores every token, and its loss is the mean cross-entropy over the labels.
        weight: of the disagreement.
        second: what the second pass sees of ``input_ids``; for example ``partial(hidden, ...)``.
    """

    def __init__(
        self,
        model: BertWithHead,
        weight: float,
        second: Callable[[Tensor], Tensor] = lambda input_ids: input_ids,
    ):
        super().__init__()
        self.model, self.weight, self.second = model, weight, second

    def forward(
        self, *, input_ids: Tensor, labels: Tensor, **inputs: Tensor | Packed
    ) -> BertOutput:
        """Both passes over one batch, with the arguments of the model.

        Returns:
            The logits of the first pass, and the loss of both.
        """
        p = self.model(input_ids=input_ids, labels=labels, **inputs)
        # Both passes would share a cached cast, and their gradients add up in its format.
        torch.clear_autocast_cache()
        q = self.model(input_ids=self.second(input_ids), labels=labels, **inputs)
        cross_entropy = (p.loss + q.loss) / 2
        return BertOutput(
            p.logits, cross_entropy + self.weight * disagreement(p.logits, q.logits, labels)
        )


def hidden(ids: Tensor, share: float, mask_id: int, special_ids: Collection[int]) -> Tensor:
    """The same word-pieces, each hidden with probability ``share``, by torch's generator.

    Args:
        ids: int64, of any shape.
        share: in [0, 1).
        mask_id: of what a hidden piece becomes.
        special_ids: what is never hidden.
    """
    if not share:
        return ids
    hits = torch.rand(ids.shape, device=ids.device) < share
    for special in special_ids:
        hits &= ids != special
    return ids.masked_fill(hits, mask_id)


def disagreement(p_NL: Tensor, q_NL: Tensor, labels_N: Tensor) -> Tensor:
    """The mean of both KL divergences, and over the labels that are not ``IGNORE``: a scalar.

    Args:
        p_NL, q_NL: scores; or (B, S, L).
        labels_N: int64; or (B, S).
    """
    # As a sum over all tokens: a selection would have a shape that a CUDA graph cannot record.
    logp_NL, logq_NL = (x.log_softmax(-1, dtype=torch.float32) for x in (p_NL, q_NL))
    both_N = ((logp_NL.exp() - logq_NL.exp()) * (logp_NL - logq_NL)).sum(-1)
    word_N = labels_N != IGNORE
    return (both_N * word_N).sum() / (2 * word_N.sum())
