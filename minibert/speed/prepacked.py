"""Encoder layers for inference: weights packed once in the order they are read, q, k, v joined.

The plain layers (model/encoder.py) stay the reference. Prepacked layers sum in another order, so
their last bits differ; they cannot be trained, saved or traced. Shape legend: see model/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.machine import Chosen, cpu_flags
from minibert.model.attention import AttentionFn, sdpa
from minibert.model.encoder import EncoderLayer, add_norm
from minibert.model.heads import BertWithHead, TokenClassificationHead
from minibert.model.layout import Layout, Padded
from minibert.speed.cpu import build, panels
from minibert.speed.cpu.panels import Bf16Panels, BytePanels, FloatPanels, HalfPanels, Panels
from minibert.speed.fused import starts
from minibert.speed.linear import AVX2, BlockedLinear, ByteLinear, JoinedLinear, LinearLayer

# The operations that torch.compile and torch.ao.quantization lower a linear layer to on a CPU. They
# are undocumented, so ``choose`` checks that they exist.
BLOCKED = ("mkldnn::_reorder_linear_weight", "mkldnn::_linear_pointwise")
BYTE = (
    "aten::quantize_per_channel",
    "quantized::linear_with_input_q_dq_qweight_dq_output_fp32",
    "onednn::qlinear_prepack",
    "onednn::qlinear_pointwise",
)

Linear = type[LinearLayer]


def avx512_kernels(flags: frozenset[str]) -> bool:
    """Whether the C++ kernels multiply bf16 and int8 on a CPU with these flags and AVX512.

    With AMX they were not measured: it is left to oneDNN.
    """
    return flags.issuperset(build.AVX512) and "amx_int8" not in flags


AVX512_KERNELS = avx512_kernels(cpu_flags())


def choose(
    device: torch.device, dtype: torch.dtype, may_round: bool = False
) -> Chosen[Linear | None]:
    """The prepacked linear layer for inference, or None where plain layers are used.

    Args:
        device: where the model runs.
        dtype: of its parameters.
        may_round: the weights may be rounded, because the dtype was not requested explicitly.
    """
    if device.type == "cuda":
        return Chosen(JoinedLinear, "one product gives q, k and v")
    if device.type != "cpu":
        return Chosen(None, "only CPU products pack weights in every call")
    found: Chosen[Linear | None] | None = None
    if AVX2 and dtype == torch.float32 and may_round:
        found = Chosen(HalfPanels, "C++ kernels read weights in fp16 and multiply in fp32")
    elif AVX2 and dtype == torch.float32:
        found = Chosen(FloatPanels, "C++ kernels read weights that are packed once")
    elif AVX512_KERNELS and dtype == torch.bfloat16:
        found = Chosen(Bf16Panels, "C++ kernels read weights that are packed once")
    obstacle = build.obstacle() if found else None
    if found and not obstacle:
        return found
    if not torch.backends.mkldnn.is_available():
        return Chosen(None, "torch was built without oneDNN")
    for name in BLOCKED:
        if not _is_there(name):
            return Chosen(None, f"torch {torch.__version__} has no {name}")
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if not supported.get(dtype, False):
        return Chosen(None, f"oneDNN does not multiply {dtype} on this CPU")
    reason = "oneDNN reads weights that are packed once"
    return Chosen(BlockedLinear, reason + _without_kernels(obstacle))


def choose_int8(device: torch.device) -> Chosen[Linear | None]:
    """The linear layer for int8, or None where it cannot run.

    Args:
        device: where the model runs.
    """
    if device.type != "cpu":
        return Chosen(None, f"int8 runs on a CPU, not on {device.type}")
    by_kernels = AVX2 or AVX512_KERNELS
    obstacle = build.obstacle() if by_kernels else None
    if by_kernels and not obstacle:
        return Chosen(BytePanels, "C++ kernels multiply int8 and sum in int32")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return Chosen(None, "torch was built without FBGEMM, or the CPU has no AVX2")
    for name in BYTE:
        if not _is_there(name):
            return Chosen(None, f"torch {torch.__version__} has no {name}")
    reason = "FBGEMM and oneDNN multiply int8 and sum in int32"
    return Chosen(ByteLinear, reason + _without_kernels(obstacle))


def _without_kernels(obstacle: str | None) -> str:
    return f"; the C++ kernels cannot run: {obstacle}" if obstacle else ""


def _is_there(operation: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operation, "CPU")
    except RuntimeError:  # no such operation at all
        return False


def _by_parts(
    attend: AttentionFn, qkv_N3HK: Tensor, layout: Layout
) -> tuple[Tensor, list[Tensor] | None]:
    """Attention of one (N, 3, H, K) product: the context (N, D), and the maps if there are any."""
    q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
    context_NHK, probs = attend(q_NHK, k_NHK, v_NHK, layout, 0.0)
    return context_NHK.flatten(1), probs


def _sdpa(qkv_N3HK: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor] | None]:
    """``_by_parts(sdpa, ...)`` with half as many views, which took 5 % of one sentence's time."""
    blocks = layout.blocks
    sizes = [block.rows * block.length for block in blocks]
    contexts = []
    for block, part in zip(blocks, qkv_N3HK.split(sizes) if len(blocks) > 1 else [qkv_N3HK]):
        qkv_BS3HK = part.view(block.rows, block.length, *part.shape[1:])
        q_BHSK, k_BHSK, v_BHSK = qkv_BS3HK.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if block.valid_BS is None else block.valid_BS[:, None, None, :]
        context_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask)
        contexts.append(context_BHSK.transpose(1, 2).reshape(len(part), -1))
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts), None


