"""Encoder layers for inference: weights packed once in the order the GEMM reads, q, k, v joined.

On a CPU a GEMM library reads a weight in blocks that fit the vector registers. Given a plain (out,
in) matrix it packs it in every call; for one sentence of 12 word-pieces, packing takes longer than
the products. Here the weights are packed once, and q, k and v are one product.

``BlockedLinear``  oneDNN, in fp32, bf16 or fp16
``HalfLinear``     FBGEMM: weights rounded to fp16, products in fp32; for CPUs without bf16
``JoinedLinear``   torch's product, for a GPU, which packs nothing: only q, k and v are joined
``ByteLinear``     FBGEMM and oneDNN: weights and activations in int8; only where it is requested

The plain layers (model/encoder.py) stay the reference. Prepacked layers sum in another order, so
their last bits differ; they cannot be trained, saved or traced. Shape legend: see model/layout.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.machine import Chosen
from minibert.model.attention import AttentionFn, sdpa
from minibert.model.encoder import EncoderLayer, add_norm
from minibert.model.heads import BertWithHead, TokenClassificationHead
from minibert.model.layout import Layout

# The operations that torch.compile and torch.ao.quantization lower a linear layer to on a CPU. They
# are undocumented, so ``choose`` checks that they exist.
BLOCKED = ("mkldnn::_reorder_linear_weight", "mkldnn::_linear_pointwise")
HALF = ("quantized::linear_prepack_fp16", "quantized::linear_dynamic_fp16")
BYTE = (
    "aten::quantize_per_channel",
    "quantized::linear_with_input_q_dq_qweight_dq_output_fp32",
    "onednn::qlinear_prepack",
    "onednn::qlinear_pointwise",
)

# Measured on an AMD EPYC (Zen 3) with AVX2 alone, 2026-11-25: oneDNN's erf GELU takes five times as
# long as torch's.
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"

TINY = torch.finfo(torch.float32).tiny  # the least scale: a constant row has no range to divide by

# Above 2^23 neighbouring float32 numbers differ by 1: adding this to a number rounds it to the
# nearest even integer, and leaves that integer plus 128 in the last byte.
ROUNDING = 1.5 * 2**23 + 128


def _gelu(x_NF: Tensor) -> Tensor:
    """GELU in place: allocating a second tensor of this size costs page faults."""
    return torch.ops.aten.gelu_.default(x_NF)


class BlockedLinear:
    """x Wᵀ + b by oneDNN with packed W.

    MKL with a plain W beats it in fp32 at 2048 rows (157 against 140 GFLOP/s on that CPU), not at
    12 (48 against 78). It is not used: where two libraries share the work by the number of rows, a
    sentence's bits depend on its batch.

    Args:
        weight_OI: (out, in), float32, bfloat16 or float16, on the CPU.
        bias_O: (out,), the same dtype.
    """

    what = "weights packed for oneDNN"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach())
        self.bias_O = bias_O.detach()

    def __reduce__(self) -> tuple:
        """Copy and pickle as the plain weight: packed memory has a format of this CPU."""
        return type(self), (self.blocks.to_dense(), self.bias_O)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        linear = torch.ops.mkldnn._linear_pointwise.default
        return linear(x_NI, self.blocks, self.bias_O, "none", [], "none")

    def gelu(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out), then exact (erf) GELU."""
        if AVX2:
            return _gelu(self(x_NI))
        linear = torch.ops.mkldnn._linear_pointwise.default
        return linear(x_NI, self.blocks, self.bias_O, "gelu", [], "none")

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product plus the residual."""
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(x_NI, residual_NO, self.blocks, self.bias_O, "add")


class HalfLinear:
    """x Wᵀ + b by FBGEMM: W rounded to fp16, which halves the memory traffic; the rest in fp32.

    On the CPU named above: 149 GFLOP/s at 2048 rows, 104 at 12. FBGEMM cuts the rows into groups of
    up to six. Groups of one and two sum in another order; a multiple of three rows has none.

    Args:
        weight_OI: (out, in), float32, on the CPU.
        bias_O: (out,), float32.

    Raises:
        ValueError: a weight is too large for fp16.
    """

    what = "weights rounded to fp16 and packed for FBGEMM"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        largest = float(torch.linalg.vector_norm(weight_OI.detach(), torch.inf))
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(f"a weight of {largest:g} is too large for fp16")
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight_OI.detach(), bias_O.detach())

    def __reduce__(self) -> tuple:
        """Copy and pickle as the plain weight, of which nothing more is rounded."""
        return type(self), torch.ops.quantized.linear_unpack_fp16(self.packed)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return torch.ops.quantized.linear_dynamic_fp16.default(x_NI, self.packed)

    def gelu(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out), then GELU."""
        return _gelu(self(x_NI))

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product plus the residual."""
        return self(x_NI).add_(residual_NO)


class ByteLinear:
    """x Wᵀ + b in integers: W and x rounded to int8, sums exact in int32.

    Each row of W and of x has a scale, so a word-piece's result depends on nothing else in its
    batch. Integers are -127 to 127 for x and -64 to 64 for W. AVX2's vpmaddubsw takes x plus 128 as
    an unsigned byte and adds two products in 16 bits, which hold 2 · 255 · 64. Newer instructions
    could take larger ones, but then the labels would depend on the kind of CPU. Rows of x have the
    larger outliers, so x has the eighth bit.

    FBGEMM multiplies few rows faster, oneDNN many. They get the same integers, so their results
    have the same bits.

    Args:
        weight_OI: (out, in), float32, on the CPU.
        bias_O: (out,), float32.
    """

    what = "products in int8 by FBGEMM and oneDNN"
    many = 192  # rows from which on oneDNN is faster
    part = 252  # rows that are rounded together: three passes that find them in the cache

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        weight_OI = weight_OI.detach()
        self.scale_O = weight_OI.abs().amax(1).div(64).float().clamp_min(TINY)
        self.zero_O = torch.zeros_like(self.scale_O, dtype=torch.int32)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():
                # Once torch drops its quantised tensors, ``choose_int8`` says so.
                warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
                rounded_OI = torch.quantize_per_channel(
                    weight_OI.float(), self.scale_O.double(), self.zero_O, 0, torch.qint8
                )
            self.packed = torch.ops.quantized.linear_prepack(rounded_OI)
        finally:
            torch.backends.quantized.engine = before
        self.bias_O, self.tiny = bias_O.detach(), self.scale_O.new_tensor(TINY)

    def _rounded(self) -> Tensor:
        """The integers (out, in)."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()

    @cached_property
    def blocks(self) -> Tensor:
        """The weights for oneDNN, made when many rows come first: one sentence needs none."""
        rounded_OI = self._rounded()
        return torch.ops.onednn.qlinear_prepack(rounded_OI, [2016, rounded_OI.shape[1]])

    def __reduce__(self) -> tuple:
        """Copy and pickle as the rounded weight, in float64, which holds its numbers exactly."""
        return type(self), (self._rounded() * self.scale_O.double().unsqueeze(1), self.bias_O)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out). A row that is not finite gives a row that is not finite."""
        y_NO, scale_N1 = self._few(x_NI) if len(x_NI) < self.many else self._many(x_NI)
        return torch.addcmul(self.bias_O, y_NO, scale_N1, out=y_NO)

    def _few(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        scaled_NI, scale_N1 = self._scaled(x_NI)
        linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        return linear(scaled_NI.round_(), 1.0, 128, self.packed), scale_N1

    def _many(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        unsigned_NI = torch.empty_like(x_NI, dtype=torch.uint8)
        scale_N1 = x_NI.new_empty(len(x_NI), 1)
        for x, unsigned, scale in zip(*(t.split(self.part) for t in (x_NI, unsigned_NI, scale_N1))):
            scaled, scale[:] = self._scaled(x)
            unsigned.copy_(scaled.add_(ROUNDING).view(torch.int32))
        y_NO = torch.ops.onednn.qlinear_pointwise.default(
            *(unsigned_NI, 1.0, 128),
            *(self.blocks, self.scale_O, self.zero_O),
            *(None, 1.0, 0, torch.float32, "none", [], ""),  # no bias, a float32 sum, nothing fused
        )
        return y_NO, scale_N1

    def _scaled(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, divided by their scales into -127 to 127, and the scales (N, 1)."""
        buffer_NI = x_NI.abs()
        # One operation in place of a division and a clamp: a row of zeros has a scale too.
        scale_N1 = torch.add(self.tiny, buffer_NI.amax(1, keepdim=True), alpha=1 / 127)
        return torch.div(x_NI, scale_N1, out=buffer_NI), scale_N1

    def gelu(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out), then GELU."""
        return _gelu(self(x_NI))

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product plus the residual."""
        return self(x_NI).add_(residual_NO)


