"""The kernels' results in float64, each with a bound on how far a kernel may be from it.

The bounds are worst cases, element by element, of the kernels' arithmetic on exact inputs:

* q kᵀ and d_context vᵀ sum K products in float32. A tensor core may truncate instead of rounding,
  so an addition errs by at most 2^-23 of the sum of absolute values, not 2^-24.
* exp2, log2 and the other float32 steps err by a few 2^-23 relative.
* Probabilities and ds are rounded to float16 before the second product: 2^-11 relative, and 2^-25
  absolute below float16's normal range.
* Results are rounded to their dtype.

One percent on top covers second-order terms of attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = 2.0**-11  # unit roundoff of float16
TINY = 2.0**-25  # half of float16's smallest number
SINGLE = 2.0**-23  # one float32 step, truncation allowed
PHILOX_ROUNDS = 7

Bounded = tuple[Tensor, Tensor]  # a result in float64, and the bound on the distance from it


def check(got: dict[str, Tensor], want: dict[str, Bounded]) -> None:
    """Every element is within its bound, and so not NaN."""
    assert got.keys() == want.keys()
    for name, (value, bound) in want.items():
        error = (got[name].cpu().double() - value).abs()
        wrong = ~(error <= bound)
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements beyond their bound, the first "
            f"at {wrong.nonzero()[0].tolist()}, error up to {error.max():.2e}"
        )


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


def kept(seed: int, first_token: int, length: int, heads: int, dropout_p: float) -> Tensor:
    """The weights that dropout keeps in one sentence: (H, length, length) bool."""
    position = torch.arange(length)
    draw, bit = position // 16 * 8 + position % 8, position // 8 % 2
    counter0 = (first_token + draw)[None, :, None].expand(heads, length, length)
    counter1 = torch.arange(heads)[:, None, None] << 16 | draw[None, None, :]
    low, high = philox(seed, counter0, counter1.expand_as(counter0))
    word = torch.where(bit[:, None] == 1, high, low)  # bits 32.. for the query eight further
    random = (word >> 16 * bit[None, :]) & 0xFFFF  # and 16.. for the key eight further
    return random >= round(dropout_p * 65536)


def scale_of_kept(dropout_p: float) -> float:
    """1 / (1 - p), for p rounded to a multiple of 1/65536."""
    return 65536 / (65536 - round(dropout_p * 65536))


def attention(
    qkv_N3HK: Tensor,
    d_context_NHK: Tensor,
    lengths: list[int],
    seed: int = 0,
    dropout_p: float = 0.0,
) -> dict[str, Bounded]:
    """Forward and backward of one packed batch: context, lse, dq, dk, dv."""
    sentences = []
    start = 0
    for length in filter(None, lengths):
        tokens = slice(start, start + length)
        keep_HSS = torch.ones(1, length, length, dtype=torch.float64)
        if dropout_p:
            keep_HSS = kept(seed, start, length, qkv_N3HK.shape[2], dropout_p).double()
            keep_HSS = keep_HSS * scale_of_kept(dropout_p)
        sentences.append(_sentence(qkv_N3HK[tokens], d_context_NHK[tokens], keep_HSS))
        start += length

    def join(name: str, i: int) -> Tensor:
        return torch.cat([sentence[name][i] for sentence in sentences], -1 if name == "lse" else 0)

    return {name: (join(name, 0), join(name, 1)) for name in sentences[0]}


def _sentence(qkv_S3HK: Tensor, d_context_SHK: Tensor, keep: Tensor) -> dict[str, Bounded]:
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

    def tokens_first(x_HSK: Tensor, bound_HSK: Tensor) -> Bounded:
        return x_HSK.transpose(0, 1), 1.01 * bound_HSK.transpose(0, 1)

    return {
        "context": tokens_first(context, context_bound),
        "lse": (lse, 1.01 * lse_bound),
        "dq": tokens_first(d_q, d_q_bound),
        "dk": tokens_first(d_k, d_k_bound),
        "dv": tokens_first(d_v, d_v_bound),
    }


def kept_numbers(seed: int, rows: int, D: int, dropout_p: float) -> Tensor:
    """The numbers that add_norm's dropout keeps, (rows, D) bool: 16 bits each, four to a draw."""
    column, row = torch.arange(D), torch.arange(rows)
    step, lane = column // 64, column % 64 // 2
    draw = (step // 2 * 32 + lane).expand(rows, D)
    low, high = philox(seed, row[:, None].expand(rows, D), draw)
    word = torch.where(step % 2 == 1, high, low)
    return (word >> 16 * (column % 2) & 0xFFFF) >= round(dropout_p * 65536)


def add_norm(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: int,
    eps: float,
    dropout_p: float,
) -> dict[str, Bounded]:
    """Forward and backward of LayerNorm(dropout(x) + residual): y, dx, dresidual, dweight, dbias.

    A number goes through a sum over the row (D / 32 in a lane, then five exchanges) and about 16
    more operations, each of which errs by 2^-24 of the largest number in it. Subtracting the mean
    shrinks h but not its error: hence `grown`.
    """
    rows, D = x.shape
    keep = kept_numbers(seed, rows, D, dropout_p) * scale_of_kept(dropout_p)
    exact = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    h = exact[0] * keep + exact[1]
    y = F.layer_norm(h, (D,), *exact[2:], eps=eps)
    dx, dresidual, dweight, dbias = torch.autograd.grad(y, exact, dy.double())
    y, h, dy, weight = y.detach(), h.detach(), dy.double(), weight.double()
    s = 1 / (h.var(1, correction=0, keepdim=True) + eps).sqrt()
    n = (h - h.mean(1, keepdim=True)) * s
    g = (dy * weight).abs().amax(1, keepdim=True)
    unit = (2 * (D / 32) + 32) * 2**-24
    grown = 1 + h.abs().amax(1, keepdim=True) * s
    most = 1 + n.abs().amax(1, keepdim=True)
    every_row = (rows + 32) * 2**-24 * grown.amax()
    of_dweight = every_row * (dy * n).abs().sum(0) + unit * grown.amax() * dy.abs().sum(0)

    def stored(value: Tensor, bound: Tensor, dtype: torch.dtype) -> Bounded:
        half = dtype == torch.float16
        return value, bound + (HALF if half else 2**-24) * value.abs() + TINY * half

    of_y = unit * (grown * weight.abs() + bias.double().abs())
    of_dresidual = unit * s * g * most * most * grown
    return {
        "y": stored(y, of_y, residual.dtype),
        "dx": stored(dx, 2 * of_dresidual, x.dtype),
        "dresidual": stored(dresidual, of_dresidual, residual.dtype),
        "dweight": stored(dweight, of_dweight, torch.float32),
        "dbias": stored(dbias, every_row * dy.abs().sum(0), torch.float32),
    }
