"""Attention over packed sentences in float64, with a bound for what float16 kernels may differ.

The bounds are worst cases, element by element, of this arithmetic (numbers are exact float16):

* q kᵀ and d_context vᵀ sum K products in float32. A tensor core may truncate instead of rounding,
  so each addition errs by at most 2^-23 of the sum of absolute values, not 2^-24.
* exp2, log2 and the other float32 steps err by a few 2^-23 relative.
* probabilities and ds are rounded to float16 before the second product: 2^-11 relative, and below
  float16's normal range 2^-25 absolute.
* results are rounded to float16: the same once more.

Second-order terms are covered by one percent on top.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALF = 2.0**-11  # unit roundoff of float16
TINY = 2.0**-25  # half of float16's smallest number
SINGLE = 2.0**-23  # one float32 step, truncation allowed
PHILOX_ROUNDS = 7


class Reference(NamedTuple):
    """Float64 results and how far from them a kernel may be."""

    context: Tensor  # (N, H, K)
    lse: Tensor  # (H, N)
    grad: Tensor  # (N, 3, H, K): dq, dk, dv
    context_bound: Tensor
    lse_bound: Tensor
    grad_bound: Tensor


def philox(seed: int, counter0: Tensor, counter1: Tensor) -> tuple[Tensor, Tensor]:
    """Philox 2x32 on int64 tensors that hold 32-bit counters (Salmon et al. 2011)."""
    mask = 0xFFFFFFFF
    key = seed & mask
    counter1 = counter1 ^ (seed >> 32)
    for _ in range(PHILOX_ROUNDS):
        low = (counter0 & 0xFFFF) * 0xD256D193
        high = (counter0 >> 16) * 0xD256D193 + (low >> 16)
        product_low = (high & 0xFFFF) << 16 | low & 0xFFFF
        counter0, counter1 = (high >> 16) ^ key ^ counter1, product_low
        key = (key + 0x9E3779B9) & mask
    return counter0, counter1


def kept(seed: int, first_token: int, length: int, heads: int, drop_below: int) -> Tensor:
    """Which weights dropout keeps in one sentence: (H, length, length) bool."""
    position = torch.arange(length)
    draw, bit = position // 16 * 8 + position % 8, position // 8 % 2
    counter0 = (first_token + draw)[None, :, None].expand(heads, length, length)
    counter1 = torch.arange(heads)[:, None, None] << 16 | draw[None, None, :]
    low, high = philox(seed, counter0, counter1.expand_as(counter0))
    word = torch.where(bit[:, None] == 1, high, low)  # bits 32.. for the query eight further
    random = (word >> 16 * bit[None, :]) & 0xFFFF  # and 16.. for the key eight further
    return random >= drop_below


def attention(
    qkv_N3HK: Tensor,
    d_context_NHK: Tensor,
    lengths: list[int],
    seed: int = 0,
    drop_below: int = 0,
) -> Reference:
    """Forward and backward of one packed batch."""
    parts = []
    start = 0
    for length in lengths:
        tokens = slice(start, start + length)
        keep_HSS = torch.ones(1, length, length, dtype=torch.float64)
        if drop_below:
            keep_HSS = kept(seed, start, length, qkv_N3HK.shape[2], drop_below).double()
            keep_HSS = keep_HSS * (65536 / (65536 - drop_below))
        if length:
            parts.append(_sentence(qkv_N3HK[tokens], d_context_NHK[tokens], keep_HSS))
        start += length
    axis = Reference(0, 1, 0, 0, 1, 0)  # where N is
    return Reference(*(torch.cat(part, dim) for part, dim in zip(zip(*parts), axis)))


def _sentence(qkv_S3HK: Tensor, d_context_SHK: Tensor, keep: Tensor) -> Reference:
    q, k, v = qkv_S3HK.double().permute(1, 2, 0, 3)  # (H, S, K) each
    d_context = d_context_SHK.double().transpose(0, 1)
    length, head_size = q.shape[1:]
    scale = head_size**-0.5
    in_k = (head_size + 4) * SINGLE  # a sum over K, and the few steps after it
    in_s = (length / 4 + 16) * SINGLE  # a sum over the sentence: eight terms a product, rescaled

    scores = q @ k.mT * scale
    lse = scores.logsumexp(-1)
    probs = (scores - lse[..., None]).exp()
    context = probs * keep @ v

    # A score errs by `of_score`, and so does the maximum it is compared with.
    of_score = in_k * scale * (q.abs() @ k.abs().mT).amax(-1, keepdim=True)  # (H, S, 1)
    of_prob = 2 * of_score + in_s
    context_bound = (HALF + 2 * of_prob) * (probs * keep @ v.abs()) + TINY * (keep @ v.abs())
    context_bound += HALF * context.abs() + TINY
    lse_bound = of_score[..., 0] + in_s + 4 * SINGLE * (1 + lse.abs())

    of_prob = of_prob + lse_bound[..., None]  # the backward pass starts from the saved lse
    d_v = (probs * keep).mT @ d_context
    d_v_bound = (HALF + of_prob + in_s) * probs * keep + TINY * keep
    d_v_bound = d_v_bound.mT @ d_context.abs() + HALF * d_v.abs() + TINY

    d_probs = d_context @ v.mT * keep
    delta = (d_context * context).sum(-1, keepdim=True)
    d_scores = probs * (d_probs - delta)
    d_probs_bound = in_k * (d_context.abs() @ v.abs().mT) * keep
    delta_bound = (d_context.abs() * (context_bound + in_k * context.abs())).sum(-1, keepdim=True)
    of_d_scores = probs * (d_probs_bound + delta_bound + SINGLE * (d_probs.abs() + delta.abs()))
    of_d_scores += (of_prob + HALF + in_s) * d_scores.abs() + TINY

    d_q, d_k = d_scores @ k * scale, d_scores.mT @ q * scale
    d_q_bound = of_d_scores @ k.abs() * scale + HALF * d_q.abs() + TINY
    d_k_bound = of_d_scores.mT @ q.abs() * scale + HALF * d_k.abs() + TINY

    def tokens_first(*x_HSK: Tensor) -> Tensor:
        return torch.stack(x_HSK).permute(2, 0, 1, 3)  # (S, 3, H, K)

    return Reference(
        context=context.transpose(0, 1),
        lse=lse,
        grad=tokens_first(d_q, d_k, d_v),
        context_bound=1.01 * context_bound.transpose(0, 1),
        lse_bound=1.01 * lse_bound,
        grad_bound=1.01 * tokens_first(d_q_bound, d_k_bound, d_v_bound),
    )
