"""What is wrong with a call's arguments, in the terms of who made it.

Each error names the argument, what was expected and what came, whatever backend the call ends in.
Tracing and the plain form check before they run. The compiled operators refuse all that is refused
here, in fewer words; a call that one of them refused is explained from here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Positions of maxima are kept in 32 bits. (All of x may have more elements.)
MOST_POSITIONS = 2**31 - 1
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Weights(NamedTuple):
    """CBAM's weights for C channels, R hidden channels and D spatial dimensions."""

    fc1_weight: Tensor  # [R, C, 1 * D] or [R, C]
    fc1_bias: Tensor | None  # [R]
    fc2_weight: Tensor  # [C, R, 1 * D] or [C, R]
    fc2_bias: Tensor | None  # [C]
    conv_weight: Tensor  # [1, 2, odd * D]
    conv_bias: Tensor | None  # [1]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sizes(NamedTuple):
    """Of the layers of a module."""

    hidden: int  # channels
    kernel: tuple[int, ...]  # a size for each dimension of space


def check_sizes(
    in_channels: object, ratio: object, kernel_size: object, dim: object, hidden: object = None
) -> Sizes:
    """The sizes of a module's layers; raise if there can be no such module."""
    channels = _positive("in_channels", in_channels)
    by_ratio = channels // _positive("ratio", ratio)
    if by_ratio == 0 and hidden is None:
        raise ValueError(
            f"ratio: expected at most in_channels ({channels}), got {ratio}, "
            "which leaves no hidden channel"
        )
    dimensions = _positive("dim", dim)
    if dimensions > 3:
        raise ValueError(f"dim: expected 1, 2 or 3, got {dim}")
    given: Sequence[object] = (kernel_size,) * dimensions
    if isinstance(kernel_size, Sequence) and not isinstance(kernel_size, str):
        given = kernel_size
    if len(given) != dimensions:
        raise ValueError(
            f"kernel_size: expected an int, or one for each of {dimensions} dimensions of space, "
            f"got {kernel_size}"
        )
    kernel = tuple(_positive("kernel_size", size) for size in given)
    if any(size % 2 == 0 for size in kernel):
        raise ValueError(f"kernel_size: expected odd numbers, got {kernel_size}")
    return Sizes(by_ratio if hidden is None else _positive("hidden", hidden), kernel)


def _positive(name: str, value: Any) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return number


def check_spatial_dimensions(x: object, dim: int) -> None:
    """Raise if x is a tensor for another number of spatial dimensions than the module's."""
    if isinstance(x, Tensor) and x.dim() != dim + 2:
        raise ValueError(
            f"x: expected [samples, channels, *space] with {dim} spatial dimensions, "
            f"got shape {list(x.shape)}"
        )


def check_x(x: Tensor, channels: int) -> None:
    """Raise unless x is real floating and has so many channels."""
    _check_strided("x", x)
    _check_dtype(x)
    if x.shape[1] != channels:
        raise ValueError(f"x: expected {channels} channels, got shape {list(x.shape)}")


