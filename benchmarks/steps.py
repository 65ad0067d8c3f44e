"""Training steps: forward, backward, clipping and AdamW, as minibert and transformers do them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minibert.text.batches import Batch
from minibert.training.adamw import Group, choose_adamw
from minibert.training.schedule import LossScaler

LR, CLIP, DECAY = 5e-5, 1.0, 0.01


class Trainer(NamedTuple):
    """How a contender trains."""

    adamw: str  # which AdamW
    step: Callable[[Batch], Tensor]  # gives the loss


def our_update(
    model: nn.Module, dtype: torch.dtype
) -> tuple[str, Callable[[], None], LossScaler | None]:
    """Which AdamW, clipping with its step, and the loss scaler that fp16 needs."""
    optimizer = choose_adamw([Group(list(model.parameters()), DECAY)], "torch")
    scaler = LossScaler() if dtype == torch.float16 else None

    def update() -> None:
        optimizer.value.clipped_step(LR, CLIP, scaler)
        optimizer.value.zero_grad()

    return optimizer.reason, update, scaler


def our_trainer(model: nn.Module, dtype: torch.dtype) -> Trainer:
    device = next(model.parameters()).device
    adamw, update, scaler = our_update(model, dtype)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch.inputs).loss
        (loss * scaler.scale if scaler else loss).backward()
        update()
        return loss.detach()

    return Trainer(adamw, step)


def their_trainer(model: nn.Module, dtype: torch.dtype, fused: bool = True) -> Trainer:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch.inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return Trainer(f"torch.optim.AdamW(fused={fused})", step)
