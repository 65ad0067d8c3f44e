"""AdamW, clipping and unscaling in a single pass over the parameters: ``adamw.cu``.

The three versions of AdamW that BERT has been trained with, by name: "torch" (Loshchilov and Hutter
2019, arXiv:1711.05101, algorithm 2), "transformers" (eps before the bias correction, decay after
the update) and "google" (no bias correction, decay inside the update; google-research/bert).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minibert.speed.cuda import build

SEMANTICS = {"torch": 0, "transformers": 1, "google": 2}
CHUNK = 4096  # as in adamw.cu
THREADS = 256


class Launch(NamedTuple):
    """One launch of ``adamw``."""

    defines: dict[str, int]
    blocks: int
    parameters: list[Any]  # as ``cuda.core.launch`` takes them


class Sweep:
    """Updates parameters in place, all of them in one launch.

    Args:
        parameters: float32, contiguous, on one CUDA device.
        first, second: the moments, like the parameters.
        lr_factors, weight_decays: one number a parameter.
        semantics: "torch", "transformers" or "google".
        betas, eps: as in Adam.
        launch: starts the kernel; ``launch_on_gpu`` unless a test runs it elsewhere.

    Raises:
        ValueError: a tensor that the kernel cannot read.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        lr_factors: Sequence[float],
        weight_decays: Sequence[float],
        semantics: str,
        betas: tuple[float, float],
        eps: float,
        launch: Callable[[Sweep, Launch], None] | None = None,
    ) -> None:
        for x in (*parameters, *first, *second):
            if x.dtype != torch.float32 or not x.is_contiguous() or x.numel() >= 2**31:
                raise ValueError(
                    f"one-pass AdamW needs contiguous float32, got {x.dtype} {x.shape}"
                )
        self.parameters, self.first, self.second = list(parameters), list(first), list(second)
        self.semantics, self.betas, self.eps = semantics, betas, eps
        self.launch = launch or launch_on_gpu
        self.device = parameters[0].device
        rates = list(zip(lr_factors, weight_decays))
        self.rates = torch.tensor(rates, dtype=torch.float32, device=self.device)
        sizes = [parameter.numel() for parameter in parameters]
        self.sizes = torch.tensor(sizes, dtype=torch.int32, device=self.device)
        self.chunk_counts = [-(-size // CHUNK) for size in sizes]
        self.addresses: list[tuple[int, ...]] = []
        self.present: list[bool] = []
        # On the device, because whether a step is skipped is known only there.
        self.steps = torch.zeros((), dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor | None],
        lr: float,
        max_norm: float | None = None,
        grad_scale: Tensor | None = None,
    ) -> Tensor:
        """One update; parameters without a gradient are left alone.

        Args:
            gradients: like the parameters.
            lr: learning rate before each parameter's factor.
            max_norm: bound on the joint 2-norm of the unscaled gradients; None: not clipped.
            grad_scale: what the loss was multiplied with (``GradScaler``); None: nothing.

        Returns:
            The joint 2-norm of the unscaled gradients before clipping, on the device. Where it is
            not finite and ``grad_scale`` is given, nothing was updated.
        """
        gradients = [None if x is None else x.contiguous() for x in gradients]
        present = [gradient for gradient in gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)))
        factor = torch.ones_like(norm)
        if grad_scale is not None:
            factor = factor / grad_scale.to(norm, non_blocking=True)
        norm = norm * factor
        if max_norm is not None:
            factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch clips
        apply = torch.isfinite(norm) if grad_scale is not None else torch.ones_like(norm).bool()
        self.steps += apply
        beta1, beta2 = self.betas
        scalars = torch.stack(
            [factor, 1 - beta1**self.steps, (1 - beta2**self.steps).sqrt(), apply]
        ).float()
        self._locate(gradients)
        packed: list[Any] = [
            x.data_ptr() for x in (self.table, self.sizes, self.rates, self.chunks, scalars)
        ]
        packed += [ctypes.c_float(x) for x in (lr, 1 - beta1, beta2, 1 - beta2, self.eps)]
        self.scalars, self.gradients = scalars, present  # for a launch that looks at them
        defines = {"SEMANTICS": SEMANTICS[self.semantics]}
        self.launch(self, Launch(defines, self.chunks.shape[0], packed))
        # The allocator gives their memory to nothing that runs before the kernel on this stream;
        # held any longer, the gradients would stand beside those of the next backward pass.
        del self.scalars, self.gradients
        return norm

    def _locate(self, gradients: Sequence[Tensor | None]) -> None:
        """The tables of addresses and chunks.

        Gradients move, most steps: the short table of addresses is made anew if one did. The chunks
        of BERT-base are 26 thousand, and depend only on which tensors have a gradient.
        """
        rows = zip(self.parameters, gradients, self.first, self.second)
        addresses = [tuple(0 if x is None else x.data_ptr() for x in row) for row in rows]
        if addresses != self.addresses:
            self.addresses = addresses
            table = torch.tensor(addresses, dtype=torch.int64)
            self.table = table.to(self.device, non_blocking=True)  # behind the backward pass
        present = [gradient is not None for gradient in gradients]
        if present != self.present:
            self.present = present
            chunks = [
                (tensor, chunk)
                for tensor, count in enumerate(self.chunk_counts)
                if present[tensor]
                for chunk in range(count)
            ]
            self.chunks = torch.tensor(chunks, dtype=torch.int32).to(self.device)


def obstacle(device: torch.device, semantics: str) -> str | None:
    """Why the kernel cannot run on this CUDA device, or None; compiles it if need be."""
    from minibert.speed.cuda import launch

    try:
        launch.load("adamw.cu", launch.architecture(device), {"SEMANTICS": SEMANTICS[semantics]})
    except build.BuildError as error:
        return str(error)
    return None


def launch_on_gpu(sweep: Sweep, step: Launch) -> None:
    """Start the kernel on torch's current stream."""
    from minibert.speed.cuda.launch import enqueue

    enqueue(
        sweep.device, "adamw.cu", "adamw", step.defines, (step.blocks, 1), THREADS, step.parameters
    )
