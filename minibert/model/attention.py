"""Multi-head self-attention, softmax(q kᵀ / √K + mask) v, twice with one signature.

    attend(q_NHK, k_NHK, v_NHK, layout, dropout_p) -> Attended

``eager``  equation 1 of Vaswani et al. 2017 (arXiv:1706.03762), spelled out
``sdpa``   the same by ``torch.nn.functional.scaled_dot_product_attention``

The model picks one when it is built (``encoder.IMPLEMENTATIONS``).
Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.model.layout import Block, Layout


class Attended(NamedTuple):
    """The result of attention."""

    context_NHK: Tensor
    probs: list[Tensor] | None  # eager only: one (rows, H, S, S) a block, after dropout


AttentionFn = Callable[[Tensor, Tensor, Tensor, Layout, float], Attended]


def eager(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, dropout_p: float
) -> Attended:
    """Scores, softmax and weighted sum written out, for any floating dtype and stride over N.

    ``dropout_p`` is the probability of dropping an attention weight, 0 outside training.
    """
    contexts, probs = [], []
    for block, q_BHSK, k_BHSK, v_BHSK in rectangles(layout, q_NHK, k_NHK, v_NHK):
        probs_BHSS = F.dropout(F.softmax(scores(block, q_BHSK, k_BHSK), dim=-1), dropout_p)
        contexts.append(torch.matmul(probs_BHSS, v_BHSK))
        probs.append(probs_BHSS)
    return Attended(_flat(contexts), probs)


def scores(block: Block, q_BHSK: Tensor, k_BHSK: Tensor) -> Tensor:
    """q kᵀ / √K + mask of one block: (rows, H, S, S)."""
    scores_BHSS = torch.matmul(q_BHSK, k_BHSK.transpose(2, 3)) * q_BHSK.shape[-1] ** -0.5
    if block.valid_BS is not None:
        # The mask has the dtype of the hidden states, which autocast keeps in float32: there the
        # mask widens the scores before the softmax, as in transformers.
        autocast = torch.is_autocast_enabled(q_BHSK.device.type)
        dtype = torch.float32 if autocast else scores_BHSS.dtype
        # The lowest finite value, not -inf: a fully masked row gets uniform attention, not NaN.
        mask_BS = torch.zeros_like(block.valid_BS, dtype=dtype)
        mask_BS = mask_BS.masked_fill(~block.valid_BS, torch.finfo(dtype).min)
        scores_BHSS = scores_BHSS + mask_BS[:, None, None, :]
    return scores_BHSS


def sdpa(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, dropout_p: float) -> Attended:
    """PyTorch's kernel, which keeps no attention maps. Arguments as for ``eager``."""
    contexts = []
    for block, q_BHSK, k_BHSK, v_BHSK in rectangles(layout, q_NHK, k_NHK, v_NHK):
        mask_BHSS = None
        if block.valid_BS is not None:
            mask_BHSS = block.valid_BS[:, None, None, :].expand(-1, 1, block.length, -1)
        scale = q_BHSK.shape[-1] ** -0.5
        context_BHSK = F.scaled_dot_product_attention(
            q_BHSK, k_BHSK, v_BHSK, attn_mask=mask_BHSS, dropout_p=dropout_p, scale=scale
        )
        contexts.append(context_BHSK)
    return Attended(_flat(contexts), None)


def rectangles(
    layout: Layout, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor
) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
    """Every block with its q, k and v as (rows, H, S, K): views, nothing is copied.

    A single block is not split: splitting would copy its gradient in another memory order, and
    sums over it would round differently.
    """
    blocks = layout.blocks
    sizes = [block.rows * block.length for block in blocks]
    parts = [x.split(sizes) if len(blocks) > 1 else [x] for x in (q_NHK, k_NHK, v_NHK)]
    for block, q, k, v in zip(blocks, *parts):
        shape = (block.rows, block.length, *q.shape[1:])
        yield block, *(x.view(shape).transpose(1, 2) for x in (q, k, v))


def _flat(contexts: list[Tensor]) -> Tensor:
    """(rows, H, S, K) of every block to (N, H, K)."""
    flat = [x_BHSK.transpose(1, 2).flatten(0, 1) for x_BHSK in contexts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
