"""The average of the weights over training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The average of the weights over the steps of training, with more weight on later steps.

    The average of the points on the path is closer to the minimum than the last one (Polyak &
    Juditsky 1992). The weights after step t count roughly in proportion to t^power. This is
    polynomial-decay averaging (Shamir & Zhang 2013, section 4); no parameter of it depends on the
    length of the run.

    Args:
        parameters: what to average.
        power: 0 for the plain mean; ``inf`` for the last weights alone, which takes no memory.

    Raises:
        ValueError: negative power.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], power: float):
        if not power >= 0:
            raise ValueError(f"power must not be negative, got {power}")
        self.power = power
        self.weights = [p.detach() for p in parameters] if math.isfinite(power) else []
        self.averages = [weight.clone() for weight in self.weights]

    def update(self, step: int) -> None:
        """Add the current weights; ``step`` counts from 1."""
        if self.averages:  # foreach: few kernels on a GPU
            share = (self.power + 1) / (self.power + step)
            torch._foreach_lerp_(self.averages, self.weights, share)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the model's weights are the averages."""
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
