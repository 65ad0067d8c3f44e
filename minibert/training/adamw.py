"""AdamW, in the three versions that BERT has been trained with.

All three are called AdamW and differ in four places, by more than noise over a fine-tuning run.

| semantics      | bias correction | eps                 | weight decay             | default eps |
|----------------|-----------------|---------------------|--------------------------|-------------|
| "torch"        | yes             | after the correction| before the update        | 1e-8        |
| "transformers" | yes             | before it           | after the update         | 1e-6        |
| "google"       | no              | no correction       | inside the update        | 1e-6        |

"torch" is ``torch.optim.AdamW`` (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), bit for
bit; "transformers" is the AdamW of that library until version 5; "google" is the optimiser of
google-research/bert (``optimization.py``), which pretrained the weights.

Three classes have one interface, ``clipped_step``, and one state; only ``_update`` differs.
``AdamW`` is the reference, one torch operation at a time. ``FusedAdamW`` (CPU, torch's own kernel)
and ``OnePassAdamW`` (CUDA, our kernel) do the same in one pass over memory and differ from it by
rounding. ``choose_adamw`` picks one and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby

import torch
from torch import Tensor, nn

from minibert.machine import Chosen
from minibert.speed.cuda import adamw, obstacles
from minibert.training.schedule import LossScaler, clip_grad_norm, joint_norm

SEMANTICS = {"torch": 1e-8, "transformers": 1e-6, "google": 1e-6}  # name: default eps


@dataclass(eq=False)
class Group:
    """Parameters that share a weight decay and a factor on the learning rate."""

    parameters: list[nn.Parameter]
    weight_decay: float = 0.0
    lr_factor: float = 1.0


def bert_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Decay matrices and embeddings, not biases and LayerNorms, as BERT does.

    A group is a run of neighbours, so that the groups list the parameters in the model's order:
    clipping adds up their norms in it.
    """

    def is_spared(named: tuple[str, nn.Parameter]) -> bool:
        return named[0].endswith("bias") or "norm." in named[0]

    return [
        Group([parameter for _, parameter in run], 0.0 if spared else weight_decay)
        for spared, run in groupby(model.named_parameters(), is_spared)
    ]