def _kernels(qkv_N3HK: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor] | None]:
    """``_sdpa`` by the C++ kernels, where there is no padding."""
    if isinstance(layout, Padded) and layout.valid_BS is not None:
        return _sdpa(qkv_N3HK, layout)
    return panels.attend(qkv_N3HK, starts(layout, qkv_N3HK.device)), None


class PrepackedLayer(nn.Module):
    """The forward pass of an ``EncoderLayer`` in eval mode.

    Args:
        layer: the plain layer; not needed afterwards.
        linear: from ``choose`` or ``choose_int8`` for its device.
    """

    def __init__(self, layer: EncoderLayer, linear: Linear):
        super().__init__()
        attention, feed_forward = layer.attention, layer.feed_forward
        qkv = (attention.query, attention.key, attention.value)
        self.qkv = linear(torch.cat([x.weight for x in qkv]), torch.cat([x.bias for x in qkv]))
        by_kernels = issubclass(linear, Panels) and linear.dtype == torch.float32
        fast = _kernels if by_kernels else _sdpa
        self.attend = fast if attention.attend is sdpa else partial(_by_parts, attention.attend)
        self.head_size = attention.head_size
        self.output = linear(attention.output.weight, attention.output.bias)
        self.attention_norm = layer.attention_norm
        self.is_gelu = feed_forward.activation is F.gelu
        self.up = linear(feed_forward.up.weight, feed_forward.up.bias)
        self.down = linear(feed_forward.down.weight, feed_forward.down.bias)
        self.feed_forward_norm = layer.feed_forward_norm
        self.add_norm = panels.add_norm if by_kernels else layer.add_norm
        self.dropout = layer.dropout
        self.eval()

    def forward(self, x_ND: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor] | None]:
        """x (N, D) to x (N, D), and the attention maps if there are any."""
        qkv_N3HK = self.qkv(x_ND).view(x_ND.shape[0], 3, -1, self.head_size)
        context_ND, probs = self.attend(qkv_N3HK, layout)
        x_ND = self._add_norm(self.output, context_ND, x_ND, self.attention_norm)
        up_NF = self.up.gelu(x_ND) if self.is_gelu else self.up(x_ND).relu_()
        return self._add_norm(self.down, up_NF, x_ND, self.feed_forward_norm), probs

    def _add_norm(
        self, linear: LinearLayer, y_NI: Tensor, x_ND: Tensor, norm: nn.LayerNorm
    ) -> Tensor:
        if self.add_norm is add_norm:
            return norm(linear.plus(y_NI, x_ND))  # one pass less: the product adds x
        return self.add_norm(linear(y_NI), x_ND, norm, self.dropout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrepackedLayer:
        """What ``to``, ``half``, ``cuda`` and the like call on every module.

        Raises:
            ValueError: the packed weights would have to change.
        """
        before = self.attention_norm.weight
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise ValueError(
                f"prepacked weights cannot change from {before.dtype} on {before.device} to "
                f"{after.dtype} on {after.device}: load the Tagger with that dtype and device, or "
                "with prepack=False"
            )
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> PrepackedLayer:
        """Only eval mode.

        Raises:
            ValueError: ``mode`` is True.
        """
        if mode:
            raise ValueError("a prepacked model cannot be trained: load it with from_pretrained")
        return super().train(mode)


UNROUNDED: dict[Linear, Linear] = {
    HalfPanels: FloatPanels,
    BytePanels: FloatPanels,
    ByteLinear: BlockedLinear,
}


class PrepackedClassifier(nn.Module):
    """The classifier. MKL would sum in another order where there are few rows."""

    def __init__(self, classifier: nn.Linear, linear: Linear):
        super().__init__()
        self.linear = linear(classifier.weight, classifier.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to scores (N, L)."""
        return self.linear(x_ND)


def runs_kernels(model: BertWithHead) -> bool:
    """Whether the C++ kernels multiply, for which no number of rows is better than another."""
    layer = model.bert.layers[0]
    return isinstance(layer, PrepackedLayer) and isinstance(layer.qkv, Panels)


def prepack(model: BertWithHead, linear: Linear = BlockedLinear) -> None:
    """Replace the encoder layers of a model in eval mode with prepacked ones.

    On a CPU also the classifier. No parameter takes a gradient any more.

    Args:
        model: where it will run.
        linear: from ``choose`` or ``choose_int8`` for its device.

    Raises:
        ValueError: a weight is too large for the linear layer's format.
    """
    layers = model.bert.layers
    for i, layer in enumerate(layers):
        if isinstance(layer, EncoderLayer):  # not yet prepacked, as while loading
            layers[i] = PrepackedLayer(layer, linear)
    if isinstance(model.head, TokenClassificationHead) and linear is not JoinedLinear:
        classifier = PrepackedClassifier(model.head.classifier, UNROUNDED.get(linear, linear))
        model.head.classifier = classifier  # type: ignore[assignment]  # it takes the same calls
    # The last to be converted: an error of the layers then leaves the whole model as it was.
    embeddings = model.bert.embeddings
    del model.bert.embeddings
    model.bert.embeddings = embeddings
    model.requires_grad_(False)
