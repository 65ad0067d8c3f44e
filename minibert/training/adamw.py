"""AdamW in the three versions that BERT has been trained with, clipping, and the schedule.

They are all called AdamW and differ in four places; over a fine-tuning that is more than noise.

| semantics      | bias correction | eps                 | weight decay             | default eps |
|----------------|-----------------|---------------------|--------------------------|-------------|
| "torch"        | yes             | after the correction| before the update        | 1e-8        |
| "transformers" | yes             | before it           | after the update         | 1e-6        |
| "google"       | no              | no correction       | inside the update        | 1e-6        |

"torch" is ``torch.optim.AdamW`` (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), bit for
bit; "transformers" the AdamW that library shipped until version 5; "google" the optimiser of
google-research/bert (``optimization.py``), which pretrained the weights.

``AdamW`` is the reference and runs anywhere, one of torch's operations at a time. ``FusedAdamW``
(on the CPU, by torch's own kernel) and ``OnePassAdamW`` (on CUDA, by ours) do the same in one pass
over memory, and differ from it by rounding. ``choose_adamw`` decides, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minibert.speed.cuda import adamw

SEMANTICS = {"torch": 1e-8, "transformers": 1e-6, "google": 1e-6}  # name: its default eps


def linear_schedule(step: int, total: int, warmup: int = 0) -> float:
    """The factor on the learning rate: up from 0 over ``warmup`` steps, then down to 0.

    Args:
        step: optimiser steps done so far, from 0.
        total: steps of the whole run.
        warmup: steps of rising rate.

    The formula, corner cases included, is that of transformers'
    ``get_linear_schedule_with_warmup``.
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


@dataclass
class Group:
    """Parameters that share a weight decay and a factor on the learning rate."""

    parameters: list[nn.Parameter]
    weight_decay: float = 0.0
    lr_factor: float = 1.0


