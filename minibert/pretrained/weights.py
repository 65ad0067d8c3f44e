"""Weights in and out: safetensors files, and one table of names for both directions.

A pickle (``pytorch_model.bin``) can run code and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch
from torch import Tensor

from minibert.files import (
    MinibertError,
    out_of_memory,
    parse_json,
    read_json,
    reason,
    replacing,
)
from minibert.pretrained import families

if TYPE_CHECKING:
    from minibert.model.heads import BertWithHead

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of a checkpoint in several files
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPES = FLOATS | {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER_BYTES = 10 << 20  # largest header of a safetensors file; BERT-base's has 25 kB
NAME = re.compile(r"[\w.-]{1,300}")
SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
SHARDS = 256  # most files of a checkpoint; all are open while it is read
HEADS = "minibert.num_attention_heads"  # which no tensor's shape tells

# Ours on the left, BERT's checkpoints' on the right; {i} runs over the layers. families.py has the
# names of the other families.
NAMES = """
bert.embeddings.word.weight            bert.embeddings.word_embeddings.weight
bert.embeddings.position.weight        bert.embeddings.position_embeddings.weight
bert.embeddings.segment.weight         bert.embeddings.token_type_embeddings.weight
bert.embeddings.task.weight            bert.embeddings.task_type_embeddings.weight
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
head.crf.start_L                       crf.start
head.crf.transition_LL                 crf.transition
head.crf.end_L                         crf.end
head.bias                              cls.predictions.bias
head.transform.weight                  cls.predictions.transform.dense.weight
head.transform.bias                    cls.predictions.transform.dense.bias
head.norm.weight                       cls.predictions.transform.LayerNorm.weight
head.norm.bias                         cls.predictions.transform.LayerNorm.bias
"""


def names_of(model: BertWithHead) -> dict[str, str]:
    """Our name to the checkpoint's, for every parameter of ``model`` in order."""
    table = dict(line.split() for line in NAMES.strip().splitlines())
    names = {}
    for ours, _ in model.named_parameters():
        layer = next((part for part in ours.split(".") if part.isdigit()), "")
        pattern = ours.replace(f".{layer}.", ".{i}.") if layer else ours
        theirs = table[pattern].replace("{i}", layer)
        names[ours] = families.tensor_name(theirs, model.config.model_type)
    return names


class Stored(NamedTuple):
    """A tensor in a safetensors file, not read yet."""

    file: BinaryIO
    path: Path
    name: str  # in the file
    dtype: str  # such as "F32"
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    def read(self) -> Tensor:
        """A copy of the tensor in memory, which later changes of the file do not reach.

        Raises:
            MinibertError: the file has become shorter, or cannot be read.
        """
        if self.dtype not in DTYPES:
            raise MinibertError(
                f"{self.path}: {self.name} has dtype {self.dtype}: "
                f"save it in one of {', '.join(FLOATS)}"
            )
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        rest = memoryview(_bytes(tensor))
        try:
            self.file.seek(self.start)
            while rest:
                count = self.file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(f"it ends within {self.name}")
                rest = rest[count:]
        except OSError as error:
            raise MinibertError(
                f"{self.path}: changed or damaged while it was read ({reason(error)}): "
                "fetch or save it again"
            ) from None
        return tensor


class Checkpoint:
    """The tensors of a checkpoint by their family's names; each is read when it is needed.

    Args:
        tensors: by name.
        metadata: by file, what its header holds besides tensors.
    """

    def __init__(self, tensors: dict[str, Stored], metadata: dict[Path, dict[str, str]]):
        self.tensors = tensors
        self.metadata = metadata

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The wanted tensors with their names.

        Of a file that was saved with a hash every tensor is read, one at a time, and compared.

        Raises:
            MinibertError: a tensor is not what was saved, or a file has changed.
        """
        for path, metadata in self.metadata.items():
            saved, digest = metadata.get("minibert.sha256"), hashlib.sha256()
            here = [item for item in self.tensors.items() if item[1].path == path]
            for name, stored in sorted(here, key=lambda item: item[1].name):
                if saved is None and name not in wanted:
                    continue
                tensor = stored.read()
                if saved is not None:
                    _update(digest, stored.name, tensor)
                if name in wanted:
                    yield name, tensor
            if saved is not None and saved != digest.hexdigest():
                raise MinibertError(
                    f"{path}: the tensors do not match the hash they were saved with: "
                    "the file is damaged, fetch or save it again"
                )


@contextmanager
def opened(path: Path, model_type: str = "bert") -> Iterator[Checkpoint]:
    """The checkpoint in a safetensors file, or in the several that its index beside it lists.

    Names may lack the prefix of the family ``model_type``, and those of an ERNIE may begin with
    ``bert.``. ``LayerNorm.gamma`` and ``.beta`` are accepted for ``LayerNorm.weight`` and
    ``.bias``, in LayerNorms only: other names may contain these words.

    Raises:
        MinibertError: no such file, a pickle, a damaged file, or an index that does not fit.
    """
    prefixes = families.NAMES[model_type].prefixes
    with ExitStack() as stack:
        tensors: dict[str, Stored] = {}
        metadata = {}
        for file, names in files_of(path).items():
            found, metadata[file] = _open(file, stack)
            if names is not None and (wrong := names ^ found.keys()):
                name = min(wrong)
                has, lacks = (file.name, INDEX) if name in found else (INDEX, file.name)
                raise MinibertError(
                    f"{file}: {name} is in {has}, but not in {lacks}: fetch both again"
                )
            for name, stored in found.items():
                canonical = _canonical(name, prefixes)
                if tensors.setdefault(canonical, stored) is not stored:
                    twice = name if canonical != name else tensors[name].name
                    raise MinibertError(
                        f"{file}: {twice} and {canonical} name the same tensor: "
                        "fetch or save it again"
                    )
        yield Checkpoint(tensors, metadata)


def files_of(path: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, and the names that its index gives each; None without an index.

    Raises:
        MinibertError: no such file, a pickle, or an index that names no files.
    """
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise MinibertError(
            f"{path}: a pickle can run any code, so minibert never opens one: "
            "convert it to model.safetensors"
        )
    if path.is_file():
        return {path: None}
    index = path.with_name(INDEX)
    if index.is_file():
        return _listed(index)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if path.with_name(name).is_file():
            raise MinibertError(
                f"{path.with_name(name)}: a pickle can run any code, so minibert never opens one: "
                "convert it to model.safetensors"
            )
    raise MinibertError(f"{path}: no such file: name a directory that holds one")


