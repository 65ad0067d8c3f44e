"""What this machine has and what "auto" takes on it: the page that ``minibert info`` prints."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

from minibert import __version__
from minibert.files import home
from minibert.machine import DTYPES, Chosen, choose_device, choose_dtype, name_of
from minibert.model.encoder import IMPLEMENTATIONS
from minibert.model.heads import BertForTokenClassification
from minibert.speed import cuda, fused, prepacked
from minibert.speed.prepacked import PrepackedLayer

HEAD_SIZE, HIDDEN_SIZE = 64, 768  # K and D of BERT-base


def describe() -> str:
    """The page that ``minibert info`` prints."""
    names = ("torch", "numpy", "tokenizers", "safetensors")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    device = choose_device()
    dtype = choose_dtype("auto", device)
    choice = fused.choose("auto", device, dtype.value, HEAD_SIZE)
    lines = [
        f"minibert     {__version__}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"packages     {packages}",
        f"cpu          {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        f"cpu dtype    {_line(choose_dtype('auto', torch.device('cpu')))}",
        f"gpu          {_gpus()}",
        f"home         {home()}",
        f"attention    {', '.join(IMPLEMENTATIONS)}",
        f"auto device  {device}",
        f"auto dtype   {_line(dtype)}",
        f"auto attn    {choice.value}: {choice.reason}",
        f"auto layers  {_layers(device, dtype.value)}",
        *(f"fused {name:6} {_fused(device, known)}" for name, known in DTYPES.items()),
        f"fused norm   {_norm(device)}",
    ]
    return "\n".join(lines)


def running(model: BertForTokenClassification) -> str:
    """How a model runs, in a line: device, number format, attention, layers."""
    layer = model.bert.layers[0]
    what = layer.qkv.what if isinstance(layer, PrepackedLayer) else "plain layers"
    how = f"attention {model.attn_implementation}, {what}"
    return f"{model.device}, {name_of(model.dtype)}, {how}"


def _line(choice: Chosen) -> str:
    return f"{name_of(choice.value)}: {choice.reason}"


def _layers(device: torch.device, dtype: torch.dtype) -> str:
    choice = prepacked.choose(device, dtype, may_round=True)
    return f"{'prepacked' if choice.value else 'plain'} for tagging: {choice.reason}"


def _fused(device: torch.device, dtype: torch.dtype) -> str:
    """What "fused" is for this dtype, and why."""
    try:
        return fused.choose("fused", device, dtype, HEAD_SIZE).reason
    except cuda.FusedUnavailableError as error:
        return f"cannot run: {error}"


def _norm(device: torch.device) -> str:
    """How dropout, residual and LayerNorm are computed with "fused"."""
    obstacle = cuda.obstacle_to_norm(device, HIDDEN_SIZE)
    return (
        f"in three passes: {obstacle}" if obstacle else "in one pass where x is fp16: own kernels"
    )


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return "; ".join(found)