def bert_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Decay on matrices and embeddings, none on biases and LayerNorms: the BERT custom.

    A group is a run of neighbours, so that all groups together list the parameters in the order of
    the model, in which clipping adds up their norms.
    """

    def is_spared(named: tuple[str, nn.Parameter]) -> bool:
        return named[0].endswith("bias") or "norm." in named[0]

    return [
        Group([parameter for _, parameter in run], 0.0 if spared else weight_decay)
        for spared, run in groupby(model.named_parameters(), is_spared)
    ]


class AdamW:
    """Adam with decoupled weight decay.

    Args:
        groups: what to train; every parameter once.
        semantics: "torch", "transformers" or "google"; see the table above.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment; None takes the default of the semantics.

    Raises:
        ValueError: unknown semantics, or rates out of range.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        semantics: str = "torch",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
    ):
        if semantics not in SEMANTICS:
            raise ValueError(f"semantics={semantics!r}: choose one of {', '.join(SEMANTICS)}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        self.groups = list(groups)
        self.semantics = semantics
        self.betas = betas
        self.eps = SEMANTICS[semantics] if eps is None else eps
        self.steps = 0
        self.first = [torch.zeros_like(p) for p in self.parameters()]
        self.second = [torch.zeros_like(p) for p in self.parameters()]

    @cached_property
    def scratch(self) -> Tensor:
        """One buffer for every intermediate.

        Allocating it anew for each parameter costs more time than the arithmetic, most of it in
        page faults.
        """
        return max((torch.empty_like(p).view(-1) for p in self.parameters()), key=len)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter, in the order of the moments ``first`` and ``second``."""
        for group in self.groups:
            yield from group.parameters

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def load(self, first: Sequence[Tensor], second: Sequence[Tensor], steps: int) -> None:
        """Take the moments (shaped like the parameters) and the number of steps of another."""
        for mine, theirs in zip([*self.first, *self.second], [*first, *second]):
            mine.copy_(theirs)
        self.steps = steps

    def clipped_step(self, lr: float, max_norm: float, scaler: LossScaler | None = None) -> Tensor:
        """Unscale the gradients, clip them, update: what follows the backward pass.

        Args:
            lr: learning rate.
            max_norm: bound on the joint 2-norm of the gradients.
            scaler: what the loss was scaled by, if it was. Where a gradient overflowed it halves
                its scale, and the parameters stay as they are.

        Returns:
            The joint norm before clipping, a scalar tensor, still on the device: reading it waits.
            Not finite where a gradient was not.

        The gradients are spent afterwards: scaled or not, depending on who computes.
        """
        if scaler is not None and not scaler.unscale(self.parameters()):
            return torch.tensor(math.inf)
        norm = clip_grad_norm(self.parameters(), max_norm)
        self.step(lr)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with this learning rate; parameters without a gradient are left alone."""
        self.steps += 1
        moments = zip(self.first, self.second)
        for group in self.groups:
            for parameter in group.parameters:
                first, second = next(moments)
                if parameter.grad is not None:
                    self._update(parameter, first, second, lr * group.lr_factor, group.weight_decay)

    def _update(
        self, parameter: nn.Parameter, first: Tensor, second: Tensor, lr: float, decay: float
    ) -> None:
        beta1, beta2 = self.betas
        gradient = parameter.grad
        assert gradient is not None
        if self.semantics == "torch" and decay != 0:
            parameter.mul_(1 - lr * decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = torch.sqrt(second, out=self.scratch[: second.numel()].view_as(second))
        if self.semantics == "google":
            update = torch.div(first, root.add_(self.eps), out=root)
            if decay != 0:
                update.add_(parameter, alpha=decay)
            parameter.add_(update, alpha=-lr)
            return
        correction1 = 1 - beta1**self.steps
        correction2 = (1 - beta2**self.steps) ** 0.5
        if self.semantics == "torch":
            root.div_(correction2).add_(self.eps)
            parameter.addcdiv_(first, root, value=-(lr / correction1))
        else:
            root.add_(self.eps)
            parameter.addcdiv_(first, root, value=-(lr * correction2 / correction1))
            if decay != 0:
                parameter.add_(parameter, alpha=-lr * decay)


class FusedAdamW(AdamW):
    """The same on the CPU, semantics "torch": unscaling, clipping and update by torch's own kernel.

    Without clipping the bits are those of ``torch.optim.AdamW(fused=True)``. The plain one makes
    ten passes over a parameter, this one makes one, after that of the norm.
    """

    def clipped_step(self, lr: float, max_norm: float, scaler: LossScaler | None = None) -> Tensor:
        """As the plain one; the gradients are left unscaled and clipped."""
        scale = 1.0 if scaler is None else scaler.scale
        norm = joint_norm(p.grad for p in self.parameters() if p.grad is not None) / scale
        if scaler is None or scaler.record(math.isfinite(norm)):
            self._update_all(lr, scale * max(1.0, (float(norm) + 1e-6) / max_norm))
        return norm

    def step(self, lr: float) -> None:
        """One update without clipping."""
        self._update_all(lr, 1.0)

    @torch.no_grad()
    def _update_all(self, lr: float, divisor: float) -> None:
        """One update by the gradients divided by this."""
        self.steps += 1
        steps = torch.tensor(float(self.steps))
        scale = None if divisor == 1.0 else torch.tensor(divisor)
        moments = zip(self.first, self.second)
        for group in self.groups:
            rows = [(p, p.grad, *next(moments)) for p in group.parameters]
            if rows := [row for row in rows if row[1] is not None]:
                parameters, gradients, first, second = (list(column) for column in zip(*rows))
                torch._fused_adamw_(
                    parameters,
                    gradients,
                    first,
                    second,
                    [],
                    [steps] * len(rows),
                    lr=lr * group.lr_factor,
                    beta1=self.betas[0],
                    beta2=self.betas[1],
                    weight_decay=group.weight_decay,
                    eps=self.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scale,
                )


class OnePassAdamW(AdamW):
    """The same on CUDA: unscaling, clipping and update by one kernel, each number read once.

    Arguments as for ``AdamW``. Equal to it but for rounding; the sums of the norm are torch's.

    Raises:
        ValueError: also for a parameter that is not contiguous float32.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        semantics: str = "torch",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
    ):
        super().__init__(groups, semantics, betas, eps)
        self.sweep = adamw.Sweep(
            [p.detach() for p in self.parameters()],
            self.first,
            self.second,
            [group.lr_factor for group in self.groups for _ in group.parameters],
            [group.weight_decay for group in self.groups for _ in group.parameters],
            semantics,
            betas,
            self.eps,
        )

    def load(self, first: Sequence[Tensor], second: Sequence[Tensor], steps: int) -> None:
        """As the plain one."""
        super().load(first, second, steps)
        self.sweep.steps.fill_(steps)

    def clipped_step(self, lr: float, max_norm: float, scaler: LossScaler | None = None) -> Tensor:
        """As the plain one; with a scaler it waits for the GPU, to hear of an overflow."""
        scale = None if scaler is None else torch.tensor(scaler.scale)
        norm = self.sweep.step([p.grad for p in self.parameters()], lr, max_norm, scale)
        if scaler is None or scaler.record(math.isfinite(norm)):
            self.steps += 1
        return norm

    def step(self, lr: float) -> None:
        """One update without clipping."""
        self.sweep.step([p.grad for p in self.parameters()], lr)
        self.steps += 1


class Choice(NamedTuple):
    """An optimiser and why it was taken."""

    optimizer: AdamW
    reason: str


def choose_adamw(
    groups: Sequence[Group], semantics: str, eps: float | None = None, plain: bool = False
) -> Choice:
    """One pass over memory where that can run, else one operation at a time.

    Args:
        groups, semantics, eps: as for ``AdamW``.
        plain: one operation at a time in any case, for the bits of ``torch.optim.AdamW``.
    """
    device = next(p.device for group in groups for p in group.parameters)
    if plain:
        return Choice(AdamW(groups, semantics, eps=eps), "in torch's operations: asked for")
    if device.type == "cpu" and semantics == "torch":
        reason = "with clipping and unscaling in one pass, by torch's fused CPU kernel"
        return Choice(FusedAdamW(groups, semantics, eps=eps), reason)
    if device.type != "cuda":
        reason = f"in torch's operations: no one-pass kernel for {semantics!r} on {device.type}"
        return Choice(AdamW(groups, semantics, eps=eps), reason)
    if obstacle := adamw.obstacle(device, semantics):
        reason = f"in torch's operations: the one-pass kernel cannot run: {obstacle}"
        return Choice(AdamW(groups, semantics, eps=eps), reason)
    reason = "with clipping and unscaling in one pass, by the CUDA kernel"
    return Choice(OnePassAdamW(groups, semantics, eps=eps), reason)


@torch.no_grad()
def joint_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar tensor.

    The norm of the per-tensor norms, in the order given: another grouping rounds differently.
    """
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most ``max_norm``.

    The formula is that of ``torch.nn.utils.clip_grad_norm_``.

    Returns:
        The norm before clipping, a scalar tensor.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = joint_norm(gradients)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


class LossScaler:
    """Keeps fp16 gradients away from zero and infinity (Micikevicius et al. 2018, section 3.2).

    The loss is multiplied by ``scale`` before the backward pass and the gradients divided by it
    after. An overflow halves the scale and the step is skipped; ``patience`` good steps double it.
    ``limit`` skipped steps in a row are no overflow: the numbers themselves have gone wrong.
    """

    def __init__(self, scale: float = 65536.0, patience: int = 2000, limit: int = 25):
        self.scale = scale
        self.patience = patience
        self.limit = limit
        self.good_steps = 0
        self.skipped = 0  # in a row

    @property
    def gave_up(self) -> bool:
        """Halving the scale has not helped."""
        return self.skipped >= self.limit

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divide the gradients by the scale; False if one is not finite: skip this step."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(1.0 / self.scale)
        return self.record(
            math.isfinite(float(sum(gradient.abs().max() for gradient in gradients)))
        )

    def record(self, finite: bool) -> bool:
        """Adapt the scale to a step whose gradients were finite or not; gives ``finite`` back."""
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
