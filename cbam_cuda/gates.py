"""What stands in the places of a channel gate and a spatial one that their parent applies.

In ``y = ca(x) * x; out = sa(y) * y`` a fused block takes the spatial gate's place. What the channel
gate's place gives makes y a mere mark that x has passed; the block takes that alone, and what it
gives becomes CBAM of x by the parent's own multiplication. Gates may as well be modules that apply
themselves. Whatever else a parent does with them is an error.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from .module import CBAM

_PRODUCTS = (operator.mul, torch.mul, torch.Tensor.mul)


class Passed:
    """What a parent takes for x times the channel gate: x, which only a spatial gate may see."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """No operator takes it, but for a product with a gate, which is the gate's to answer."""
        if function in _PRODUCTS:
            return NotImplemented
        raise TypeError(
            "what has passed a channel gate that cbam_cuda.convert took: expected its spatial gate "
            f"to be called with it, got {getattr(function, '__name__', function)}"
        )


class Gate:
    """What a parent takes for a gate of x: times x it is what is known to come out."""

    def __init__(self, x: Tensor | Passed, product: Tensor | Passed) -> None:
        self._x, self._product, self._learns = x, product, torch.is_grad_enabled()

    def __mul__(self, x: Any) -> Any:
        return self.times(x)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """The same where torch is asked: for a tensor on the left, and while it compiles."""
        if function not in _PRODUCTS:
            return NotImplemented
        one, other = arguments
        return one.times(other) if isinstance(one, Gate) else other.times(one)

    def times(self, x: Any) -> Any:
        """What is known, if x is the tensor that it is known of.

        Raises:
            TypeError: it is another one, as behind a hook that sees tensors on their way back.
            RuntimeError: gradients are kept where it is multiplied, but not where it was made.
        """
        if x is not self._x:
            raise TypeError(
                "a gate that cbam_cuda.convert took: expected it to be multiplied with what it "
                "was called with, got something else; or it has backward hooks"
            )
        if torch.is_grad_enabled() and not self._learns:
            raise RuntimeError("a gate that cbam_cuda.convert took: it was made under no_grad")
        return self._product


class ChannelPlace(nn.Module):
    """Where a channel gate was that its parent multiplied with x."""

    def forward(self, x: Tensor) -> Gate:
        """What is x on its way, times x."""
        return Gate(x, Passed(x))


class AppliedChannelPlace(nn.Module):
    """Where a channel gate was that applied itself."""

    def forward(self, x: Tensor) -> Passed:
        """x on its way."""
        return Passed(x)


class AppliedCBAM(CBAM):
    """A `CBAM` in the place of a spatial gate that applied itself."""

    def forward(self, x: Passed, *given: Any, **more: Any) -> Any:  # type: ignore[override]
        """As `CBAM`, of what has passed the place of the channel gate.

        Raises:
            TypeError: it is anything else.
        """
        if not isinstance(x, Passed):
            raise TypeError(
                "a spatial gate that cbam_cuda.convert took: expected what the channel gate gives "
                f"for it, got {type(x).__name__}"
            )
        return super().forward(x.x, *given, **more)


class GateCBAM(AppliedCBAM):
    """A `CBAM` in the place of a spatial gate that its parent multiplied with x."""

    def forward(self, x: Passed, *given: Any, **more: Any) -> Any:  # type: ignore[override]
        """What is CBAM of x, times x; with ``return_attention`` as `CBAM`."""
        made = super().forward(x, *given, **more)
        return made if isinstance(made, tuple) else Gate(x, made)
