"""What scales an update: the learning rate's schedule, gradient clipping, loss scaling."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def linear_schedule(step: int, total: int, warmup: int = 0) -> float:
    """The factor on the learning rate: from 0 to 1 over ``warmup`` steps, then linearly to 0.

    Args:
        step: optimiser steps done so far, from 0.
        total: steps of the whole run.
        warmup: steps in which the rate rises.

    The formula, corner cases included, is that of transformers'
    ``get_linear_schedule_with_warmup``.
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


@torch.no_grad()
def joint_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector, a scalar tensor.

    Computed as the norm of the tensors' norms, in the given order: another order rounds
    differently.
    """
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, scale: float = 1.0
) -> Tensor:
    """Divide all gradients by ``scale``, then shrink them to a joint 2-norm of ``max_norm``.

    With scale 1 the same bits as ``torch.nn.utils.clip_grad_norm_``, and with any power of two too.

    Returns:
        The norm of the unscaled gradients before clipping, a scalar tensor.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = joint_norm(gradients) / scale
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0) / scale
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


class LossScaler:
    """Keeps fp16 gradients away from zero and infinity (Micikevicius et al. 2018, section 3.2).

    The loss is multiplied by ``scale`` before the backward pass, and the gradients are divided by
    it before clipping. An overflow skips the step and halves the scale; ``patience`` good steps
    double it. After ``limit`` skipped steps in a row the numbers themselves are wrong.
    """

    def __init__(self, scale: float = 65536.0, patience: int = 2000, limit: int = 25):
        self.scale = scale
        self.patience = patience
        self.limit = limit
        self.good_steps = 0
        self.skipped = 0  # in a row

    @property
    def gave_up(self) -> bool:
        """Whether halving the scale has not helped."""
        return self.skipped >= self.limit

    def record(self, finite: bool) -> bool:
        """Adapt the scale after a step with finite gradients or not; returns ``finite``."""
        if not finite:
            self.scale /= 2
            self.good_steps = 0
            self.skipped += 1
        else:
            self.skipped = 0
            self.good_steps += 1
            if self.good_steps == self.patience:
                self.scale *= 2
                self.good_steps = 0
        return finite
