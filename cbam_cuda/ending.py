"""What follows a block and is done in its last pass: a residual that is added, and a ReLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ending(NamedTuple):
    """relu(block + residual), or one of both, or nothing: as the operators take it."""

    residual: Tensor | None = None  # like x, in out's dtype
    relu: bool = False

    @property
    def arguments(self) -> tuple[Tensor | None, str | None]:
        """As `ending_of` takes them."""
        return self.residual, "relu" if self.relu else None


NO_ENDING = Ending()


def ending_of(residual: Tensor | None, activation: str | None) -> Ending:
    """What follows the block, by a call's arguments.

    Raises:
        ValueError: there is no such activation.
    """
    if residual is None and activation is None:
        return NO_ENDING
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return Ending(residual, activation is not None)


def before_relu(grad: Tensor | None, out: Tensor | None) -> Tensor | None:
    """The gradient of what a ReLU made `out` of; that of out where none did, without `out`."""
    if grad is None or out is None:
        return grad
    return torch.ops.aten.threshold_backward.default(grad, out, 0)  # type: ignore[no-any-return]
