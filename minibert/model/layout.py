"""How the sentences of a batch lie in memory.

The body of the model works on a flat list of tokens, ``x_ND``. Linear layers, LayerNorm, GELU and
dropout do not know what a sentence is; only positions and attention do, and they ask the layout.

``Padded``: B sentences of S tokens, the short ones filled up; N = B * S.
``Packed``: B sentences end to end and nothing between them; N = the sum of their lengths.

To attention both are a few dense *blocks*, each a rectangle of equally long rows: a padded batch is
one block with a mask, a packed batch one block for every run of neighbours of equal length.
Sentences sorted by length therefore make few, large blocks; any order is correct.

Shape legend, used in every file of the project:
  B sentences   S padded length   N tokens in the batch   D hidden size   H heads   K head size
  F feed-forward size   L labels   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """A rectangle of the flat token axis: ``rows`` sentences of ``length`` tokens each."""

    rows: int
    length: int
    valid_BS: Tensor | None = None  # (rows, length) bool; None when every position is a real token
    dtype: torch.dtype = torch.float32  # of the hidden states, and so of an additive mask


@dataclass(frozen=True)
class Padded:
    """B sentences of S tokens each, padding included.

    Args:
        rows: B.
        length: S.
        valid_BS: (B, S) bool, True at real tokens; None when all are. Build with ``from_mask``.
        device: where the batch is.
        dtype: of the hidden states. Under autocast not that of the scores: a mask of this dtype
            then widens them before the softmax, as it does in transformers.
    """

    rows: int
    length: int
    valid_BS: Tensor | None = None
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_mask(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Padded:
        """Layout of padded ``input_ids`` (B, S); the mask, like it, is nonzero at real tokens.

        A mask that hides nothing becomes None: the reference does the same, and attention without
        a mask takes another kernel, whose last bits differ.

        Raises:
            ValueError: the mask's shape is not (B, S).
        """
        rows, length = input_ids.shape
        if attention_mask is None:
            return cls(rows, length, None, input_ids.device, dtype)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, "
                f"but input_ids has {(rows, length)}: they must be equal"
            )
        valid_BS = attention_mask != 0
        hides = not bool(valid_BS.all())
        return cls(rows, length, valid_BS if hides else None, input_ids.device, dtype)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return self.length

    @cached_property
    def real_tokens(self) -> Tensor:
        """Where the real tokens lie on the flat axis: int64, in order. Waits for a GPU, once."""
        assert self.valid_BS is not None
        return self.valid_BS.flatten().nonzero()[:, 0]

    @cached_property
    def starts(self) -> Tensor:
        """(B + 1,) int32: where each row's real tokens begin when padding is left out."""
        if self.valid_BS is None:
            stop = (self.rows + 1) * self.length
            return torch.arange(0, stop, self.length, dtype=torch.int32, device=self.device)
        return F.pad(self.valid_BS.sum(1).cumsum(0), (1, 0)).int()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The whole batch as one block."""
        return (Block(self.rows, self.length, self.valid_BS, self.dtype),)

    def spread_positions(self, table_PD: Tensor) -> Tensor:
        """Rows of the position table for every token: (N, D).

        ``expand`` and not an index: its gradient is the sum over the batch, the order in which
        transformers adds it up.
        """
        position_SD = table_PD[: self.length]
        return position_SD.expand(self.rows, -1, -1).reshape(-1, table_PD.shape[1])

    def unflatten(self, x_N: Tensor) -> Tensor:
        """(N, ...) to (B, S, ...)."""
        return x_N.view(self.rows, self.length, *x_N.shape[1:])

    def unflatten_maps(self, maps: list[Tensor]) -> Tensor:
        """Attention maps by block to (B, H, S, S)."""
        return maps[0]


@dataclass(frozen=True)
class Packed:
    """B sentences end to end, no padding. Build with ``from_lengths``.

    Args:
        lengths: tokens of each sentence, in the order they lie in memory.
        starts: (B + 1,) int32, sentence b holds tokens ``starts[b]:starts[b + 1]``
            (the ``cu_seqlens`` of flash attention).
        position_N: (N,) int64, each token's position in its sentence.
    """

    lengths: tuple[int, ...]
    starts: Tensor
    position_N: Tensor

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> Packed:
        """Layout of sentences of these lengths.

        Raises:
            ValueError: no sentence, or one of no tokens.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be positive and at least one, got {list(lengths)[:8]}")
        length_B = torch.tensor(lengths, dtype=torch.int32)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(length_B, 0, out=starts[1:])
        first_N = torch.repeat_interleave(starts[:-1].long(), length_B.long())
        position_N = torch.arange(int(starts[-1])) - first_N
        starts, position_N = (x.to(device, non_blocking=True) for x in (starts, position_N))
        return cls(tuple(lengths), starts, position_N)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sentence."""
        return max(self.lengths)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """One block for every run of neighbouring sentences of equal length."""
        return tuple(Block(sum(1 for _ in run), length) for length, run in groupby(self.lengths))

    def spread_positions(self, table_PD: Tensor) -> Tensor:
        """Rows of the position table for every token: (N, D).

        ``embedding`` and not an index: the gradient of an index adds up in whatever order the
        threads come by, and the same run would end in other bits.
        """
        return F.embedding(self.position_N, table_PD)

    def unflatten(self, x_N: Tensor) -> Tensor:
        """A packed batch has no rectangle to return to: (N, ...) stays (N, ...)."""
        return x_N

    def unflatten_maps(self, maps: list[Tensor]) -> list[Tensor]:
        """Attention maps by block to one (H, S, S) a sentence."""
        return [map_HSS for block_BHSS in maps for map_HSS in block_BHSS]


Layout = Padded | Packed
