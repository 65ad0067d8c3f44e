"""Why kernels cannot run here: each is tried once, on a tiny batch, beside float64.

A driver refuses a binary only when a kernel of it is loaded, and a fault shows after a launch. So
"can run" means compiled, loaded, launched, and right. A trial takes milliseconds, and seconds where
it has to compile.

Shape legend: see model/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.speed.cuda import adamw as adamw_kernel
from minibert.speed.cuda import attention as attention_kernels
from minibert.speed.cuda import build
from minibert.speed.cuda import norm as norm_kernels

LENGTHS = (20, 7)  # of the sentences that attention is tried on
ERROR = 2.0**-7  # of the largest number; a wrong layout errs by all of it


@lru_cache
def attention(
    device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float = 0.0
) -> str | None:
    """Why the attention kernels cannot run here, or None."""
    if dtype != torch.float16:
        return f"the dtype must be float16, not {str(dtype).removeprefix('torch.')}"
    if head_size not in attention_kernels.HEAD_SIZES:
        return f"the head size must be one of {attention_kernels.HEAD_SIZES}, not {head_size}"
    return _obstacle(device, lambda: try_attention(device, head_size, dropout_p))


@lru_cache
def norm(
    device: torch.device, hidden_size: int, residual: torch.dtype, dropout_p: float = 0.0
) -> str | None:
    """Why the add-norm kernels cannot run here with a residual of this dtype, or None."""
    step, most = norm_kernels.STEP, norm_kernels.MOST
    if hidden_size % step or not 0 < hidden_size <= most:
        return f"the hidden size must be a multiple of {step} up to {most}, not {hidden_size}"
    return _obstacle(device, lambda: try_norm(device, hidden_size, residual, dropout_p))


@lru_cache
def adamw(device: torch.device, semantics: str) -> str | None:
    """Why the AdamW kernel cannot run here, or None."""
    return _obstacle(device, lambda: try_adamw(device, semantics))


def _obstacle(device: torch.device, trial: Callable[[], None]) -> str | None:
    if device.type != "cuda":
        return f"a CUDA device is required, not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return f"compute capability 7.5 is required, this is {capability[0]}.{capability[1]}"
    try:
        with torch.inference_mode(False), torch.enable_grad():
            trial()
    except build.BuildError as error:
        return str(error)
    except Exception as error:  # of the driver, of any version of cuda-core, or of `_compare`
        return f"a first launch fails ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


def _compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Raises:
    ArithmeticError: a result is far from float64's.
    """
    for name, value in want.items():
        error = float((got[name].cpu().double() - value).abs().max() / value.abs().max())
        if not error <= ERROR:
            raise ArithmeticError(f"{name} differs from float64 by {error:.0%} of the largest")


def try_attention(device: torch.device, head_size: int, dropout_p: float) -> None:
    """Run all attention kernels, the ones for short and those for long sentences.

    The rows of v are unit vectors, so that the context shows which weights were dropped.

    Raises:
        BuildError: they cannot be compiled.
        ArithmeticError: a result is wrong.
    """
    draw = torch.Generator().manual_seed(0)
    H, N = 2, sum(LENGTHS)
    q, k, d_context = torch.randn(3, N, H, head_size, generator=draw).half()
    v = torch.cat([torch.eye(n, head_size) for n in LENGTHS])[:, None].repeat(1, H, 1).half()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    seed = torch.tensor([1 << 40 | 7], device=device) if dropout_p else None
    there = (q.to(device), k.to(device), v.to(device))
    for max_length in (max(LENGTHS), attention_kernels.SHORT + 1):
        context, lse = attention_kernels.forward(*there, starts, seed, max_length, dropout_p)
        grad = attention_kernels.backward(
            d_context.to(device), *there, context, lse, starts, seed, max_length, dropout_p
        )
        kept = context.cpu() != 0
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        sentences = zip(*(x.split(LENGTHS) for x in (*leaves, kept)))
        want = torch.cat([_attend(q, k, v, kept, dropout_p) for q, k, v, kept in sentences])
        grads = torch.autograd.grad(want, leaves, d_context.double())
        got = {"context": context} | dict(zip(("dq", "dk", "dv"), grad.unbind(1)))
        _compare(got, dict(zip(got, (want.detach(), *grads))))