def _listed(index: Path) -> dict[Path, set[str] | None]:
    """The files that an index lists, in its folder, with the names of their tensors."""
    raw = read_json(index, "make it readable")
    listed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise MinibertError(f"{index}: weight_map must map tensors to files: fetch it again")
    names: dict[Path, set[str]] = {}
    for tensor, file in listed.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise MinibertError(
                f"{index}: {tensor} is in {file!r}, which is not the name of a safetensors file: "
                "fetch the index again"
            )
        names.setdefault(index.with_name(file), set()).add(tensor)
    if len(names) > SHARDS:
        raise MinibertError(f"{index}: lists {len(names)} files, more than {SHARDS}: save fewer")
    for file in names:
        if not file.is_file():
            raise MinibertError(
                f"{file}: no such file, but {INDEX} says that it holds {min(names[file])}: fetch it"
            )
    return dict(names)


def _open(path: Path, stack: ExitStack) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by their names in it, and its metadata.

    The library checks that dtypes, shapes and offsets agree, and that the tensors fill the file
    without overlap. It maps the file into memory to do so. A process that reads a mapped file is
    killed (SIGBUS) where the file has become shorter, so tensors are read, not mapped.
    """
    from safetensors import safe_open

    try:
        file = stack.enter_context(path.open("rb", buffering=0))
        start, header = _header(file)
        # The library takes no names but UTF-8.
        is_utf8 = str(path).encode(errors="ignore") == os.fsencode(path)
        with safe_open(path if is_utf8 else f"/dev/fd/{file.fileno()}", framework="pt"):
            metadata = header.pop("__metadata__", {})
            return {
                name: Stored(
                    *(file, path, name, part["dtype"], tuple(part["shape"])),
                    start + part["data_offsets"][0],
                )
                for name, part in header.items()
            }, metadata
    except Exception as error:  # of the library's own, and what torch says to sizes and dtypes
        raise out_of_memory(error) or MinibertError(
            f"{path}: damaged or not a safetensors file ({error}): fetch or save it again"
        ) from None


def _header(file: BinaryIO) -> tuple[int, dict]:
    """Where the tensors begin, and the header; checks what safetensors does not.

    That is the header's size, and names that repeat or are paths.

    Raises:
        ValueError, OSError, MinibertError: the header is wrong.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, more than {HEADER_BYTES}")
    header = parse_json(file.read(length).decode(), "its header")
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    for name in header:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a tensor name")
    return 8 + length, header


def _canonical(name: str, prefixes: tuple[str, ...]) -> str:
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    for prefix in ("", *prefixes):
        if name.startswith(tuple(prefix + part for part in ("embeddings.", "encoder.", "pooler."))):
            return prefixes[0] + name.removeprefix(prefix)
    return name


def save(model: BertWithHead, path: Path, heads: int) -> None:
    """Write the parameters under their checkpoint names, atomically.

    The metadata contains a hash of the tensors, so that a flipped bit is found on loading, and the
    number of attention heads.

    Raises:
        MinibertError: the directory cannot be written or the disk is full.
    """
    named = sorted(names_of(model).items(), key=lambda names: names[1])
    tensors = {theirs: model.get_parameter(ours) for ours, theirs in named}
    save_tensors(tensors, path, {HEADS: str(heads)})


def save_tensors(named: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Write tensors atomically, with their hash and what else the metadata says ``about`` them."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    with replacing(path) as temporary:
        metadata = {"format": "pt", "minibert.sha256": _digest(tensors)}
        write(temporary, tensors, metadata | dict(about))


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
        _update(digest, name, tensors[name])
    return digest.hexdigest()


def _update(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