class JoinedLinear:
    """x Wᵀ + b by torch.

    Args:
        weight_OI: (out, in), floating point, on any device.
        bias_O: (out,), the same dtype.
    """

    what = "q, k and v in one product"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        self.weight_OI, self.bias_O = weight_OI.detach(), bias_O.detach()

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return F.linear(x_NI, self.weight_OI, self.bias_O)

    def gelu(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out), then exact (erf) GELU."""
        return _gelu(self(x_NI))

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product plus the residual."""
        return self(x_NI).add_(residual_NO)


LinearLayer = BlockedLinear | HalfLinear | ByteLinear | JoinedLinear
Linear = type[BlockedLinear] | type[HalfLinear] | type[ByteLinear] | type[JoinedLinear]


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
    if not torch.backends.mkldnn.is_available():
        return Chosen(None, "torch was built without oneDNN")
    for name in BLOCKED:
        if not _is_there(name):
            return Chosen(None, f"torch {torch.__version__} has no {name}")
    if may_round and AVX2 and dtype == torch.float32 and all(map(_is_there, HALF)):
        reason = "FBGEMM reads weights in fp16 and multiplies in fp32, fastest with AVX2 alone"
        return Chosen(HalfLinear, reason)
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if not supported.get(dtype, False):
        return Chosen(None, f"oneDNN does not multiply {dtype} on this CPU")
    return Chosen(BlockedLinear, "oneDNN reads weights that are packed once")


