"""What this machine has, what "auto" takes on it, and whether each CUDA kernel works here.

The page that ``minibert info`` prints.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from textwrap import TextWrapper
from typing import TYPE_CHECKING

import torch

from minibert import __version__
from minibert.files import home
from minibert.machine import DTYPES, Chosen, choose_device, choose_dtype, name_of
from minibert.model.encoder import IMPLEMENTATIONS
from minibert.speed import cuda, fused, prepacked
from minibert.speed.cuda import adamw, attention, build, obstacles
from minibert.speed.prepacked import PrepackedLayer

if TYPE_CHECKING:
    from minibert.tagging.tagger import Tagger

HEAD_SIZE, HIDDEN_SIZE = 64, 768  # K and D of BERT-base
NAME = 13  # characters of a line's name, with the blanks after it
WORKS = "works, equal to float64 within rounding"


def describe() -> str:
    """The page that ``minibert info`` prints, 80 columns wide."""
    rest = " " * NAME
    # Names stay whole, so that they can be searched for.
    page = TextWrapper(80, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(page.fill, _lines()))


def facts() -> dict[str, str]:
    """The same by name, for programs: ``{"minibert": ..., "auto_dtype": ...}``."""
    return {line[:NAME].strip().replace(" ", "_"): line[NAME:] for line in _lines()}


def _lines() -> list[str]:
    names = ("torch", "numpy", "tokenizers", "safetensors")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    device = choose_device()
    dtype = choose_dtype("auto", device)
    choice = fused.choose("auto", device, dtype.value, HEAD_SIZE)
    return [
        f"minibert     {__version__}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"packages     {packages}",
        f"cpu          {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"cpu dtype    {_line(choose_dtype('auto', torch.device('cpu')))}",
        f"gpu          {_gpus()}",
        f"compiler     {_compiler()}",
        f"home         {home()}",
        f"attention    {', '.join(IMPLEMENTATIONS)}",
        f"auto device  {device}",
        f"auto dtype   {_line(dtype)}",
        f"auto attn    {choice.value}: {choice.reason}",
        f"auto layers  {_layers(device, dtype.value)}",
        f"int8         {_int8(torch.device('cpu'))}",
        *(f"fused {name:6} {_fused(device, known)}" for name, known in DTYPES.items()),
        f"product      {_product(device, dtype.value)}",
        *(f"{name:12} {found}" for name, found in _kernels(device)),
    ]


def running(tagger: Tagger) -> str:
    """How a tagger runs, in a line: device, number format, attention, layers; on a GPU graphs."""
    model, graphs = tagger.model, tagger.graphs
    layer = model.bert.layers[0]
    what = layer.qkv.what if isinstance(layer, PrepackedLayer) else "plain layers"
    how = f"attention {model.attn_implementation}, {what}"
    if model.device.type == "cuda":
        how += f", {'' if graphs.value else 'no '}CUDA graphs: {graphs.reason}"
    return f"{model.device}, {name_of(model.dtype)}, {how}"


def _line(choice: Chosen) -> str:
    return f"{name_of(choice.value)}: {choice.reason}"


def _layers(device: torch.device, dtype: torch.dtype) -> str:
    choice = prepacked.choose(device, dtype, may_round=True)
    return f"{'prepacked' if choice.value else 'plain'} for tagging: {choice.reason}"


def _int8(device: torch.device) -> str:
    """What ``--dtype int8`` does there."""
    choice = prepacked.choose_int8(device)
    return f"{'runs where requested' if choice.value else 'cannot run'}: {choice.reason}"


def _fused(device: torch.device, dtype: torch.dtype) -> str:
    """What "fused" is for this dtype, and why."""
    try:
        return fused.choose("fused", device, dtype, HEAD_SIZE).reason
    except cuda.FusedUnavailableError as error:
        return f"cannot run: {error}"


def _kernels(device: torch.device) -> Iterator[tuple[str, str]]:
    """Every CUDA kernel tried once: its name, and whether it works or what is in the way."""
    if device.type != "cuda":
        yield "kernels", f"not tried: {_no_gpu()}"
        return
    half, dropout_p = torch.float16, 0.25
    for head_size in reversed(attention.HEAD_SIZES):
        for p, what in ((0.0, ""), (dropout_p, " with dropout")):
            found = obstacles.attention(device, half, head_size, p)
            yield "attention", f"head size {head_size}{what}: {found or WORKS}"
    for residual, p, what in ((half, 0.0, ""), (torch.float32, dropout_p, " with dropout")):
        found = obstacles.norm(device, HIDDEN_SIZE, residual, p)
        yield "add-norm", f"{name_of(residual)} residual{what}: {found or WORKS}"
    for semantics in adamw.SEMANTICS:
        yield "AdamW", f"{semantics}: {obstacles.adamw(device, semantics) or WORKS}"


def _product(device: torch.device, dtype: torch.dtype) -> str:
    """The speed of one large matrix product."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return f"{2e-12 * size**3 / min(times):.2f} TFLOP/s in {name_of(dtype)}, {size} cubed"


def _compiler() -> str:
    """What compiles and launches the kernels."""
    try:
        names = ("cuda-core", "cuda-bindings")
        packages = ", ".join(f"{name} {version(name)}" for name in names)
        return f"NVRTC {'.'.join(map(str, build.compiler()))}, {packages}"
    except (PackageNotFoundError, build.BuildError) as error:
        return f"none, so no CUDA kernels ({error}): {build.INSTALL}"


def _no_gpu() -> str:
    """Why torch can use no GPU."""
    if torch.version.cuda is None:
        return "torch was built without CUDA: with an NVIDIA GPU install its CUDA build"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "torch finds no CUDA device"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return f"none: {_no_gpu()}"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return "; ".join(found)
