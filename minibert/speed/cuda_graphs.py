"""The passes of a training step, or of inference, as a CUDA graph: one launch, not hundreds.

With small batches a GPU waits for Python to launch the next kernel. A CUDA graph records launches
and replays them all at once, but with the shapes and addresses used at capture. So:

- There is one graph per ``Size``, and batches are filled up to a few sizes.
- A batch is copied to where the captured kernels read. What changes from step to step lives there
  as a tensor too: where sentences begin, and the scale of the loss.
- Captured kernels draw the seeds of dropout, new ones in every replay.

The update is not captured: it is two kernels already (``OnePassAdamW``), and a loss scaler decides
in between whether it happens. Shape legend: see layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from minibert.files import MinibertError
from minibert.machine import Chosen
from minibert.model.heads import BertWithHead, TokenClassificationHead
from minibert.model.layout import Packed
from minibert.speed.cuda.attention import SHORT
from minibert.speed.cuda.seeds import one_draw
from minibert.speed.prepacked import PrepackedLayer

MOST = 12  # graphs of training; each keeps its own gradients, as large as the model
MOST_OF_INFERENCE = 64
T = TypeVar("T")

Inputs = Mapping[str, Tensor | Packed]  # of the model: input_ids, labels, layout


class Size(NamedTuple):
    """What batches that share a graph have in common."""

    tokens: int  # exactly
    sentences: int  # at most
    longest: int  # tokens of a sentence, at most

    @classmethod
    def of(cls, layout: Packed, positions: int) -> Size:
        """The size of a batch, for a model with this many positions.

        The bounds are coarse because they are cheap: an unused sentence, or the part of a length
        bound that is not needed, is a thread block that ends at once.
        """
        sentences = _power_of_two(len(layout.lengths) + 1)  # the same with and without a filler
        longest = min(max(SHORT, _power_of_two(max(layout.lengths))), positions)
        return cls(sum(layout.lengths), sentences, longest)


def choose(
    requested: bool | None,
    model: BertWithHead,
    layout: str,
    accumulate: int,
    processes: int,
) -> Chosen[bool]:
    """Whether a training run uses graphs.

    Args:
        requested: None takes them where they can run: a trial captures one.
        model: to train, where it will be trained.
        layout, accumulate: of the recipe.
        processes: how many train the model.

    Raises:
        MinibertError: they are requested and cannot run; names the first thing that is missing.
    """
    if requested is False:
        return Chosen(False, "as requested")
    device, attention, head = model.device, model.attn_implementation, type(model.head)
    needs = {
        f"a CUDA device, not {device}": device.type == "cuda",
        f"fused attention, not {attention}": attention == "fused",
        # The losses of the others have shapes that depend on the labels.
        f"a linear head, not {head.__name__}": head is TokenClassificationHead,
        f"--layout packed, not {layout}": layout == "packed",
        f"--accumulate 1, not {accumulate}": accumulate == 1,
        f"one process, not {processes}": processes == 1,
    }
    unmet = next((need for need, is_met in needs.items() if not is_met), None)
    if requested:
        if unmet:
            raise MinibertError(f"--graphs needs {unmet}: change that or leave out --graphs")
        return Chosen(True, "as requested")
    obstacle = f"they need {unmet}" if unmet else _obstacle(model)
    return Chosen(obstacle is None, obstacle or "each pass is one launch")


def _obstacle(model: BertWithHead) -> str | None:
    """Why graphs cannot or should not run on the model's CUDA device, or None."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # The gradients of all graphs, the moments, the average, and room for activations.
    needed, free = (MOST + 6) * size, torch.cuda.mem_get_info(model.device)[0]
    if free < needed:
        return f"their gradients may need {needed >> 20} MiB, {free >> 20} MiB are free"
    x_NN = torch.linspace(-1, 1, 64, device=model.device).expand(64, 64).contiguous()
    try:
        recording = Recorder(model.device)(lambda: x_NN @ x_NN)
        x_NN.neg_().add_(1)
        recording.replay()
        if not torch.allclose(recording.result, x_NN @ x_NN, rtol=1e-2, atol=1e-2):
            return "a replayed product is wrong"
    except RuntimeError as error:
        return _failure(error)
    return None


def _failure(error: RuntimeError) -> str:
    return f"a first capture fails: {str(error).splitlines()[0]}"


