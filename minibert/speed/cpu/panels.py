"""Linear layers, attention and add-norm by the C++ kernels. Shape legend: see model/layout.py.

Weights lie in panels of 16 outputs: (P, I / n, 16, n), where a kernel reads n inputs at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.speed.cpu.build import AVX512, BuildError, kernels
from minibert.speed.linear import TINY, LinearLayer

WIDE = 16  # outputs of a panel, as in kernels.cpp


def whole(x_O: Tensor, multiple: int = WIDE) -> Tensor:
    """A copy, filled up with zeros along the first dimension to a multiple.

    The kernels need aligned weights. torch aligns what it allocates; a parameter may lie anywhere
    in a file.
    """
    filled_O = x_O.new_zeros(-(-len(x_O) // multiple) * multiple, *x_O.shape[1:])
    filled_O[: len(x_O)] = x_O
    return filled_O


def in_panels(weight_OI: Tensor, n: int = 1) -> Tensor:
    """A weight in panels, filled up with zeros: an even number of panels where n is above 1."""
    filled_OI = F.pad(whole(weight_OI, WIDE if n == 1 else 2 * WIDE), [0, -weight_OI.shape[1] % n])
    panels_PWIn = filled_OI.unflatten(1, (-1, n)).unflatten(0, (-1, WIDE))
    return panels_PWIn.transpose(1, 2).contiguous()


def pointer(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """The address of what a kernel reads.

    Raises:
        TypeError: not contiguous, of another dtype, or not on the CPU.
    """
    if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
        wanted = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"the C++ kernels read contiguous {wanted} on the CPU, not {x.dtype} on {x.device}: "
            "use prepack=False, or leave out autocast"
        )
    return x.data_ptr()


def run(name: str, *arguments: float) -> None:
    """Call a kernel.

    Raises:
        BuildError: it cannot run on this CPU.
        MemoryError: memory is short.
    """
    kernel = kernels().get(name)
    if kernel is None:
        raise BuildError(f"{name} is for a CPU with {', '.join(AVX512)}")
    if kernel(*arguments):
        raise MemoryError(f"no memory for {name}")


class Panels(LinearLayer):
    """What the formats share.

    Attributes:
        kernel: its name.
        dtype: of x, of the result and of the weight it is made of.
        multiple: of how many inputs the kernel reads; x is filled up with zeros.
        panels: the weight.
        extra: what the kernel reads besides.

    Raises:
        TypeError: a weight that the kernels cannot read.
        ValueError: x has another width.
    """

    kernel: str
    dtype = torch.float32
    multiple = 1
    panels: Tensor
    extra: tuple[Tensor, ...] = ()

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        self.outputs, self.inputs = weight_OI.shape
        for tensor in (bias_O, weight_OI):
            pointer(tensor.detach().contiguous(), self.dtype)
        self.bias_O = whole(bias_O.detach().float())

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return self._multiply(x_NI.contiguous(), with_gelu=False)

    def gelu(self, x_NI: Tensor) -> Tensor:
        """(N, in) to (N, out), then exact (erf) GELU."""
        return self._multiply(x_NI.contiguous(), with_gelu=True)

    def _multiply(self, x_NI: Tensor, with_gelu: bool, *more: int) -> Tensor:
        rows, inputs = x_NI.shape  # len(x) takes ten times as long
        if inputs != self.inputs:
            raise ValueError(f"x has {inputs} columns, the weight {self.inputs}")
        if missing := -inputs % self.multiple:
            x_NI, inputs = F.pad(x_NI, [0, missing]), inputs + missing
        y_NO = x_NI.new_empty(rows, self.outputs)
        run(
            self.kernel,
            *(pointer(x_NI, self.dtype), rows, inputs),
            *(self.panels.data_ptr(), self.bias_O.data_ptr(), with_gelu),
            *(self.outputs, y_NO.data_ptr()),
            *[tensor.data_ptr() for tensor in self.extra],
            *more,
        )
        return y_NO


class FloatPanels(Panels):
    """x Wᵀ + b in fp32.

    Args:
        weight_OI: (out, in), float32, on the CPU.
        bias_O: (out,), float32.
    """

    what = "weights in panels for the C++ kernels"
    kernel = "multiply_fp32"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        super().__init__(weight_OI, bias_O)
        self.panels = in_panels(weight_OI.detach())


class HalfPanels(FloatPanels):
    """x Wᵀ + b with W rounded to fp16, which halves the memory traffic; the rest in fp32.

    Args:
        weight_OI: (out, in), float32, on the CPU.
        bias_O: (out,), float32.

    Raises:
        ValueError: a weight is too large for fp16.
    """

    what = "weights rounded to fp16, in panels for the C++ kernels"
    kernel = "multiply_fp16"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        super().__init__(weight_OI, bias_O)
        largest = float(torch.linalg.vector_norm(self.panels, torch.inf))
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(f"a weight of {largest:g} is too large for fp16")
        self.panels = self.panels.half()


class BytePanels(Panels):
    """x Wᵀ + b in integers, with the ranges and scales of ``ByteLinear``; exact sums in int32.

    A row that is not finite gives a row that is not finite.

    Args:
        weight_OI: (out, in), float32, on the CPU.
        bias_O: (out,), float32.
    """

    what = "products in int8 by the C++ kernels"
    kernel = "multiply_int8"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        super().__init__(weight_OI, bias_O)
        weight_OI = weight_OI.detach()
        scale_O = weight_OI.abs().amax(1).div(64).clamp_min(TINY)
        rounded_OI = weight_OI.div(scale_O[:, None]).round().to(torch.int8)
        # The kernel has x plus 128; this is what the 128 adds to a sum.
        offset_O = rounded_OI.sum(1, dtype=torch.int32) * 128
        self.extra = (whole(offset_O), whole(scale_O))
        self.panels = in_panels(rounded_OI, 4)


class Bf16Panels(Panels):
    """x Wᵀ + b in bf16 with sums, bias and GELU in fp32; on CPUs with AVX512-BF16.

    Args:
        weight_OI: (out, in), bfloat16, on the CPU.
        bias_O: (out,), bfloat16.
    """

    what = "weights in panels for the C++ kernels"
    kernel = "multiply_bf16"
    dtype = torch.bfloat16
    multiple = 2

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        super().__init__(weight_OI, bias_O)
        self.panels = in_panels(weight_OI.detach(), self.multiple)

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """(N, in) and (N, out) to (N, out): the product plus the residual, rounded once.

        Raises:
            ValueError: the residual has another shape.
        """
        if residual_NO.shape != (len(x_NI), self.outputs):
            raise ValueError(f"the residual has shape {tuple(residual_NO.shape)}")
        residual_NO = residual_NO.contiguous()
        return self._multiply(x_NI.contiguous(), False, pointer(residual_NO, self.dtype))

    def _multiply(self, x_NI: Tensor, with_gelu: bool, *residual: int) -> Tensor:
        return super()._multiply(x_NI, with_gelu, *(residual or (0,)))


def attend(qkv_N3HK: Tensor, starts: Tensor) -> Tensor:
    """Attention of packed sentences, without dropout: the context (N, D).

    Args:
        qkv_N3HK: float32, contiguous.
        starts: (B + 1,), int32, on the CPU: where each sentence starts.
    """
    N, _, H, K = qkv_N3HK.shape
    context_ND = qkv_N3HK.new_empty(N, H * K)
    run(
        "attend",
        *(pointer(qkv_N3HK), starts.data_ptr(), starts.shape[0] - 1),
        *(H, K, K**-0.5, context_ND.data_ptr()),
    )
    return context_ND


def add_norm(y_ND: Tensor, x_ND: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout) -> Tensor:
    """LayerNorm(y + x) in one pass over memory, in eval mode. Hooks on both modules do not run."""
    y_ND, x_ND = y_ND.contiguous(), x_ND.contiguous()
    out_ND = torch.empty_like(y_ND)
    run(
        "add_norm",
        *(pointer(y_ND), pointer(x_ND), pointer(norm.weight), pointer(norm.bias)),
        *(norm.eps, *y_ND.shape, out_ND.data_ptr()),
    )
    return out_ND