class AdamW:
    """Adam with decoupled weight decay: the reference, one torch operation at a time.

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
        # The state, the same in all classes: updates done, and both moments by parameter.
        self.steps = 0
        self.first = [torch.zeros_like(p) for p in self.parameters()]
        self.second = [torch.zeros_like(p) for p in self.parameters()]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter, in the order of the moments ``first`` and ``second``."""
        return chain.from_iterable(group.parameters for group in self.groups)

    def zero_grad(self) -> None:
        """Delete the gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def clipped_step(
        self, lr: float, max_norm: float = math.inf, scaler: LossScaler | None = None
    ) -> Tensor:
        """Unscale the gradients, clip them, update the parameters that have one.

        Args:
            lr: learning rate.
            max_norm: bound on the joint 2-norm of the gradients.
            scaler: the scaler that multiplied the loss, if one did. After an overflow it halves its
                scale, and parameters and moments stay as they are. Asking it waits for the device.

        Returns:
            The joint norm before clipping, a scalar tensor that may still be being computed. Not
            finite if a gradient was not.

        Delete the gradients afterwards: what they hold depends on the class.
        """
        norm = self._update(lr, max_norm, None if scaler is None else scaler.scale)
        if scaler is None or scaler.record(math.isfinite(norm)):
            self.steps += 1
        return norm

    def step(self, lr: float) -> None:
        """One update without clipping."""
        self.clipped_step(lr)

    @torch.no_grad()
    def _update(self, lr: float, max_norm: float, scale: float | None) -> Tensor:
        """Unscale, clip, update; returns the norm. After an overflow of a scaled loss: no update.

        ``steps`` counts the updates before this one.
        """
        norm = clip_grad_norm(self.parameters(), max_norm, scale or 1.0)
        if scale is None or math.isfinite(norm):
            moments = zip(self.first, self.second)
            for group in self.groups:
                for parameter in group.parameters:
                    first, second = next(moments)
                    if parameter.grad is not None:
                        rate, decay = lr * group.lr_factor, group.weight_decay
                        self._update_one(parameter, parameter.grad, first, second, rate, decay)
        return norm

    def _update_one(
        self,
        weight: Tensor,
        gradient: Tensor,
        first: Tensor,
        second: Tensor,
        lr: float,
        decay: float,
    ) -> None:
        beta1, beta2 = self.betas
        if self.semantics == "torch" and decay != 0:
            weight.mul_(1 - lr * decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = torch.sqrt(second, out=self._scratch[: second.numel()].view_as(second))
        if self.semantics == "google":
            update = torch.div(first, root.add_(self.eps), out=root)
            if decay != 0:
                update.add_(weight, alpha=decay)
            weight.add_(update, alpha=-lr)
            return
        correction1 = 1 - beta1 ** (self.steps + 1)
        correction2 = (1 - beta2 ** (self.steps + 1)) ** 0.5
        if self.semantics == "torch":
            root.div_(correction2).add_(self.eps)
            weight.addcdiv_(first, root, value=-(lr / correction1))
        else:
            root.add_(self.eps)
            weight.addcdiv_(first, root, value=-(lr * correction2 / correction1))
            if decay != 0:
                weight.add_(weight, alpha=-lr * decay)

    @cached_property
    def _scratch(self) -> Tensor:
        """One buffer for all roots.

        A new one for each parameter costs more time than the arithmetic, mostly in page faults.
        """
        return max((torch.empty_like(p).view(-1) for p in self.parameters()), key=len)


class FusedAdamW(AdamW):
    """The same on the CPU for the semantics "torch", with torch's fused kernel.

    Without clipping the bits are those of ``torch.optim.AdamW(fused=True)``. ``AdamW`` makes ten
    passes over a parameter, this class two: one for the norm, one for the update.
    """

    @torch.no_grad()
    def _update(self, lr: float, max_norm: float, scale: float | None) -> Tensor:
        norm = joint_norm(p.grad for p in self.parameters() if p.grad is not None) / (scale or 1.0)
        if scale is not None and not math.isfinite(norm):
            return norm
        divisor = (scale or 1.0) * max(1.0, (float(norm) + 1e-6) / max_norm)
        steps = torch.tensor(self.steps + 1.0)
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
                    grad_scale=None if divisor == 1.0 else torch.tensor(divisor),
                )
        return norm


class OnePassAdamW(AdamW):
    """The same on CUDA, with our kernels: one reads the gradients for their norm, one updates.

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
        self._sweep = adamw.Sweep(
            [p.detach() for p in self.parameters()],
            self.first,
            self.second,
            [group.lr_factor for group in self.groups for _ in group.parameters],
            [group.weight_decay for group in self.groups for _ in group.parameters],
            semantics,
            betas,
            self.eps,
        )

    def _update(self, lr: float, max_norm: float, scale: float | None) -> Tensor:
        gradients = [p.grad for p in self.parameters()]
        return self._sweep.step(gradients, lr, self.steps, max_norm, scale)


def choose_adamw(
    groups: Sequence[Group], semantics: str, eps: float | None = None, plain: bool = False
) -> Chosen[AdamW]:
    """The one-pass class if it runs here, else the reference.

    Args:
        groups, semantics, eps: as for ``AdamW``.
        plain: take the reference in any case, for the bits of ``torch.optim.AdamW``.
    """
    device = next(p.device for group in groups for p in group.parameters)
    kind, reason = AdamW, "one torch operation at a time: "
    if plain:
        reason += "as requested"
    elif device.type == "cpu" and semantics == "torch":
        kind, reason = FusedAdamW, "in one pass, with torch's fused CPU kernel"
    elif device.type != "cuda":
        reason += f"there is no one-pass kernel for {semantics!r} on {device.type}"
    elif obstacle := obstacles.adamw(device, semantics):
        reason += f"the one-pass kernel cannot run: {obstacle}"
    else:
        kind, reason = OnePassAdamW, "in one pass, with the CUDA kernel"
    return Chosen(kind(groups, semantics, eps=eps), reason)