def _power_of_two(number: int) -> int:
    """The smallest one that is not below ``number``."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Places:
    """The tensors that captured kernels read."""

    ids_N: Tensor
    labels_N: Tensor
    layout: Packed
    scale: Tensor  # of the loss, a scalar

    @property
    def inputs(self) -> Inputs:
        """The same tensors as arguments of the model."""
        return {"input_ids": self.ids_N, "labels": self.labels_N, "layout": self.layout}

    @classmethod
    def of(cls, size: Size, device: torch.device) -> Places:
        """Empty places. Only fused attention can run on this layout, as it reads ``starts`` alone.

        The lengths only add up to the size: full sentences, and one with the rest.
        """
        ids_N, labels_N, position_N = torch.zeros(3, size.tokens, dtype=torch.long, device=device)
        starts = torch.zeros(size.sentences + 1, dtype=torch.int32, device=device)
        rows, rest = divmod(size.tokens, size.longest)
        lengths = (size.longest,) * rows + (rest,) * (rest > 0)
        scale = torch.ones((), device=device)
        return cls(ids_N, labels_N, Packed(lengths, starts, position_N), scale)

    def fill(self, inputs: Inputs, scale: float = 1.0) -> None:
        """Copy a batch of this size here; sentences that it does not have are empty."""
        ids_N, layout = _packed(inputs)
        self.ids_N.copy_(ids_N)
        if isinstance(labels_N := inputs.get("labels"), Tensor):
            self.labels_N.copy_(labels_N)
        self.layout.position_N.copy_(layout.position_N)
        self.layout.starts[: len(layout.starts)].copy_(layout.starts)
        self.layout.starts[len(layout.starts) :].fill_(len(ids_N))
        self.scale.fill_(scale)


def _packed(inputs: Inputs) -> tuple[Tensor, Packed]:
    """Ids and layout of a packed batch."""
    ids_N, layout = inputs["input_ids"], inputs["layout"]
    assert isinstance(ids_N, Tensor)
    assert isinstance(layout, Packed)
    return ids_N, layout


@dataclass(frozen=True, eq=False)
class Passes:
    """The result of a forward and backward pass."""

    loss: Tensor  # a scalar, not scaled
    gradients: list[Tensor | None]  # of the scaled loss, by parameter


@dataclass(frozen=True, eq=False)
class Recording(Generic[T]):
    """What was captured; a replay overwrites the result of the last one."""

    replay: Callable[[], None]
    result: T


class Record(Protocol):
    """Captures what a function does; ``Recorder`` does it with CUDA."""

    def __call__(self, passes: Callable[[], T], /) -> Recording[T]:
        """The recording, and the function's result as its first one."""


