"""What to launch for AdamW with clipping and unscaling in one pass: the kernels in ``adamw.cu``.

BERT has been trained with three versions of AdamW: "torch" (Loshchilov and Hutter 2019,
arXiv:1711.05101, algorithm 2), "transformers" (eps before the bias correction, decay after the
update) and "google" (no bias correction, decay inside the update; google-research/bert).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minibert.speed.cuda import launch

SEMANTICS = {"torch": 0, "transformers": 1, "google": 2}
CHUNK = 4096  # as in adamw.cu
THREADS = 256


class Sweep:
    """Updates all parameters in place, in two launches: the norm of the gradients, the update.

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
        # A row a parameter: where it is, its gradient, its moments.
        columns = (parameters, parameters, first, second)
        addresses = [[x.data_ptr() for x in row] for row in zip(*columns)]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self.gradients_at: list[int] = []
        self.present: list[bool] = []

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor | None],
        lr: float,
        steps: int = 0,
        max_norm: float = math.inf,
        scale: float | None = None,
    ) -> Tensor:
        """One update; parameters without a gradient stay as they are.

        Args:
            gradients: shaped like the parameters.
            lr: learning rate, before each parameter's factor.
            steps: updates made before this one.
            max_norm: bound on the joint 2-norm of the unscaled gradients.
            scale: the factor the loss was multiplied by (``LossScaler``); None for 1.

        Returns:
            The joint 2-norm of the unscaled gradients before clipping, on the device. If ``scale``
            is given and the norm is not finite, nothing was updated.
        """
        gradients = [None if x is None else x.contiguous() for x in gradients]
        self._locate(gradients)
        squares = torch.empty(len(self.chunks), device=self.device)
        self._enqueue(
            "squares",
            {
                "tensors": self.table,
                "sizes": self.sizes,
                "chunks": self.chunks,
                "squares": squares,
            },
            {},
        )
        norm = squares.sum().sqrt() / (scale or 1)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1) / (scale or 1)  # as torch clips
        beta1, beta2, eps = map(float, (*self.betas, self.eps))
        corrections = torch.tensor([1 - beta1 ** (steps + 1), (1 - beta2 ** (steps + 1)) ** 0.5])
        corrections = corrections.to(norm, non_blocking=True)
        # The host would have to wait for the norm to know whether this step is skipped.
        applies = torch.ones_like(norm) if scale is None else torch.isfinite(norm).to(norm)
        scalars = torch.cat([factor[None], corrections, applies[None]])
        tensors: dict[str, Tensor | None] = {
            "tensors": self.table,
            "sizes": self.sizes,
            "rates": self.rates,
            "chunks": self.chunks,
            "scalars": scalars,
        }
        numbers = {
            "lr": float(lr),
            "rest1": 1 - beta1,
            "beta2": beta2,
            "rest2": 1 - beta2,
            "eps": eps,
        }
        # Scalars and gradients may be freed on return: the allocator reuses their memory on this
        # stream only, after the kernel.
        self._enqueue("adamw", tensors, numbers)
        return norm

    def _enqueue(
        self, kernel: str, tensors: dict[str, Tensor | None], numbers: dict[str, float]
    ) -> None:
        defines, grid = {"SEMANTICS": SEMANTICS[self.semantics]}, (len(self.chunks), 1)
        launch.enqueue(launch.Launch("adamw.cu", kernel, defines, grid, THREADS, tensors, numbers))

    def _locate(self, gradients: Sequence[Tensor | None]) -> None:
        """Update the tables of addresses and chunks where necessary.

        Gradients move in most steps, which changes one column of the short table of addresses. The
        chunks (26 thousand for BERT-base) depend only on which tensors have a gradient.
        """
        gradients_at = [0 if x is None else x.data_ptr() for x in gradients]
        if gradients_at != self.gradients_at:
            self.gradients_at = gradients_at
            # On the stream, so after the last update and the backward pass.
            self.table[:, 1] = torch.tensor(gradients_at).to(self.device, non_blocking=True)
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
