"""One optimiser step, the same for the loop however it is computed.

A step may take several batches (accumulation), run in several processes, scale its loss (fp16) and
replay its passes as CUDA graphs. The loop calls ``backward``, ``update`` and ``read``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minibert.processes import Team
from minibert.speed.cuda.seeds import one_draw
from minibert.speed.cuda_graphs import Graphs, Recorder, choose
from minibert.text.batches import Batch, Example, packed, padded
from minibert.training.recipe import Recipe
from minibert.training.resume import Training


@dataclass(frozen=True)
class Measured:
    """What a step computed, on the host and the same in every process."""

    loss: float  # mean over the labels of the step
    norm: float  # of the gradients, before clipping
    stop: bool  # a signal has reached one of the processes
    tokens_per_second: float  # word-pieces of the step, over all processes

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def summary(self) -> str:
        """For the progress bar."""
        return f"loss {self.loss:.3f}, {self.tokens_per_second:.0f} tokens/s"


class Step:
    """The forward and backward passes of a step, its update, and its numbers.

    Args:
        run: model, optimizer and loss scaler.
        objective: of the task.
        recipe: layout, clip and accumulate.
        dtype: of autocast; float32 for none.
        team: the processes that share every batch.
        pad_id: the tokenizer's padding piece.
        example: any training sentence, the same in every process.
        use_graphs: replay the passes as CUDA graphs; None: where that can run.

    Raises:
        MinibertError: CUDA graphs cannot run here.
    """

    def __init__(
        self,
        run: Training,
        objective: nn.Module,
        recipe: Recipe,
        dtype: torch.dtype,
        team: Team,
        pad_id: int,
        example: Example,
        use_graphs: bool | None = False,
    ):
        self.optimizer, self.scaler = run.optimizer, run.scaler
        self.recipe, self.team, self.pad_id = recipe, team, pad_id
        self.graphs = None
        self.uses_graphs = choose(
            use_graphs, run.model, recipe.layout, recipe.accumulate, team.size
        )
        if self.uses_graphs.value:
            positions = run.model.config.max_length
            self.graphs = Graphs(objective, positions, dtype, Recorder(team.device))
        self.autocast = torch.autocast(team.device.type, dtype, enabled=dtype != torch.float32)
        with self.autocast:
            self.model = team.wrap(objective, **self.collate([example]).inputs)

    def backward(self, batches: Sequence[Sequence[Example]]) -> Tensor:
        """Run both passes over the batches of a step; the gradients add up in the parameters.

        Every word of the step has the same weight, whichever batch or process it is in.

        Args:
            batches: the same in every process, which each take their share.

        Returns:
            This process's part of the loss, a scalar tensor.
        """
        self.started = time.perf_counter()
        self.tokens = sum(len(example.ids) for batch in batches for example in batch)
        words = sum(len(example.firsts) for batch in batches for example in batch)
        # Times the number of processes, because their gradients are averaged and not added.
        scale = self.team.size * (self.scaler.scale if self.scaler else 1.0)
        total = torch.zeros((), device=self.team.device)
        for i, batch in enumerate(batches):
            mine = self.team.share(batch)
            weight = sum(len(example.firsts) for example in mine) / words
            # A process without a sentence runs another's with weight 0: all must take part.
            inputs = self.collate(mine or batch[:1]).inputs
            if self.graphs is not None:
                loss = self.graphs.backward(inputs, scale)
            else:
                with self.team.reduction(self.model, last=i == len(batches) - 1):
                    with one_draw(), self.autocast:
                        loss = self.model(**inputs).loss * weight
                    (loss * scale).backward()
            total += loss.detach()
        return total

    def update(self, lr: float) -> Tensor:
        """Unscale and clip the gradients, update the parameters, delete the gradients.

        Returns:
            The norm of the gradients, a scalar tensor. With a scaler this waits for the device.
        """
        norm = self.optimizer.clipped_step(lr, self.recipe.clip, self.scaler)
        self.optimizer.zero_grad()
        return norm

    def read(self, loss: Tensor, norm: Tensor, stop: bool) -> Measured:
        """Add up over the processes and wait for the device.

        Args:
            loss: from ``backward``.
            norm: from ``update``.
            stop: whether a signal has reached this process.
        """
        totals = self.team.total(torch.stack([loss, torch.full_like(loss, stop)]))
        loss_sum, stops, norm_value = torch.cat([totals, norm.to(totals)[None]]).tolist()
        speed = self.tokens / (time.perf_counter() - self.started)
        return Measured(loss_sum, norm_value, bool(stops), speed)

    def failed(self, measured: Measured) -> bool:
        """Whether the numbers have gone wrong, beyond what the loss scaler can repair."""
        return not measured.is_finite and (self.scaler is None or self.scaler.gave_up)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch in the recipe's layout; with CUDA graphs filled up to one of a few sizes."""
        device, layout = self.team.device, self.recipe.layout
        if layout == "packed":
            return packed(examples, device, self.pad_id if self.graphs is not None else None)
        return padded(examples, self.pad_id, None if layout == "longest" else int(layout), device)
