"""Linear layers for inference by torch's libraries, with weights packed once.

On a CPU a GEMM library reads a weight in blocks that fit the vector registers. Given a plain (out,
in) matrix it packs it in every call; for one sentence of 12 word-pieces, packing takes longer than
the products.

``BlockedLinear``  oneDNN, in fp32, bf16 or fp16
``JoinedLinear``   torch's product, for a GPU, which packs nothing: only q, k and v are joined
``ByteLinear``     FBGEMM and oneDNN: weights and activations in int8; only where it is requested

speed/cpu/panels.py has those of the project's C++ kernels. Shape legend: see model/layout.py.
"""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# With AVX2 alone the C++ kernels are the fastest, and torch's erf GELU takes a fifth of the time of
# oneDNN's (AMD EPYC, Zen 3, 2026-11-25).
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"

TINY = torch.finfo(torch.float32).tiny  # the least scale: a constant row has no range to divide by

# Above 2^23 neighbouring float32 numbers differ by 1: adding this to a number rounds it to the
# nearest even integer, and leaves that integer plus 128 in the last byte.
ROUNDING = 1.5 * 2**23 + 128


class LinearLayer:
    """x Wᵀ + b with a packed W, made of ``weight_OI`` (out, in) and ``bias_O`` (out,)."""

    what: str  # for ``minibert info`` and the line on the terminal

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        raise NotImplementedError

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        raise NotImplementedError

    def gelu(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out), then exact (erf) GELU."""
        # In place: allocating a second tensor of this size costs page faults.
        return torch.ops.aten.gelu_.default(self(x_NI))

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product plus the residual."""
        return self(x_NI).add_(residual_NO)


class BlockedLinear(LinearLayer):
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
            return super().gelu(x_NI)
        linear = torch.ops.mkldnn._linear_pointwise.default
        return linear(x_NI, self.blocks, self.bias_O, "gelu", [], "none")

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product plus the residual."""
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(x_NI, residual_NO, self.blocks, self.bias_O, "add")


class ByteLinear(LinearLayer):
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


class JoinedLinear(LinearLayer):
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
