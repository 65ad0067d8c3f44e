"""Attention and add-norm by the project's CUDA kernels, as the core's implementation "fused".

Importing this module registers it; the core does not know it. Shape legend: see model/layout.py.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.machine import Chosen
from minibert.model.attention import Attended
from minibert.model.encoder import IMPLEMENTATIONS, Implementation, implementation
from minibert.model.layout import Layout, Packed, Padded
from minibert.speed import cuda

# The real tokens of the padded batches in use, found once a batch instead of once a layer.
_real_tokens: WeakKeyDictionary[Padded, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def attend(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, dropout_p: float
) -> Attended:
    """Attention without padding, by kernels that keep no attention maps.

    The kernels know packed sentences only. Of a padded batch they get the real tokens; the result
    is zero at padding, and in a row that is all padding. Arguments as for ``attention.eager``.

    Raises:
        FusedUnavailableError: no fused kernel runs on this device in this dtype.
    """
    qkv = (q_NHK, k_NHK, v_NHK)
    if isinstance(layout, Padded) and layout.valid_BS is not None:
        context_NHK = cuda.attend_padded(*qkv, *real_tokens(layout), layout.length, dropout_p)
    else:
        context_NHK = cuda.attend_packed(
            *qkv, starts(layout, q_NHK.device), max(layout.lengths), dropout_p
        )
    return Attended(context_NHK, None)


def starts(layout: Layout, device: torch.device) -> Tensor:
    """(B + 1,) int32: where each sentence starts, of a batch without padding."""
    if isinstance(layout, Packed):
        return layout.starts
    stop = (layout.rows + 1) * layout.length
    return torch.arange(0, stop, layout.length, dtype=torch.int32, device=device)


def real_tokens(layout: Padded) -> tuple[Tensor, Tensor]:
    """The flat positions of the real tokens, int64; and where each row starts among them, int32.

    Synchronises with the GPU.
    """
    if layout not in _real_tokens:
        valid_BS = layout.valid_BS
        assert valid_BS is not None
        row_starts = F.pad(valid_BS.sum(1).cumsum(0), (1, 0)).int()
        _real_tokens[layout] = valid_BS.flatten().nonzero()[:, 0], row_starts
    return _real_tokens[layout]


def add_norm(y_ND: Tensor, x_ND: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
    """LayerNorm(dropout(y) + x) in one pass over memory. Hooks on the two modules do not run."""
    dropout_p = dropout.p if dropout.training else 0.0
    return cuda.add_norm(y_ND, x_ND, norm.weight, norm.bias, norm.eps, dropout_p)


IMPLEMENTATIONS["fused"] = Implementation(attend, add_norm)


def choose(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> Chosen[str]:
    """Resolve "auto", and check that an implementation requested by name can run.

    Args:
        name: "eager", "sdpa", "fused", or "auto": fused if it runs, else sdpa.
        device: of the model.
        dtype: of its parameters.
        head_size: K.

    Raises:
        ValueError: no implementation has that name.
        FusedUnavailableError: "fused" cannot run here; the message says why.
    """
    if name not in ("fused", "auto"):
        implementation(name)
        return Chosen(name, "requested")
    try:
        rung = cuda.choose(device, dtype, head_size)
    except cuda.FusedUnavailableError as error:
        if name == "fused":
            raise
        return Chosen("sdpa", str(error).partition(": use ")[0])
    return Chosen("fused", f"{rung.name}: {rung.reason}")
