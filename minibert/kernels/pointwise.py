"""Dropout, residual and LayerNorm in one pass, by torch's own compiler.

Written out they read and write the activations three times, and their gradients as often. Nothing
in them needs tensor cores or a layout that a compiler would not find, so inductor writes these
kernels; on Turing too, where Triton only fails at matrix products.

(Bias and GELU need no kernel: the matrix product adds the bias while it still holds the result, and
GELU is one pass already.)
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_add_norm(
    x_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """LayerNorm(dropout(x) + residual), (N, D): what follows each half of an encoder layer.

    Args:
        x_ND, residual_ND: any floating dtype.
        weight_D, bias_D: the norm's.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x; 0 outside training.
    """
    mixed_ND = F.dropout(x_ND, dropout_p) + residual_ND
    return F.layer_norm(mixed_ND, weight_D.shape, weight_D, bias_D, eps)


@cache
def compiled_dropout_add_norm():
    """The same function, compiled once for any number of tokens; takes seconds at the first call.

    Inductor draws its own dropout masks: the same seed gives another mask than the plain function.
    """
    return torch.compile(dropout_add_norm, dynamic=True)
