"""Encoder layers for inference on a CPU, their weights laid out once as the products read them.

oneDNN, which multiplies matrices for torch on a CPU, reads a weight in blocks that fit the vector
registers. Given a plain (out, in) matrix it copies it into blocks in every call: for one sentence
of 12 pieces the copies take longer than the products. Here they are made once, q, k and v are one
product, and GELU and the residual are added before a result is stored.

The plain layers (model.py) stay the reference: these add up in another order, so the last bits
differ, and they can be neither trained nor saved nor looked into. Shape legend: see layout.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minibert.layout import Layout
from minibert.model import BertWithHead, EncoderLayer

# What torch.compile makes of a linear layer on a CPU. Not documented, so ``choose`` looks for them.
OPERATIONS = ("mkldnn::_reorder_linear_weight", "mkldnn::_linear_pointwise")


class Choice(NamedTuple):
    """Whether layers are prepacked, and why."""

    prepack: bool
    reason: str


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """Whether a model that only answers gets prepacked layers.

    Args:
        device: where the model runs.
        dtype: of its parameters.
    """
    if device.type != "cpu":
        return Choice(False, "only a CPU lays weights out anew in every call")
    if not torch.backends.mkldnn.is_available():
        return Choice(False, "torch was built without oneDNN")
    for name in OPERATIONS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            return Choice(False, f"torch {torch.__version__} has no {name}")
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if not supported.get(dtype, False):
        return Choice(False, f"oneDNN does not multiply {dtype} on this CPU")
    return Choice(True, "oneDNN finds the weights laid out as it reads them")


class Linear:
    """x Wᵀ + b, W in blocks.

    Args:
        weight_OI: (out, in), float32, bfloat16 or float16, on the CPU.
        bias_O: (out,), the same dtype.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
        self.bias_O = bias_O.detach()

    def __call__(self, x_NI: Tensor, activation: str = "none") -> Tensor:
        """(N, in) to (N, out), then ``activation``: "none" or "gelu", the exact one by erf."""
        linear = torch.ops.mkldnn._linear_pointwise.default
        return linear(x_NI, self.weight, self.bias_O, activation, [], "none")

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product and the residual added up."""
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(x_NI, residual_NO, self.weight, self.bias_O, "add")


class PrepackedLayer(nn.Module):
    """``model.EncoderLayer`` in eval mode, and nothing but its forward pass.

    Args:
        layer: the plain one, on the CPU; it may be forgotten then.
    """

    def __init__(self, layer: EncoderLayer):
        super().__init__()
        attention, feed_forward = layer.attention, layer.feed_forward
        qkv = (attention.query, attention.key, attention.value)
        self.qkv = Linear(torch.cat([x.weight for x in qkv]), torch.cat([x.bias for x in qkv]))
        self.attend = attention.attend
        self.head_size = attention.head_size
        self.output = Linear(attention.output.weight, attention.output.bias)
        self.attention_norm = layer.attention_norm
        self.up = Linear(feed_forward.up.weight, feed_forward.up.bias)
        self.down = Linear(feed_forward.down.weight, feed_forward.down.bias)
        self.feed_forward_norm = layer.feed_forward_norm
        self.eval()

    def forward(self, x_ND: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor] | None]:
        """x (N, D) to x (N, D), and the attention maps if there are any."""
        q_NHK, k_NHK, v_NHK = self.qkv(x_ND).view(len(x_ND), 3, -1, self.head_size).unbind(1)
        context_NHK, probs = self.attend(q_NHK, k_NHK, v_NHK, layout, 0.0)
        x_ND = self.attention_norm(self.output.plus(context_NHK.flatten(1), x_ND))
        x_ND = self.feed_forward_norm(self.down.plus(self.up(x_ND, "gelu"), x_ND))
        return x_ND, probs

    def train(self, mode: bool = True) -> PrepackedLayer:
        """Only eval mode.

        Raises:
            ValueError: train mode is asked for.
        """
        if mode:
            raise ValueError("a prepacked model cannot be trained: load it anew")
        return super().train(mode)


def prepack(model: BertWithHead) -> None:
    """Replace the encoder layers of a model in eval mode by prepacked ones, one after the other.

    Where ``choose`` says that it can be done.
    """
    layers = model.bert.layers
    for i in range(len(layers)):
        layer = layers[i]
        assert isinstance(layer, EncoderLayer)
        layers[i] = PrepackedLayer(layer)
