"""A model from a checkpoint directory, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibert.files import MinibertError, write_text
from minibert.machine import Chosen, choose_dtype
from minibert.model.encoder import EncoderLayer, initial
from minibert.model.heads import BertWithHead
from minibert.pretrained import config_json, families, hub, weights

Model = TypeVar("Model", bound=BertWithHead)

# Redundant tensors: a buffer that holds 0, 1, 2, ..., and copies of tied weights; by BERT's names.
REDUNDANT = {
    "bert.embeddings.position_ids": "",
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


class Options(TypedDict, total=False):
    """The options of ``from_pretrained``, for type checkers; ``model`` explains them."""

    labels: Sequence[str] | None
    num_labels: int | None
    head: str | None
    attn_implementation: str
    dtype: str | torch.dtype
    device: torch.device | str
    seed: int | None


def model(
    kind: type[Model],
    name_or_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    num_labels: int | None = None,
    head: str | None = None,
    attn_implementation: str = "sdpa",
    dtype: str | torch.dtype = "fp32",
    device: torch.device | str = "cpu",
    seed: int | None = None,
    convert_layer: Callable[[EncoderLayer], nn.Module] | None = None,
) -> Model:
    """Load a checkpoint. Parameters that it lacks, such as a new classifier, are initialised.

    Args:
        kind: the class, BertForTokenClassification or BertForMaskedLM.
        name_or_dir: a directory with config.json and model.safetensors, or a registry name.
        labels: names of the classes, or ``num_labels``; default: those of config.json.
        head: of token classification: "linear", or "crf" on top of it; default: as in config.json.
        attn_implementation: "eager", "sdpa", "fused", or "auto": fused if it runs, else sdpa.
        dtype: of the parameters: "fp32", "bf16", "fp16", "auto" or a torch.dtype.
        device: of the parameters.
        seed: for the missing parameters; None draws from the generator's current state.
        convert_layer: gets each encoder layer, on the CPU, as soon as its parameters are there, and
            gives what takes its place; of the plain layers, memory then holds about one at a time.

    Returns:
        The model in eval mode, with a ``load_report`` of what was unused and what is new.

    Raises:
        MinibertError: a file is missing, damaged or does not fit; "fused" cannot run here.
        ValueError: arguments that contradict each other.
    """
    directory = hub.locate_model(name_or_dir)
    config = config_json.read(directory / "config.json")
    if num_labels is not None:
        if labels is not None and len(labels) != num_labels:
            raise ValueError(f"num_labels is {num_labels}, but {len(labels)} labels are given")
        labels = labels or [f"LABEL_{i}" for i in range(num_labels)]
    if labels is not None:
        if not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels must be names, got {list(labels)!r}")
        config = replace(config, labels=tuple(labels))
    config = config_json.checked(replace(config, head=head or config.head))
    device = torch.device(device)
    dtype = choose_dtype(dtype, device).value
    attention = choose_attention(attn_implementation, device, dtype, config.head_size).value
    # In inference mode the parameters could never be trained; files are read into CPU memory.
    with (
        weights.opened(directory / weights.WEIGHTS, config.model_type) as checkpoint,
        torch.inference_mode(False),
        torch.device("cpu"),
    ):
        check_heads(checkpoint, config.num_attention_heads)
        with Blank():
            made = kind(config, attention)
        if seed is not None:
            torch.manual_seed(seed)
        source = directory / weights.WEIGHTS
        made.load_report = fill(
            made, checkpoint, dtype, config.initializer_range, source, convert_layer
        )
        return made.to(device).eval()


def save(model: BertWithHead, directory: Path) -> None:
    """See ``BertWithHead.save_pretrained``."""
    if not all(isinstance(layer, EncoderLayer) for layer in model.bert.layers):
        raise ValueError(
            "the encoder layers are prepacked and have no plain weights to save: "
            "load the model with from_pretrained, or the Tagger with prepack=False"
        )
    weights.save(model, directory / weights.WEIGHTS, model.config.num_attention_heads)
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


def check_heads(checkpoint: weights.Checkpoint, heads: int) -> None:
    """Compare ``heads`` with the number that minibert saved beside the weights.

    Raises:
        MinibertError: they differ.
    """
    for path, metadata in checkpoint.metadata.items():
        saved = metadata.get(weights.HEADS, str(heads))
        if saved != str(heads):
            raise MinibertError(
                f"{path}: was saved with {saved} attention heads, but num_attention_heads of "
                f"config.json is {heads}: use the config.json that belongs to it"
            )


def fill(
    model: BertWithHead,
    checkpoint: weights.Checkpoint,
    dtype: torch.dtype,
    initializer_range: float,
    source: Path | str,
    convert_layer: Callable[[EncoderLayer], nn.Module] | None = None,
) -> LoadReport:
    """Set the parameters of a model built under ``Blank``; initialise those that are missing.

    Args:
        model: built under ``Blank()``.
        checkpoint: from ``weights.opened``.
        dtype: of the parameters; missing ones are drawn in it.
        initializer_range: standard deviation of drawn weights.
        source: for messages about the whole checkpoint.
        convert_layer: see ``model``.

    Raises:
        MinibertError: a tensor of another shape, or not floating point; most are missing; or a
            tensor of the encoder is not used.
    """
    model_type = model.config.model_type
    names = weights.names_of(model)
    tensors = checkpoint.tensors
    there = missing = 0  # parameters; all are checked before memory is allocated for one
    for ours, theirs in names.items():
        wanted = tuple(model.get_parameter(ours).shape)
        stored = tensors.get(theirs)
        if stored is None:
            missing += math.prod(wanted)
            continue
        there += math.prod(wanted)
        if stored.shape != wanted and ours.startswith("head.classifier."):
            raise MinibertError(
                f"{stored.path}: {theirs} has shape {stored.shape}, but the labels ask for "
                f"{wanted}: the model was trained with {stored.shape[0]} labels: give those "
                f"{stored.shape[0]}, or start from a model without a classifier"
            )
        if stored.shape != wanted:
            raise MinibertError(
                f"{stored.path}: {theirs} has shape {stored.shape}, but config.json asks for "
                f"{wanted}: use the config.json that belongs to it"
            )
        if stored.dtype not in weights.FLOATS:
            raise MinibertError(
                f"{stored.path}: {theirs} has dtype {stored.dtype}: weights must be one of "
                f"{', '.join(weights.FLOATS)}"
            )
    if not there:
        raise MinibertError(
            f"{source}: holds no tensor of a {model_type.upper()} "
            f"(it has {', '.join(sorted(tensors)[:3])} ...): name a checkpoint that does"
        )
    if missing > there:
        raise MinibertError(
            f"{source}: holds {there} of the {there + missing} parameters that config.json and the "
            "labels ask for: use the config.json that belongs to it"
        )
    redundant = {
        families.tensor_name(name, model_type): families.tensor_name(original, model_type)
        for name, original in REDUNDANT.items()
    }
    unused = sorted(tensors.keys() - names.values() - redundant.keys())
    prefix = families.NAMES[model_type].prefixes[0]
    for name in unused:
        if name.startswith((prefix + "embeddings.", prefix + "encoder.")):
            raise MinibertError(
                f"{tensors[name].path}: holds {name}, for which the model of config.json has no "
                "use: use the config.json that belongs to it"
            )
    tied = {
        name: original
        for name, original in redundant.items()
        if name in tensors and original in tensors and original in names.values()
    }
    initialised = [theirs for theirs in names.values() if theirs not in tensors]
    own = {theirs: ours for ours, theirs in names.items()}
    for name in initialised:
        wanted = tuple(model.get_parameter(own[name]).shape)
        _set(model, own[name], initial(own[name], wanted, dtype, initializer_range))
    copies, layers = {}, model.bert.layers
    for name, tensor in checkpoint.read({*own, *tied}):  # sorted: all of a layer, then the next
        if name in tied:
            copies[name] = tensor.to(dtype)
            continue
        _set(model, own[name], tensor.to(dtype))
        if convert_layer and own[name].startswith("bert.layers."):
            i = int(own[name].split(".")[2])
            if not any(parameter.is_meta for parameter in layers[i].parameters()):
                layers[i] = convert_layer(cast(EncoderLayer, layers[i]))
    for name, original in tied.items():
        if not torch.equal(copies[name], model.get_parameter(own[original])):
            raise MinibertError(
                f"{tensors[name].path}: {name} differs from {original}, to which it is tied: "
                "use a checkpoint with tied embeddings"
            )
    return LoadReport(tuple(unused), tuple(initialised))


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module), parameter, nn.Parameter(value))