def _attend(q_SHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, kept: Tensor, dropout_p: float) -> Tensor:
    scores_HSS = torch.einsum("ihk,jhk->hij", q_SHK, k_SHK) * q_SHK.shape[2] ** -0.5
    kept_HSS = kept[:, :, : len(kept)].transpose(0, 1)
    _check_rate(kept_HSS, dropout_p)
    probs_HSS = scores_HSS.softmax(-1) * kept_HSS / (1 - dropout_p)
    return torch.einsum("hij,jhk->ihk", probs_HSS, v_SHK)


def _check_rate(kept: Tensor, dropout_p: float) -> None:
    rate = float(kept.float().mean())
    if abs(rate - (1 - dropout_p)) > (0.2 if dropout_p else 0):
        raise ArithmeticError(f"dropout of {dropout_p} keeps {rate:.0%}")


def try_norm(
    device: torch.device, hidden_size: int, residual: torch.dtype, dropout_p: float
) -> None:
    """Run dropout, residual and LayerNorm forward and backward; raises like ``try_attention``."""
    draw = torch.Generator().manual_seed(0)
    x, before, dy = torch.randn(3, 5, hidden_size, generator=draw)
    weight, bias = torch.randn(2, hidden_size, generator=draw).to(residual)
    x, before, dy = x.half(), before.to(residual), dy.to(residual)
    seed = torch.tensor([1 << 40 | 7], device=device) if dropout_p else None
    there = (x.to(device), before.to(device), weight.to(device))
    y, mean, scale = norm_kernels.forward(*there, bias.to(device), seed, 1e-5, dropout_p)
    dx, d_before, sums = norm_kernels.backward(dy.to(device), *there, mean, scale, seed, dropout_p)
    kept = dx.cpu() != 0  # dx is the residual's gradient after dropout
    _check_rate(kept, dropout_p)
    leaves = [t.double().requires_grad_() for t in (x, before, weight, bias)]
    h = leaves[0] * kept / (1 - dropout_p) + leaves[1]
    want = F.layer_norm(h, (hidden_size,), leaves[2], leaves[3], 1e-5)
    grads = torch.autograd.grad(want, leaves, dy.double())
    got = {"y": y, "dx": dx, "dresidual": d_before, "dweight": sums[0], "dbias": sums[1]}
    _compare(got, dict(zip(got, (want.detach(), *grads))))


def try_adamw(device: torch.device, semantics: str) -> None:
    """Run the first step of AdamW; raises like ``try_attention``."""
    draw = torch.Generator().manual_seed(0)
    before, gradient = torch.randn(2, adamw_kernel.CHUNK + 3, generator=draw)
    lr, decay, beta1, beta2, eps = 0.5, 0.01, 0.9, 0.999, 1e-6
    there = [before.to(device, copy=True)]
    first, second = [torch.zeros_like(there[0])], [torch.zeros_like(there[0])]
    sweep = adamw_kernel.Sweep(there, first, second, [1.0], [decay], semantics, (beta1, beta2), eps)
    norm = sweep.step([gradient.to(device)], lr)
    g, p = gradient.double(), before.double()
    # After one step the moments are (1 - beta) g and (1 - beta) g²; their correction undoes that.
    corrected = {
        "torch": p * (1 - lr * decay) - lr * g / (g.abs() + eps),
        "transformers": (p - lr * g / (g.abs() + eps / (1 - beta2) ** 0.5)) * (1 - lr * decay),
        "google": p - lr * ((1 - beta1) * g / ((1 - beta2) ** 0.5 * g.abs() + eps) + decay * p),
    }
    _compare(
        {"norm": norm, "parameter": there[0]}, {"norm": g.norm(), "parameter": corrected[semantics]}
    )
