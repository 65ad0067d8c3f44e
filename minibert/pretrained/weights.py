"""Checkpoints in and out: one table of names, used in both directions.

Only safetensors is opened; a pickle (``pytorch_model.bin``) can run code and is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibert.files import MinibertError, give_back, parse_json, replacing

log = logging.getLogger("minibert")

WEIGHTS = "model.safetensors"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}

HEADER_BYTES = 10 << 20  # of a safetensors file, at most; that of BERT-base has 25 kB
NAME = re.compile(r"[\w.-]{1,300}")

# Ours on the left, the checkpoint's on the right; {i} runs over the layers. The order is that of
# the parameters in the module, which is also the order in which fresh ones are drawn.
NAMES = """
bert.embeddings.word.weight            bert.embeddings.word_embeddings.weight
bert.embeddings.position.weight        bert.embeddings.position_embeddings.weight
bert.embeddings.segment.weight         bert.embeddings.token_type_embeddings.weight
bert.embeddings.norm.weight            bert.embeddings.LayerNorm.weight
bert.embeddings.norm.bias              bert.embeddings.LayerNorm.bias
bert.layers.{i}.attention.query.weight bert.encoder.layer.{i}.attention.self.query.weight
bert.layers.{i}.attention.query.bias   bert.encoder.layer.{i}.attention.self.query.bias
bert.layers.{i}.attention.key.weight   bert.encoder.layer.{i}.attention.self.key.weight
bert.layers.{i}.attention.key.bias     bert.encoder.layer.{i}.attention.self.key.bias
bert.layers.{i}.attention.value.weight bert.encoder.layer.{i}.attention.self.value.weight
bert.layers.{i}.attention.value.bias   bert.encoder.layer.{i}.attention.self.value.bias
bert.layers.{i}.attention.output.weight bert.encoder.layer.{i}.attention.output.dense.weight
bert.layers.{i}.attention.output.bias  bert.encoder.layer.{i}.attention.output.dense.bias
bert.layers.{i}.attention_norm.weight  bert.encoder.layer.{i}.attention.output.LayerNorm.weight
bert.layers.{i}.attention_norm.bias    bert.encoder.layer.{i}.attention.output.LayerNorm.bias
bert.layers.{i}.feed_forward.up.weight bert.encoder.layer.{i}.intermediate.dense.weight
bert.layers.{i}.feed_forward.up.bias   bert.encoder.layer.{i}.intermediate.dense.bias
bert.layers.{i}.feed_forward.down.weight bert.encoder.layer.{i}.output.dense.weight
bert.layers.{i}.feed_forward.down.bias bert.encoder.layer.{i}.output.dense.bias
bert.layers.{i}.feed_forward_norm.weight bert.encoder.layer.{i}.output.LayerNorm.weight
bert.layers.{i}.feed_forward_norm.bias bert.encoder.layer.{i}.output.LayerNorm.bias
classifier.weight                      classifier.weight
classifier.bias                        classifier.bias
bias                                   cls.predictions.bias
transform.weight                       cls.predictions.transform.dense.weight
transform.bias                         cls.predictions.transform.dense.bias
transform_norm.weight                  cls.predictions.transform.LayerNorm.weight
transform_norm.bias                    cls.predictions.transform.LayerNorm.bias
"""

# Names that say nothing new: a buffer holding 0, 1, 2, ..., and copies of tied weights.
REDUNDANT = {
    "bert.embeddings.position_ids": None,
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def names_of(model: nn.Module) -> dict[str, str]:
    """Our parameter name to the checkpoint's, for every parameter of ``model``, in its order."""
    table = dict(line.split() for line in NAMES.strip().splitlines())
    names = {}
    for ours, _ in model.named_parameters():
        layer = next((part for part in ours.split(".") if part.isdigit()), "")
        pattern = ours.replace(f".{layer}.", ".{i}.") if layer else ours
        names[ours] = table[pattern].replace("{i}", layer)
    return names


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held that was not used, and what it lacked; names as in the checkpoint."""

    unused: tuple[str, ...]
    initialised: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        if self.unused:
            lines.append("unused: " + ", ".join(self.unused))
        if self.initialised:
            lines.append("newly initialised: " + ", ".join(self.initialised))
        return "\n".join(lines) or "every tensor used, none missing"


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file under the checkpoint names of ``NAMES``.

    Understood: with and without the ``bert.`` prefix, and ``LayerNorm.gamma`` / ``.beta`` for
    ``LayerNorm.weight`` / ``.bias`` (renamed there only: other names may hold these words).

    The tensors lie in the file still, mapped and not read: ``fill`` copies those it takes.

    Raises:
        MinibertError: no such file, a pickle, or a file that is damaged.
    """
    from safetensors import safe_open

    if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise MinibertError(
            f"{path}: a pickle can run any code, so minibert never opens one: "
            "convert it to model.safetensors"
        )
    if not path.is_file():
        pickled = path.with_name("pytorch_model.bin")
        if pickled.is_file():
            raise MinibertError(
                f"{pickled}: a pickle can run any code, so minibert never opens one: "
                "convert it to model.safetensors"
            )
        raise MinibertError(f"{path}: no such file: name a directory that holds one")
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get("minibert.sha256")
    except Exception as error:  # of the library's own, and what torch says to sizes and dtypes
        raise MinibertError(
            f"{path}: damaged or not a safetensors file ({error}): fetch or save it again"
        ) from None
    if stored is not None and stored != _digest(tensors):
        raise MinibertError(
            f"{path}: the tensors do not match the hash they were saved with: "
            "the file is damaged, fetch or save it again"
        )
    canonical = {_canonical(name): tensor for name, tensor in tensors.items()}
    if len(canonical) < len(tensors):
        twice = next(name for name in tensors if _canonical(name) != name)
        raise MinibertError(
            f"{path}: {twice} and {_canonical(twice)} name the same tensor: fetch or save it again"
        )
    return canonical