class Recorder:
    """Captures CUDA graphs.

    They share one memory pool: only one runs at a time, and its result has been used before the
    next one runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __reduce__(self) -> tuple:
        """Copy and pickle without the pool, which belongs to this process."""
        return type(self), (self.device,)

    def __call__(self, passes: Callable[[], T], /) -> Recording[T]:
        """Warm up on a side stream, so that every library is initialised, then capture.

        The random generators end where they began: a resumed run captures at other steps and must
        draw the same numbers.
        """
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), torch.random.fork_rng([self.device]):
                for _ in range(3):
                    passes()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = passes()
        return Recording(graph.replay, result)


class Graphs:
    """Loss and gradients of packed batches, with one CUDA graph per size of batch.

    Args:
        model: in train mode, with fused attention; its output has a loss, and its parameters must
            not move.
        positions: of the model.
        dtype: of autocast; float32 for none.
        record: captures a graph.
        most: number of graphs at most. Batches of further sizes run without one.
    """

    def __init__(
        self,
        model: nn.Module,
        positions: int,
        dtype: torch.dtype,
        record: Record,
        most: int = MOST,
    ):
        self.model = model
        self.positions = positions
        self.dtype = dtype
        self.record = record
        self.most = most
        self.parameters = list(model.parameters())
        self.recordings: dict[Size, tuple[Places, Recording[Passes]]] = {}

    def backward(self, inputs: Inputs, scale: float = 1.0) -> Tensor:
        """Compute the loss, and give every parameter the gradient of the loss times ``scale``.

        Args:
            inputs: of the model, for a packed batch with labels, filled up to one of a few sizes.
            scale: against underflow in fp16.

        Returns:
            The loss, a scalar without history. Like the gradients it is overwritten by the next
            call.
        """
        ids_N, layout = _packed(inputs)
        size = Size.of(layout, self.positions)
        if size not in self.recordings:
            places = Places.of(size, ids_N.device)
            places.fill(inputs, scale)
            if len(self.recordings) == self.most:
                # From the same places: torch's flash kernels draw by the number of sentences.
                return self._passes(places).loss
            self.recordings[size] = places, self.record(lambda: self._passes(places))
        places, recording = self.recordings[size]
        places.fill(inputs, scale)
        recording.replay()
        for parameter, gradient in zip(self.parameters, recording.result.gradients):
            parameter.grad = gradient
        return recording.result.loss

    def _passes(self, places: Places) -> Passes:
        for parameter in self.parameters:
            parameter.grad = None  # otherwise the new gradient would be added to it
        # Without the cache: a cached cast would be captured once and not follow the weights.
        half = self.dtype != torch.float32
        device = self.parameters[0].device.type
        autocast = torch.autocast(device, self.dtype, enabled=half, cache_enabled=False)
        with one_draw(), autocast:
            loss = self.model(**places.inputs).loss
        assert loss is not None
        (loss * places.scale).backward()
        return Passes(loss.detach(), [parameter.grad for parameter in self.parameters])


class InferenceGraphs:
    """Logits of packed batches, with one CUDA graph per size of batch. Threads take turns.

    Args:
        model: in eval mode, with fused attention; its parameters must not move.
        record: captures a graph.
        most: number of graphs at most. Batches of further sizes run without one.
    """

    def __init__(self, model: BertWithHead, record: Record, most: int = MOST_OF_INFERENCE):
        self.model = model
        self.record = record
        self.most = most
        self.recordings: dict[Size, tuple[Places, Recording[Tensor]]] = {}
        self.lock = Lock()

    def __reduce__(self) -> tuple:
        """Copy and pickle without the graphs, which hold addresses of this process."""
        return type(self), (self.model, self.record, self.most)

    def __call__(self, inputs: Inputs) -> Tensor:
        """The logits (N, L) of a batch, filled up to one of a few sizes."""
        ids_N, layout = _packed(inputs)
        size = Size.of(layout, self.model.config.max_length)
        with self.lock:
            if size not in self.recordings:
                if len(self.recordings) == self.most:
                    return self.model(ids_N, layout=layout).logits
                places = Places.of(size, ids_N.device)
                places.fill(inputs)
                recording = self.record(
                    lambda: self.model(places.ids_N, layout=places.layout).logits
                )
                self.recordings[size] = places, recording
            places, recording = self.recordings[size]
            places.fill(inputs)
            recording.replay()
            return recording.result.clone()

    @torch.inference_mode()
    def obstacle(self) -> str | None:
        """Why they cannot be used, or None: captures a pass over three tokens and replays it."""
        layout = Packed.from_lengths([2, 1], self.model.device)
        try:
            for ids_N in torch.tensor([[0, 0, 0], [1, 0, 1]], device=self.model.device):
                got = self({"input_ids": ids_N, "layout": layout})
                want = self.model(ids_N, layout=layout).logits
                if not torch.allclose(got, want, rtol=1e-2, atol=1e-2, equal_nan=True):
                    return "a replayed pass is wrong"
        except RuntimeError as error:
            return _failure(error)
        return None


def choose_inference(model: BertWithHead) -> Chosen[InferenceGraphs | None]:
    """CUDA graphs for a model that only predicts, or None and why not.

    Args:
        model: in eval mode, where it will run.
    """
    device, attention, layers = model.device, model.attn_implementation, model.bert.layers
    needs = {
        f"a CUDA device, not {device}": device.type == "cuda",
        f"fused attention, not {attention}": attention == "fused",
        # They cannot be moved, and nothing can look at what happens inside them.
        "prepacked layers, not plain ones": all(isinstance(x, PrepackedLayer) for x in layers),
    }
    if unmet := next((need for need, is_met in needs.items() if not is_met), None):
        return Chosen(None, f"they need {unmet}")
    graphs = InferenceGraphs(model, Recorder(device))
    obstacle = graphs.obstacle()
    return Chosen(None if obstacle else graphs, obstacle or "each pass is one launch")