def check_tensors(x: object, weights: Sequence[object]) -> None:
    """Raise unless x and the weights are tensors, biases possibly None, and x is real floating."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    _check_strided("x", x)
    for name, value in zip(Weights._fields, weights, strict=True):
        if value is None and name.endswith("_bias"):
            continue
        if isinstance(value, Tensor):
            _check_strided(name, value)
            continue
        wanted = "a Tensor or None" if name.endswith("_bias") else "a Tensor"
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    _check_dtype(x)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {_name(x.dtype)}")


def _check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")


def check_call(x: Tensor, weights: Weights, residual: Tensor | None = None) -> None:
    """Raise unless shapes, dtypes and devices of x, the weights and the residual fit."""
    dim = x.dim() - 2
    if dim not in (1, 2, 3):
        raise ValueError(
            "x: expected [samples, channels, *space] with 1, 2 or 3 spatial dimensions, "
            f"got shape {list(x.shape)}"
        )
    channels = x.shape[1]
    if channels == 0 or 0 in x.shape[2:]:
        raise ValueError(
            f"x: expected at least one channel and one position in space, got shape {list(x.shape)}"
        )
    # A graph for any sizes has no such limit to show: its operators have.
    # Multiplied one by one, as numel() of torch 2.11 makes numbers of symbols.
    if not torch.compiler.is_compiling() and math.prod(x.shape[2:]) >= MOST_POSITIONS:
        raise ValueError(
            f"x: expected fewer than {MOST_POSITIONS} positions in space, got shape {list(x.shape)}"
        )
    _check_shapes(channels, dim, weights)

    if residual is not None:
        check_residual(x, residual)

    dtype = weights.fc1_weight.dtype
    if dtype != x.dtype and not (dtype == torch.float32 and x.dtype != torch.float64):
        allowed = _name(x.dtype)
        if accumulator_dtype(x.dtype) != x.dtype:
            allowed += " (the dtype of x) or float32"
        raise TypeError(f"fc1_weight: expected {allowed}, got {_name(dtype)}")
    for name, tensor in zip(Weights._fields, weights, strict=True):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(
                f"{name}: expected {_name(dtype)}, the dtype of fc1_weight, "
                f"got {_name(tensor.dtype)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, that of x, got {tensor.device}")


def is_cast(x: Tensor) -> bool:
    """Whether there is an autocast that concerns x."""
    left_alone = x.is_meta or x.dtype == torch.float64 or x.dtype not in DTYPES
    return not left_alone and torch.is_autocast_enabled(x.device.type)


def dtype_of_out(x: Tensor) -> torch.dtype:
    """The dtype in which the plain form leaves x, under autocast if there is one."""
    if not is_cast(x):
        return x.dtype
    return torch.promote_types(x.dtype, torch.get_autocast_dtype(x.device.type))


def check_residual(x: Tensor, residual: object) -> None:
    """Raise unless a residual can be added to what x becomes, and leaves it its dtype."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a Tensor or None, got {type(residual).__name__}")
    _check_strided("residual", residual)
    if residual.shape != x.shape:
        raise _shape_error("residual", list(x.shape), residual)
    out = dtype_of_out(x)
    if residual.dtype not in DTYPES or torch.promote_types(residual.dtype, out) != out:
        raise TypeError(
            f"residual: expected {_name(out)}, the dtype of out, or one that a sum widens to it, "
            f"got {_name(residual.dtype)}"
        )
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device}, that of x, got {residual.device}")


def _check_shapes(channels: int, dim: int, weights: Weights) -> None:
    ones = (1,) * dim
    fc1 = weights.fc1_weight.shape
    if len(fc1) not in (2, dim + 2) or fc1[1] != channels or fc1[2:].numel() != 1:
        raise ValueError(
            f"fc1_weight: expected [hidden, {channels}] or [hidden, {channels}{', 1' * dim}] for x "
            f"with {channels} channels, got shape {list(fc1)}"
        )
    hidden = fc1[0]
    if hidden == 0:
        raise ValueError("fc1_weight: expected at least one hidden channel, got 0")
    fc2 = weights.fc2_weight.shape
    if fc2 != (channels, hidden, *ones) and fc2 != (channels, hidden):
        raise _shape_error("fc2_weight", [channels, hidden, *ones], weights.fc2_weight)
    conv = weights.conv_weight.shape
    if len(conv) != dim + 2 or conv[0] != 1 or conv[1] != 2:
        raise ValueError(
            f"conv_weight: expected [1, 2{', odd' * dim}] for x with {dim} spatial dimensions, "
            f"got shape {list(conv)}"
        )
    for size in conv[2:]:
        if size % 2 == 0:
            raise ValueError(f"conv_weight: expected odd kernel sizes, got {list(conv[2:])}")
    for name, length in (("fc1_bias", hidden), ("fc2_bias", channels), ("conv_bias", 1)):
        bias = getattr(weights, name)
        if bias is not None and bias.shape != (length,):
            raise _shape_error(name, [length], bias)


def _shape_error(name: str, expected: list[int], got: Tensor) -> ValueError:
    return ValueError(f"{name}: expected shape {expected}, got {list(got.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
