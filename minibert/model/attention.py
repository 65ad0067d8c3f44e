"""Multi-head self-attention, three times with one signature.

    attend(q_NHK, k_NHK, v_NHK, layout, dropout_p) -> Attended

``eager``  softmax(q kᵀ / √K + mask) v (Vaswani et al. 2017, equation 1), spelled out
``sdpa``   the same by ``torch.nn.functional.scaled_dot_product_attention``
``fused``  the project's own CUDA kernels on sequences without padding (``minibert/kernels``)

The model picks one of them once, when it is built (``choose``), and never asks again.
Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.model.layout import Block, Layout, Padded
from minibert.speed import cuda


class Attended(NamedTuple):
    """What attention gives back."""

    context_NHK: Tensor
    probs: list[Tensor] | None  # eager only: one (rows, H, S, S) a block, dropout applied


AttentionFn = Callable[[Tensor, Tensor, Tensor, Layout, float], Attended]


def eager(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, dropout_p: float
) -> Attended:
    """Scores, softmax and weighted sum written out.

    Args:
        q_NHK, k_NHK, v_NHK: (N, H, K), any floating dtype, any stride over N.
        layout: where the sentences lie.
        dropout_p: probability of dropping an attention weight; 0 outside training.

    Returns:
        Context (N, H, K) and the attention maps.
    """
    contexts, probs = [], []
    for block, q_BHSK, k_BHSK, v_BHSK in rectangles(layout, q_NHK, k_NHK, v_NHK):
        scores_BHSS = scores(block, q_BHSK, k_BHSK)
        probs_BHSS = F.dropout(F.softmax(scores_BHSS, dim=-1), dropout_p)
        contexts.append(_flat(torch.matmul(probs_BHSS, v_BHSK)))
        probs.append(probs_BHSS)
    return Attended(_join(contexts), probs)


def scores(block: Block, q_BHSK: Tensor, k_BHSK: Tensor) -> Tensor:
    """q kᵀ / √K + mask of one block: (rows, H, S, S)."""
    scores_BHSS = torch.matmul(q_BHSK, k_BHSK.transpose(2, 3)) * q_BHSK.shape[-1] ** -0.5
    if block.valid_BS is not None:
        # The lowest finite value and not -inf: a row in which everything is hidden then
        # becomes uniform attention instead of NaN.
        mask_BS = torch.zeros_like(block.valid_BS, dtype=block.dtype)
        mask_BS = mask_BS.masked_fill(~block.valid_BS, torch.finfo(block.dtype).min)
        scores_BHSS = scores_BHSS + mask_BS[:, None, None, :]
    return scores_BHSS


def sdpa(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, dropout_p: float) -> Attended:
    """The same by PyTorch's kernel, which keeps no attention maps. Arguments as ``eager``."""
    contexts = []
    for block, q_BHSK, k_BHSK, v_BHSK in rectangles(layout, q_NHK, k_NHK, v_NHK):
        mask_BHSS = None
        if block.valid_BS is not None:
            mask_BHSS = block.valid_BS[:, None, None, :].expand(-1, 1, block.length, -1)
        context_BHSK = F.scaled_dot_product_attention(
            q_BHSK,
            k_BHSK,
            v_BHSK,
            attn_mask=mask_BHSS,
            dropout_p=dropout_p,
            scale=q_BHSK.shape[-1] ** -0.5,
        )
        contexts.append(_flat(context_BHSK))
    return Attended(_join(contexts), None)


def rectangles(
    layout: Layout, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor
) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
    """Every block with its q, k and v as (rows, H, S, K): views, nothing is copied.

    One block is the tensor itself: splitting it would copy its gradient, and in another memory
    order the sums over it round differently.
    """
    blocks = layout.blocks
    sizes = [block.rows * block.length for block in blocks]
    parts = [x.split(sizes) if len(blocks) > 1 else [x] for x in (q_NHK, k_NHK, v_NHK)]
    for block, q, k, v in zip(blocks, *parts):
        shape = (block.rows, block.length, *q.shape[1:])
        yield block, *(x.view(shape).transpose(1, 2) for x in (q, k, v))


def _flat(x_BHSK: Tensor) -> Tensor:
    """(rows, H, S, K) back to (rows * S, H, K)."""
    return x_BHSK.transpose(1, 2).flatten(0, 1)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fused(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, dropout_p: float
) -> Attended:
    """The same without padding, on CUDA, by kernels that keep no attention maps.

    The kernels know packed sentences only. Of a padded batch they get the real tokens; padding
    comes back as zeros, and so does a row in which everything is hidden. Arguments as ``eager``.

    Raises:
        FusedUnavailableError: no fused kernel runs on this device in this dtype.
    """
    qkv = (q_NHK, k_NHK, v_NHK)
    if isinstance(layout, Padded) and layout.valid_BS is not None:
        context_NHK = cuda.attend_padded(
            *qkv, layout.real_tokens, layout.starts, layout.max_length, dropout_p
        )
    else:
        context_NHK = cuda.attend_packed(*qkv, layout.starts, layout.max_length, dropout_p)
    return Attended(context_NHK, None)


IMPLEMENTATIONS: dict[str, AttentionFn] = {"eager": eager, "sdpa": sdpa, "fused": fused}


def implementation(name: str) -> AttentionFn:
    """The attention function of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={name!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[name]


class Choice(NamedTuple):
    """An attention implementation and why it was taken."""

    name: str
    reason: str


def choose(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> Choice:
    """Settle "auto", and make sure that what was asked for by name can run.

    Args:
        name: "eager", "sdpa", "fused" or "auto": fused where it runs, else sdpa.
        device: where the model runs.
        dtype: of its parameters.
        head_size: K.

    Raises:
        ValueError: no implementation has that name.
        FusedUnavailableError: "fused" was asked for and cannot run here; it says why.
    """
    if name in ("eager", "sdpa"):
        return Choice(name, "asked for")
    if name not in ("fused", "auto"):
        implementation(name)
    try:
        rung = cuda.choose(device, dtype, head_size)
    except cuda.FusedUnavailableError as error:
        if name == "fused":
            raise
        return Choice("sdpa", str(error).partition(": use ")[0])
    return Choice("fused", f"{rung.name}: {rung.reason}")
