"""The compiled dropout + residual + LayerNorm against the plain one."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from minibert.kernels import pointwise

HIDDEN = 48


def both_ways(dropout_p: float, tokens: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Result and gradients of the plain function in float64, in ``dtype``, and of the compiled."""
    torch.manual_seed(0)
    shapes = [(tokens, HIDDEN), (tokens, HIDDEN), (HIDDEN,), (HIDDEN,)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    d_output = torch.randn(tokens, HIDDEN).to(dtype)
    results = []
    for function, kind in (
        (pointwise.dropout_add_norm, torch.float64),
        (pointwise.dropout_add_norm, dtype),
        (pointwise.compiled_dropout_add_norm(), dtype),
    ):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        torch.manual_seed(1)
        output = function(*leaves, 1e-12, dropout_p)
        output.backward(d_output.to(kind))
        results.append([output.detach(), *(x.grad for x in leaves)])
    return results


@pytest.mark.slow  # inductor takes half a minute to start
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_as_exact_as_plain(dropout_p: float, dtype: torch.dtype) -> None:
    """Error against float64 at most twice the plain function's, and never bits of another mask."""
    with torch._inductor.config.patch(fallback_random=True):  # torch's masks, to compare
        pointwise.compiled_dropout_add_norm.cache_clear()
        for tokens in (33, 70):  # one compilation for both
            exact, plain, compiled = both_ways(dropout_p, tokens, dtype)
            for want, reference, got in zip(exact, plain, compiled):
                allowed = 2 * (reference - want).abs().max() + 1e-5
                assert (got - want).abs().max() <= allowed
        pointwise.compiled_dropout_add_norm.cache_clear()


def test_one_compilation_serves_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pointwise.dropout_add_norm, dynamic=True, backend=counter)
    weight, bias = torch.ones(HIDDEN), torch.zeros(HIDDEN)
    compiled_after = []
    for tokens in (5, 17, 400):
        x = torch.randn(tokens, HIDDEN)
        compiled(x, torch.randn(tokens, HIDDEN), weight, bias, 1e-12, 0.1)
        compiled_after.append(counter.frame_count)
    assert compiled_after[0] > 0
    assert compiled_after == compiled_after[:1] * 3
