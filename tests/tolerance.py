"""The one rule for how far a result may be from the truth.

The truth is the reference in float64. A result may be off by a small multiple of what plain PyTorch
itself is off by in the same dtype on the same input, plus a few roundings of the largest value. In
float64 eager is the truth, roundings and all, and its error cannot be seen: there a fixed number of
roundings stands for it. Of a few elements that error is one draw of the dice, and another on every
processor: where sums cancel, eager makes them in two orders, and the larger error counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Two strategies of one backend may be so many roundings apart: both sum in float32, and round to
# 16 bits what comes out and, in the forward, the maps.
BETWEEN_STRATEGIES = {torch.float32: 32.0, torch.float16: 2.0, torch.bfloat16: 2.0}
MULTIPLE_OF_EAGER = 3.0
ROUNDINGS = 16.0
ROUNDINGS_FLOAT64 = 1000.0


def allowed_error(eager: Tensor, truth: Tensor) -> float:
    """The largest absolute error that a result in eager's dtype may have."""
    if truth.numel() == 0:
        return 0.0
    rounding = torch.finfo(eager.dtype).eps * truth.abs().max().item()
    if eager.dtype == torch.float64:
        return ROUNDINGS_FLOAT64 * rounding
    eager_error = (eager.double() - truth).abs().max().item()
    return MULTIPLE_OF_EAGER * eager_error + ROUNDINGS * rounding


def assert_as_good_as_eager(
    name: str, result: Tensor, eager: Tensor, truth: Tensor, reordered: Tensor | None = None
) -> None:
    """Fail unless `result` keeps to the rule; shapes and dtypes are eager's.

    `reordered` is what eager gives where it sums in another order.
    """
    assert result.shape == eager.shape, (name, result.shape, eager.shape)
    assert result.dtype == eager.dtype, (name, result.dtype, eager.dtype)
    if truth.numel() == 0:
        return
    truth = truth.to(result.device)
    error = (result.double() - truth).abs().max().item()
    draws = (t.to(result.device) for t in (eager, reordered) if t is not None)
    allowed = max(allowed_error(draw, truth) for draw in draws)
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"


def assert_norm_as_good_as_eagers(name: str, result: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The rule for the norm of the error: for what may differ much in a few places."""
    error, of_eager = ((t.double() - truth).norm().item() for t in (result, eager))
    rounding = torch.finfo(eager.dtype).eps * truth.norm().item()
    allowed = MULTIPLE_OF_EAGER * of_eager + ROUNDINGS * rounding
    assert error <= allowed, f"{name}: norm off by {error:.3e}, allowed {allowed:.3e}"


def assert_strategies_agree(name: str, one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    """Fail where two strategies choose other positions, or leave values that are far apart; `dtype`
    is what they are rounded to."""
    if one.dtype == torch.int32:
        assert torch.equal(one, other), name
        return
    far = BETWEEN_STRATEGIES[dtype] * torch.finfo(dtype).eps
    torch.testing.assert_close(one, other, rtol=far, atol=far, equal_nan=True)
