"""The average of the weights over training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The average of the weights over the steps of training, later steps counting more.

    The average of the points on the path is nearer to the minimum than the last of them (Polyak &
    Juditsky 1992). Here the weights after step t count about in proportion to t^power:
    polynomial-decay averaging (Shamir & Zhang 2013, section 4), in which no number depends on how
    long the run is.

    Args:
        parameters: what to average.
        power: 0 is the plain mean; ``inf`` the last weights alone, which takes no memory.

    Raises:
        ValueError: a negative power.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], power: float):
        if not power >= 0:
            raise ValueError(f"power must not be negative, got {power}")
        self.power = power
        self.weights = [p.detach() for p in parameters] if math.isfinite(power) else []
        self.averages = [weight.clone() for weight in self.weights]

    def update(self, step: int) -> None:
        """Take the weights after a step in; ``step`` counts from 1."""
        if self.averages:  # on a GPU by one kernel for many of them
            share = (self.power + 1) / (self.power + step)
            torch._foreach_lerp_(self.averages, self.weights, share)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model has the averages for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