def _check_header(path: Path) -> None:
    """What the library lets pass: a header of up to 100 MB, a name that comes twice or is a path.

    The library itself checks that dtypes, shapes and offsets agree, that tensors neither overlap
    nor leave gaps, and that they end where the file does.

    Raises:
        ValueError, OSError, MinibertError: saying what is wrong.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes, more than {HEADER_BYTES}")
        header = parse_json(file.read(length).decode(), "its header")
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    for name in header:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a tensor")


def _canonical(name: str) -> str:
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    return name


class Blank(TorchFunctionMode):
    """Within it a module is built as shapes alone, and draws nothing: ``fill`` brings the values.

    ``torch.device("meta")`` by itself runs the drawing on shapes, in Python code that imports
    torch's compiler: as slow again as all of ``import torch``.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Leave out what ``nn.init`` does; tensors that are made are made on the meta device."""
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
    last_use: bool = False,
) -> LoadReport:
    """Give a model built on the meta device its parameters, drawing those that are not there.

    Args:
        model: as built under ``Blank()``.
        tensors: what ``read`` gave.
        dtype: of the parameters afterwards, fresh ones drawn in it.
        initializer_range: standard deviation of fresh weights.
        source: for messages.
        last_use: nobody reads ``tensors`` afterwards: what the file's pages take of memory is
            given back as they are copied, so that it never holds both in full.

    Raises:
        MinibertError: a tensor of another shape, or of no floating type; or most are not there.
    """
    names = names_of(model)
    there = missing = 0  # parameters; all are looked at before memory is taken for one
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
            f"{source}: no tensor of a BERT in it (it has {', '.join(sorted(tensors)[:3])} ...): "
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
            # A copy: the mapped file must not change under a loaded model.
            state[ours] = tensors[theirs].to(dtype, copy=True)
            if last_use:
                give_back(tensors[theirs].data_ptr(), tensors[theirs].nbytes)
        else:
            wanted = tuple(model.get_parameter(ours).shape)
            state[ours] = fresh(ours, wanted, dtype, initializer_range)
            initialised.append(theirs)
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    used = set(names.values()) | REDUNDANT.keys()
    return LoadReport(tuple(sorted(tensors.keys() - used)), tuple(initialised))


def fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, std: float) -> Tensor:
    """A new parameter by BERT's rule: norms 1, biases 0, all else drawn from N(0, std)."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if "norm." in name:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0.0, std)


def save(model: nn.Module, path: Path) -> None:
    """Write the parameters under their checkpoint names, whole or not at all.

    The metadata carries a hash of the tensors, so that a flipped bit is found on loading.

    Raises:
        MinibertError: the directory cannot be written or the disk is full.
    """
    tensors = {
        theirs: model.get_parameter(ours).detach().cpu().contiguous()
        for ours, theirs in sorted(names_of(model).items(), key=lambda names: names[1])
    }
    with replacing(path) as temporary:
        write(temporary, tensors, {"format": "pt", "minibert.sha256": _digest(tensors)})


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file of tensors on the CPU, in the order given.

    The same tensors give the same bytes: the safetensors library orders the metadata by chance, so
    the header (its length, JSON, padding to 8 bytes) is written here.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
