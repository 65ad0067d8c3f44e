"""Weights in and out: safetensors files, and one table of names for both directions.

A pickle (``pytorch_model.bin``) can run code and is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from minibert.files import MinibertError, parse_json, replacing

WEIGHTS = "model.safetensors"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}

HEADER_BYTES = 10 << 20  # largest header of a safetensors file; BERT-base's has 25 kB
NAME = re.compile(r"[\w.-]{1,300}")

# Ours on the left, the checkpoint's on the right; {i} runs over the layers.
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
head.classifier.weight                 classifier.weight
head.classifier.bias                   classifier.bias
head.bias                              cls.predictions.bias
head.transform.weight                  cls.predictions.transform.dense.weight
head.transform.bias                    cls.predictions.transform.dense.bias
head.norm.weight                       cls.predictions.transform.LayerNorm.weight
head.norm.bias                         cls.predictions.transform.LayerNorm.bias
"""


def names_of(model: nn.Module) -> dict[str, str]:
    """Our name to the checkpoint's, for every parameter of ``model`` in order."""
    table = dict(line.split() for line in NAMES.strip().splitlines())
    names = {}
    for ours, _ in model.named_parameters():
        layer = next((part for part in ours.split(".") if part.isdigit()), "")
        pattern = ours.replace(f".{layer}.", ".{i}.") if layer else ours
        names[ours] = table[pattern].replace("{i}", layer)
    return names


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, under the checkpoint names of ``NAMES``.

    Names may lack the ``bert.`` prefix. ``LayerNorm.gamma`` and ``.beta`` are accepted for
    ``LayerNorm.weight`` and ``.bias``, in LayerNorms only: other names may contain these words.
    The tensors are views of the mapped file; ``load.fill`` copies those it uses.

    Raises:
        MinibertError: no such file, a pickle, or a damaged file.
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
    """Check what safetensors does not: the header's size, and names that repeat or are paths.

    The library checks that dtypes, shapes and offsets agree, and that the tensors fill the file
    without overlap.

    Raises:
        ValueError, OSError, MinibertError: the header is wrong.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes, more than {HEADER_BYTES}")
        header = parse_json(file.read(length).decode(), "its header")
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    for name in header:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a tensor name")


def _canonical(name: str) -> str:
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    return name


def save(model: nn.Module, path: Path) -> None:
    """Write the parameters under their checkpoint names, atomically.

    The metadata contains a hash of the tensors, so that a flipped bit is found on loading.

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
    """Write a safetensors file of CPU tensors, in the order given.

    The same tensors give the same bytes. The safetensors library does not fix the order of the
    metadata, so the header (length, JSON, padding to 8 bytes) is written here.
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
    """SHA-256 of names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
