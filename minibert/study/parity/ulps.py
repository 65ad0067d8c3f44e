"""The distance between two tensors: largest difference, ULPs, relative error."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors are equal, with NaN equal to NaN: bool, of their shape."""
    return (a == b) | (a.isnan() & b.isnan())


def max_abs(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite if a side is not finite where they differ."""
    if not a.numel():
        return 0.0
    gap = (a.double() - b.double()).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return gap.masked_fill(same(a, b), 0).max().item()


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance in units in the last place: the representable numbers from one to the other.

    The bits of a positive float, read as an integer, count the representable numbers above zero.
    Sign and magnitude become a signed count, so -0 is 0 and distances across zero are right.

    Args:
        a, b: the same shape and floating dtype.

    Returns:
        The distance, or -1 where one side is NaN or infinite and the other is not the same. The
        distance of float64 numbers of opposite sign may exceed int64; then it is int64's maximum.
    """
    differ = ~same(a, b)
    if not differ.any():
        return 0
    a, b = a[differ], b[differ]
    if not (a.isfinite().all() and b.isfinite().all()):
        return -1
    counts = []
    for x in (a, b):
        bits = x.contiguous().view(BITS[x.dtype]).long()
        magnitude = bits & torch.iinfo(BITS[x.dtype]).max
        counts.append(torch.where(bits < 0, -magnitude, magnitude))
    high, low = torch.maximum(*counts), torch.minimum(*counts)
    distance = high - low  # negative where it does not fit in 64 bits
    most = torch.iinfo(torch.int64).max
    return int(torch.where(distance < 0, most, distance).max())


def relative_error(x: Tensor, exact: Tensor) -> float:
    """‖x − exact‖ / ‖exact‖ in the 2-norm; infinite if x is not finite."""
    gap = torch.linalg.vector_norm(x.double() - exact.double()).item()
    size = torch.linalg.vector_norm(exact.double()).item()
    if gap != gap:
        return float("inf")
    return gap / size if size else gap
