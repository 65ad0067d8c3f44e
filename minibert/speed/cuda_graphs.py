"""The two passes of a training step as a CUDA graph: one launch instead of many hundreds.

With few word-pieces in a batch a GPU waits for Python to start the next small kernel. A CUDA graph
is a recording of what was started, and starts all of it at once; but with the shapes and the
addresses of then. So:

- There is one graph for each ``Size``, and batches are filled up to a few sizes.
- A batch is copied to where the recorded kernels read. What changes from step to step stands there
  as a tensor too: where sentences begin, and the scale of the loss.
- The seeds of dropout are drawn by recorded kernels, anew at every replay.

Recorded are the forward and the backward pass. The update is one kernel already (``OnePassAdamW``),
and whether it may happen is asked in between. Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minibert.files import MinibertError
from minibert.model.heads import BertForTokenClassification
from minibert.model.layout import Packed
from minibert.speed.cuda.attention import SHORT

MOST = 12  # graphs; each keeps gradients of its own, as large as the model


class Size(NamedTuple):
    """What batches must have in common to share a graph."""

    tokens: int  # just so many
    sentences: int  # at most
    longest: int  # no sentence has more tokens

    @classmethod
    def of(cls, layout: Packed, positions: int) -> Size:
        """The size of a batch for a model of so many positions.

        Rough where that costs next to nothing: a place for a sentence, or a bound on the lengths,
        that is not needed is a block of threads that ends at once.
        """
        sentences = _power_of_two(len(layout.lengths) + 1)  # as many, filled up or not
        longest = min(max(SHORT, _power_of_two(layout.max_length)), positions)
        return cls(sum(layout.lengths), sentences, longest)


def require(
    device: torch.device, attention: str, layout: str, accumulate: int, processes: int
) -> None:
    """Make sure that a run can use graphs.

    Args:
        device: where it trains.
        attention: the implementation.
        layout, accumulate: of the recipe.
        processes: that train the model.

    Raises:
        MinibertError: it cannot; says what is missing.
    """
    needs = {
        f"a CUDA device, not {device}": device.type == "cuda",
        f"fused attention, not {attention}": attention == "fused",
        f"--layout packed, not {layout}": layout == "packed",
        f"--accumulate 1, not {accumulate}": accumulate == 1,
        f"one process, not {processes}": processes == 1,
    }
    for need, is_met in needs.items():
        if not is_met:
            raise MinibertError(f"--graphs needs {need}: change that or leave it out")


def _power_of_two(number: int) -> int:
    """The next one, from the number on."""
    return 1 << (number - 1).bit_length()


class Places(NamedTuple):
    """Where the recorded kernels read."""

    ids_N: Tensor
    labels_N: Tensor
    layout: Packed
    scale: Tensor  # of the loss, a scalar

    @property
    def inputs(self) -> dict[str, Tensor | Packed]:
        """They as a batch, for the model."""
        return {"input_ids": self.ids_N, "labels": self.labels_N, "layout": self.layout}

    @classmethod
    def of(cls, size: Size, device: torch.device) -> Places:
        """Empty places. Only fused attention takes this layout: it looks at ``starts`` alone.

        The lengths merely say how much room there is, in as many tokens and none above the longest.
        """
        ids_N, labels_N, position_N = torch.zeros(3, size.tokens, dtype=torch.long, device=device)
        starts = torch.zeros(size.sentences + 1, dtype=torch.int32, device=device)
        rows, rest = divmod(size.tokens, size.longest)
        lengths = (size.longest,) * rows + (rest,) * (rest > 0)
        scale = torch.ones((), device=device)
        return cls(ids_N, labels_N, Packed(lengths, starts, position_N), scale)

    def fill(self, batch: Any, scale: float) -> None:
        """Copy a batch of this size here; sentences that it has not are empty."""
        ids_N, labels_N = batch.inputs["input_ids"], batch.inputs["labels"]
        layout = batch.inputs["layout"]
        assert isinstance(ids_N, Tensor)
        assert isinstance(labels_N, Tensor)
        assert isinstance(layout, Packed)
        self.ids_N.copy_(ids_N)
        self.labels_N.copy_(labels_N)
        self.layout.position_N.copy_(layout.position_N)
        self.layout.starts[: len(layout.starts)].copy_(layout.starts)
        self.layout.starts[len(layout.starts) :].fill_(len(ids_N))
        self.scale.fill_(scale)


class Passes(NamedTuple):
    """What the two passes leave behind."""

    loss: Tensor  # a scalar, not scaled
    gradients: list[Tensor | None]  # of the scaled loss, by parameter


class Recording(NamedTuple):
    """Passes that can be repeated; what they left is overwritten each time."""

    replay: Callable[[], None]
    passes: Passes


Record = Callable[[Callable[[], Passes]], Recording]


class Recorder:
    """Records what is started on a GPU.

    The graphs share their memory, but for what they leave behind: only one runs at a time, and what
    it leaves has been used before the next one runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, passes: Callable[[], Passes]) -> Recording:
        """Run the passes aside, so that every library is ready, then record them.

        The random generators stand as before: a run that is resumed, and records elsewhere, draws
        the same numbers.
        """
        with torch.cuda.device(self.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside), torch.random.fork_rng([self.device]):
                for _ in range(3):
                    passes()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                left = passes()
        return Recording(graph.replay, left)


class Graphs:
    """Loss and gradients of packed batches, by a CUDA graph for every size of batch.

    Args:
        model: in train mode, with fused attention; its parameters stay where they are.
        dtype: of autocast; float32 for none.
        record: what makes the graphs.
        most: of them at most. Batches of further sizes are computed without.
    """

    def __init__(
        self,
        model: BertForTokenClassification,
        dtype: torch.dtype,
        record: Record,
        most: int = MOST,
    ):
        self.model = model
        self.dtype = dtype
        self.record = record
        self.most = most
        self.parameters = list(model.parameters())
        self.recordings: dict[Size, tuple[Places, Recording]] = {}

    def backward(self, batch: Any, scale: float = 1.0) -> Tensor:
        """The loss of a batch; and to every parameter the gradient of the loss times ``scale``.

        Args:
            batch: packed, with labels, filled up by ``data.packed(..., filler=...)``.
            scale: against underflow in fp16.

        Returns:
            The loss, a scalar without a history. Like the gradients it is overwritten by the next
            call.
        """
        layout = batch.inputs["layout"]
        assert isinstance(layout, Packed)
        size = Size.of(layout, self.model.config.max_position_embeddings)
        if size not in self.recordings and len(self.recordings) == self.most:
            return self._passes(batch.inputs, scale).loss
        if size not in self.recordings:
            places = Places.of(size, batch.first_W.device)
            places.fill(batch, scale)
            recording = self.record(lambda: self._passes(places.inputs, places.scale))
            self.recordings[size] = places, recording
        places, recording = self.recordings[size]
        places.fill(batch, scale)
        recording.replay()
        for parameter, gradient in zip(self.parameters, recording.passes.gradients):
            parameter.grad = gradient
        return recording.passes.loss

    def _passes(self, inputs: dict[str, Tensor | Packed], scale: Tensor | float) -> Passes:
        for parameter in self.parameters:
            parameter.grad = None  # or else the new one would be added to it
        # Casts that are kept for a second use would be made once and not at every replay.
        half = self.dtype != torch.float32
        device = self.parameters[0].device.type
        with torch.autocast(device, self.dtype, enabled=half, cache_enabled=False):
            loss = self.model(**inputs).loss
        assert loss is not None
        (loss * scale).backward()
        return Passes(loss.detach(), [parameter.grad for parameter in self.parameters])
