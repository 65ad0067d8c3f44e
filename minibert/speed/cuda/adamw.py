"""What to launch for AdamW with clipping and unscaling in one pass: the kernel in ``adamw.cu``.

BERT has been trained with three versions of AdamW: "torch" (Loshchilov and Hutter 2019,
arXiv:1711.05101, algorithm 2), "transformers" (eps before the bias correction, decay after the
update) and "google" (no bias correction, decay inside the update; google-research/bert).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minibert.speed.cuda import launch

SEMANTICS = {"torch": 0, "transformers": 1, "google": 2}
CHUNK = 4096  # as in adamw.cu
THREADS = 256


class Sweep:
    """Updates all parameters in place, in one launch.

    Args:
        parameters: float32, contiguous, on one CUDA device.
        first, second: the moments, shaped like the parameters.
        lr_factors, weight_decays: one number per parameter.
        semantics: "torch", "transformers" or "google".
        betas, eps: as in Adam.

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
    ) -> None:
        for x in (*parameters, *first, *second):
            if x.dtype != torch.float32 or not x.is_contiguous() or x.numel() >= 2**31:
                raise ValueError(
                    "one-pass AdamW needs contiguous float32 of fewer than 2^31 elements, "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
        self.parameters, self.first, self.second = list(parameters), list(first), list(second)
        self.semantics, self.betas, self.eps = semantics, betas, eps
        self.device = parameters[0].device
        rates = list(zip(lr_factors, weight_decays))
        self.rates = torch.tensor(rates, dtype=torch.float32, device=self.device)
        sizes = [parameter.numel() for parameter in parameters]
        self.sizes = torch.tensor(sizes, dtype=torch.int32, device=self.device)
        self.chunk_counts = [-(-size // CHUNK) for size in sizes]
        self.addresses: list[tuple[int, ...]] = []
        self.present: list[bool] = []
        # On the device: only the device knows whether a step is skipped.
        self.steps = torch.zeros((), dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor | None],
        lr: float,
        max_norm: float | None = None,
        grad_scale: Tensor | None = None,
    ) -> Tensor:
        """One update; parameters without a gradient stay as they are.

        Args:
            gradients: shaped like the parameters.
            lr: learning rate, before each parameter's factor.
            max_norm: bound on the joint 2-norm of the unscaled gradients; None does not clip.
            grad_scale: the factor the loss was multiplied by (``LossScaler``); None for 1.

        Returns:
            The joint 2-norm of the unscaled gradients before clipping, on the device. If
            ``grad_scale`` is given and the norm is not finite, nothing was updated.
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
        beta1, beta2, eps = map(float, (*self.betas, self.eps))
        scalars = torch.stack(
            [factor, 1 - beta1**self.steps, (1 - beta2**self.steps).sqrt(), apply]
        ).float()
        self._locate(gradients)
        defines, grid = {"SEMANTICS": SEMANTICS[self.semantics]}, (self.chunks.shape[0], 1)
        parameters: dict[str, launch.Parameter] = {
            "tensors": self.table,
            "sizes": self.sizes,
            "rates": self.rates,
            "chunks": self.chunks,
            "scalars": scalars,
            "lr": float(lr),
            "rest1": 1 - beta1,
            "beta2": beta2,
            "rest2": 1 - beta2,
            "eps": eps,
        }
        # Scalars and gradients may be freed on return: the allocator reuses their memory on this
        # stream only, after the kernel.
        launch.enqueue(launch.Launch("adamw.cu", "adamw", defines, grid, THREADS, parameters))
        return norm

    def _locate(self, gradients: Sequence[Tensor | None]) -> None:
        """Update the tables of addresses and chunks where necessary.

        Gradients move in most steps, which changes only the short table of addresses. The chunks
        (26 thousand for BERT-base) depend only on which tensors have a gradient.
        """
        rows = zip(self.parameters, gradients, self.first, self.second)
        addresses = [tuple(0 if x is None else x.data_ptr() for x in row) for row in rows]
        if addresses != self.addresses:
            self.addresses = addresses
            table = torch.tensor(addresses, dtype=torch.int64)
            self.table = table.to(self.device, non_blocking=True)  # after the backward pass
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
