"""Where the sentences of a batch lie in memory.

The body of the model works on a flat list of tokens, ``x_ND``. Linear layers, LayerNorm, GELU and
dropout do not know what a sentence is. Only positions and attention do, and they ask the layout.

``Padded``: B sentences of S tokens, short ones filled up with padding. N = B * S.
``Packed``: B sentences end to end, no padding. N = the sum of their lengths.

Attention sees either layout as dense *blocks*, rectangles of equally long rows. A padded batch is
one block with a mask. A packed batch has a block for each run of neighbours of equal length:
sentences sorted by length make few, large blocks, and any order is correct.

Shape legend:
  B sentences   S padded length   N tokens in the batch   D hidden size   H heads   K head size
  F feed-forward size   L labels   V vocabulary   W words
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
    """A rectangle of the token axis: ``rows`` sentences of ``length`` tokens each."""

    rows: int
    length: int
    valid_BS: Tensor | None = None  # (rows, length) bool; None when every position is a real token


@dataclass(frozen=True, eq=False)
class Padded:
    """B sentences of S tokens each, padding included. Build with ``from_mask``."""

    rows: int  # B
    length: int  # S
    valid_BS: Tensor | None = None  # bool, True at real tokens; None when every position is one

    @classmethod
    def from_mask(cls, input_ids: Tensor, attention_mask: Tensor | None) -> Padded:
        """Layout of ``input_ids`` (B, S) and a mask of the same shape, nonzero at real tokens.

        A mask that hides nothing becomes None, as in transformers: attention without a mask runs
        another kernel, whose last bits differ. A compiled or exported graph keeps its mask.
        """
        rows, length = input_ids.shape
        if attention_mask is None:
            return cls(rows, length)
        if attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(attention_mask.shape)}, but input_ids has {(rows, length)}"
            raise ValueError(f"attention_mask has shape {shapes}: they must be equal")
        valid_BS = attention_mask != 0
        hides = torch.compiler.is_compiling() or not bool(valid_BS.all())
        return cls(rows, length, valid_BS if hides else None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, padding included."""
        return (self.length,) * self.rows

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The whole batch as one block."""
        return (Block(self.rows, self.length, self.valid_BS),)

    def spread_positions(self, table_PD: Tensor) -> Tensor:
        """Rows of the position table for every token: (N, D).

        ``expand`` rather than an index: its gradient sums over the batch in transformers' order.
        """
        position_SD = table_PD[: self.length]
        return position_SD.expand(self.rows, -1, -1).reshape(-1, table_PD.shape[1])

    def count(self, real_N: Tensor) -> Tensor:
        """The running sum of 0s and 1s (N,) within each sentence: (N,)."""
        return self.unflatten(real_N).cumsum(1).flatten()

    def unflatten(self, x_N: Tensor) -> Tensor:
        """(N, ...) to (B, S, ...)."""
        return x_N.view(self.rows, self.length, *x_N.shape[1:])

    def unflatten_maps(self, maps: list[Tensor]) -> Tensor:
        """Attention maps, one (rows, H, S, S) a block, to (B, H, S, S)."""
        return maps[0]


@dataclass(frozen=True, eq=False)
class Packed:
    """B sentences end to end, no padding. Build with ``from_lengths``."""

    lengths: tuple[int, ...]  # tokens of each sentence, in memory order
    starts: Tensor  # (B + 1,) int32: sentence b holds tokens starts[b]:starts[b + 1] ("cu_seqlens")
    position_N: Tensor  # int64, each token's position in its sentence

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> Packed:
        """Layout of sentences of these lengths, a ValueError if one is empty or there is none."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be positive and at least one, got {list(lengths)[:8]}")
        length_B = torch.tensor(lengths, dtype=torch.int32)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(length_B, 0, out=starts[1:])
        first_N = torch.repeat_interleave(starts[:-1].long(), length_B.long())
        position_N = torch.arange(int(starts[-1])) - first_N
        starts, position_N = (x.to(device, non_blocking=True) for x in (starts, position_N))
        return cls(tuple(lengths), starts, position_N)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """One block for each run of neighbouring sentences of equal length."""
        return tuple(Block(sum(1 for _ in run), length) for length, run in groupby(self.lengths))

    def spread_positions(self, table_PD: Tensor) -> Tensor:
        """Rows of the position table for every token: (N, D).

        ``embedding`` rather than an index, whose gradient sums in thread order and so would differ
        from run to run.
        """
        return F.embedding(self.position_N, table_PD)

    def count(self, real_N: Tensor) -> Tensor:
        """The running sum of 0s and 1s (N,) within each sentence: (N,)."""
        before_N = real_N.cumsum(0) - real_N
        first_N = torch.arange(len(real_N), device=real_N.device) - self.position_N
        return before_N - before_N[first_N] + real_N

    def unflatten(self, x_N: Tensor) -> Tensor:
        """A packed batch is no rectangle: (N, ...) stays (N, ...)."""
        return x_N

    def unflatten_maps(self, maps: list[Tensor]) -> list[Tensor]:
        """Attention maps, one (rows, H, S, S) a block, to one (H, S, S) a sentence."""
        return [map_HSS for block_BHSS in maps for map_HSS in block_BHSS]


Layout = Padded | Packed
