"""A model from a checkpoint directory, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibert.files import MinibertError, give_back, write_text
from minibert.machine import Chosen, choose_dtype
from minibert.model.encoder import EncoderLayer, initial
from minibert.model.heads import BertWithHead
from minibert.pretrained import config_json, hub, weights

Model = TypeVar("Model", bound=BertWithHead)

# Redundant tensors: a buffer that holds 0, 1, 2, ..., and copies of tied weights.
REDUNDANT = {
    "bert.embeddings.position_ids": None,
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


@dataclass(frozen=True)
class LoadReport:
    """The tensors of a checkpoint that were not used, and those it lacked, by checkpoint name."""

    unused: tuple[str, ...]
    initialised: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        if self.unused:
            lines.append("unused: " + ", ".join(self.unused))
        if self.initialised:
            lines.append("newly initialised: " + ", ".join(self.initialised))
        return "\n".join(lines) or "every tensor used, none missing"


def model(
    kind: type[Model],
    name_or_dir: str | Path,
    labels: Sequence[str] | None,
    num_labels: int | None,
    attn_implementation: str,
    dtype: str | torch.dtype,
    device: torch.device | str,
    seed: int | None,
) -> Model:
    """See ``BertWithHead.from_pretrained``."""
    directory = hub.locate_model(name_or_dir)
    config = config_json.read(directory / "config.json")
    if num_labels is not None:
        if labels is not None and len(labels) != num_labels:
            raise ValueError(f"num_labels is {num_labels}, but {len(labels)} labels are given")
        labels = labels or [f"LABEL_{i}" for i in range(num_labels)]
    if labels is not None:
        config = replace(config, labels=tuple(labels))
    device = torch.device(device)
    dtype = choose_dtype(dtype, device).value
    attention = choose_attention(attn_implementation, device, dtype, config.head_size).value
    path = directory / weights.WEIGHTS
    tensors = weights.read(path)
    with Blank():
        made = kind(config, attention)
    if seed is not None:
        torch.manual_seed(seed)
    made.load_report = fill(made, tensors, dtype, config.initializer_range, path)
    return made.to(device).eval()


def save(model: BertWithHead, directory: Path) -> None:
    """See ``BertWithHead.save_pretrained``."""
    if not all(isinstance(layer, EncoderLayer) for layer in model.bert.layers):
        raise ValueError(
            "the encoder layers are prepacked and have no plain weights to save: "
            "load the model with from_pretrained, or the Tagger with prepack=False"
        )
    weights.save(model, directory / weights.WEIGHTS)
    config = json.dumps(config_json.to_dict(model.config, type(model).__name__), indent=2)
    write_text(directory / "config.json", config + "\n")


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int
) -> Chosen[str]:
    """See ``speed.fused.choose``, which is imported only if it may be needed."""
    if name in ("eager", "sdpa"):
        return Chosen(name, "requested")
    from minibert.speed import fused

    return fused.choose(name, device, dtype, head_size)


class Blank(TorchFunctionMode):
    """Within it a module is built from shapes alone and draws nothing; ``fill`` sets the values.

    ``torch.device("meta")`` alone runs the initialisation on shapes, in Python code that imports
    torch's compiler, which doubles the time of ``import torch``.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Skip what ``nn.init`` does; create tensors on the meta device."""
        kwargs = kwargs or {}
        if func is Tensor.normal_:
            return args[0]
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        with torch.device("meta"):
            return func(*args, **kwargs)


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    initializer_range: float,
    source: Path | str,
) -> LoadReport:
    """Set the parameters of a model built under ``Blank``; initialise those that are missing.

    ``tensors`` are used up: as each is copied, the pages of its file are returned to the system, so
    that the process never holds the file and the model in full.

    Args:
        model: built under ``Blank()``.
        tensors: from ``weights.read``.
        dtype: of the parameters; missing ones are drawn in it.
        initializer_range: standard deviation of drawn weights.
        source: for messages.

    Raises:
        MinibertError: a tensor of another shape, or not floating point; or most are missing.
    """
    names = weights.names_of(model)
    there = missing = 0  # parameters; all are checked before memory is allocated for one
    for ours, theirs in names.items():
        wanted = tuple(model.get_parameter(ours).shape)
        tensor = tensors.get(theirs)
        if tensor is None:
            missing += math.prod(wanted)
            continue
        there += math.prod(wanted)
        if tuple(tensor.shape) != wanted:
            raise MinibertError(
                f"{source}: {theirs} has shape {tuple(tensor.shape)}, but config.json "
                f"and the labels ask for {wanted}: use the config.json that belongs to it"
            )
        if not tensor.is_floating_point():
            raise MinibertError(
                f"{source}: {theirs} has dtype {tensor.dtype}: weights must be floating point"
            )
    if not there:
        raise MinibertError(
            f"{source}: holds no tensor of a BERT (it has {', '.join(sorted(tensors)[:3])} ...): "
            "name the checkpoint of a BERT"
        )
    if missing > there:
        raise MinibertError(
            f"{source}: holds {there} of the {there + missing} parameters that config.json and the "
            "labels ask for: use the config.json that belongs to it"
        )
    for name, original in REDUNDANT.items():
        if original is None or name not in tensors or original not in names.values():
            continue
        copy, tied = tensors[name], tensors.get(original, tensors[name])
        if copy.dtype != tied.dtype or not torch.equal(copy, tied):
            raise MinibertError(
                f"{source}: {name} differs from {original}, to which it is tied in BERT: "
                "use a checkpoint with tied embeddings"
            )
    state, initialised = {}, []
    for ours, theirs in names.items():
        if theirs in tensors:
            # A copy: a change of the mapped file must not reach a loaded model.
            state[ours] = tensors[theirs].to(dtype, copy=True)
            give_back(tensors[theirs].data_ptr(), tensors[theirs].nbytes)
        else:
            wanted = tuple(model.get_parameter(ours).shape)
            state[ours] = initial(ours, wanted, dtype, initializer_range)
            initialised.append(theirs)
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    used = set(names.values()) | REDUNDANT.keys()
    return LoadReport(tuple(sorted(tensors.keys() - used)), tuple(initialised))