def choose_int8(device: torch.device) -> Chosen[Linear | None]:
    """``ByteLinear``, or None where int8 cannot run.

    Args:
        device: where the model runs.
    """
    if device.type != "cpu":
        return Chosen(None, f"int8 runs on a CPU, not on {device.type}")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return Chosen(None, "torch was built without FBGEMM, or the CPU has no AVX2")
    for name in BYTE:
        if not _is_there(name):
            return Chosen(None, f"torch {torch.__version__} has no {name}")
    return Chosen(ByteLinear, "FBGEMM and oneDNN multiply int8 and sum in int32")


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
        self.attend = _sdpa if attention.attend is sdpa else partial(_by_parts, attention.attend)
        self.head_size = attention.head_size
        self.output = linear(attention.output.weight, attention.output.bias)
        self.attention_norm = layer.attention_norm
        self.is_gelu = feed_forward.activation is F.gelu
        self.up = linear(feed_forward.up.weight, feed_forward.up.bias)
        self.down = linear(feed_forward.down.weight, feed_forward.down.bias)
        self.feed_forward_norm = layer.feed_forward_norm
        self.add_norm, self.dropout = layer.add_norm, layer.dropout
        self.eval()

    def forward(self, x_ND: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor] | None]:
        """x (N, D) to x (N, D), and the attention maps if there are any."""
        qkv_N3HK = self.qkv(x_ND).view(len(x_ND), 3, -1, self.head_size)
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


class PrepackedClassifier(nn.Module):
    """The classifier by oneDNN. MKL would sum in another order where there are few rows."""

    def __init__(self, classifier: nn.Linear):
        super().__init__()
        self.linear = BlockedLinear(classifier.weight, classifier.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Hidden states (N, D) to scores (N, L)."""
        return self.linear(x_ND)


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
        classifier = PrepackedClassifier(model.head.classifier)
        model.head.classifier = classifier  # type: ignore[assignment]  # it takes the same calls
    # The last to be converted: an error of the layers then leaves the whole model as it was.
    embeddings = model.bert.embeddings
    del model.bert.embeddings
    model.bert.embeddings = embeddings
    model.requires_grad_(False)
