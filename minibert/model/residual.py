"""What stands behind attention and feed-forward: dropout, add what went in, normalise.

    add_norm(y_ND, x_ND, norm, dropout) -> x_ND

``plain``  the two modules and a sum, as transformers has them
``fused``  the same in one pass over memory, by the project's CUDA kernels (``speed/cuda/norm.cu``)

The model picks one of them once, with its attention. Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from minibert.speed import cuda

AddNormFn = Callable[[Tensor, Tensor, nn.LayerNorm, nn.Dropout], Tensor]


def plain(y_ND: Tensor, x_ND: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
    """LayerNorm(dropout(y) + x): (N, D) and (N, D) to (N, D), any floating dtypes."""
    return norm(dropout(y_ND) + x_ND)


def fused(y_ND: Tensor, x_ND: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
    """The same by ``cuda.add_norm``; hooks on the two modules see nothing of it."""
    dropout_p = dropout.p if dropout.training else 0.0
    return cuda.add_norm(y_ND, x_ND, norm.weight, norm.bias, norm.eps, dropout_p)


def implementation(attn_implementation: str) -> AddNormFn:
    """The one that goes with this attention."""
    return fused if attn_implementation == "fused" else plain
