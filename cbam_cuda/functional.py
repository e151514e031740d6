"""`cbam`: validates, casts as autocast would, calls the operator of the backend that is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn, overload

import torch
import torch.fx
from torch import Tensor, nn

from . import ops, ops_normalised, reference, training, training_normalised
from .arguments import (
    Weights,
    accumulator_dtype,
    check_call,
    check_residual,
    check_tensors,
    dtype_of_out,
    is_cast,
)
from .choice import choose, take_plain_form
from .ending import Ending, ending_of
from .norm import fold, known
from .training import below_autograd

torch.fx.wrap("run")  # one node of a traced graph


@overload
def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    return_attention: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    return_attention: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    return_attention: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...
def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    return_attention: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """CBAM of Woo et al., ECCV 2018: x times a gate for each channel, then one for each position.

    With S positions in space and C channels::

        channel_gate = sigmoid(MLP(mean of x over space) + MLP(max of x over space))
        y            = x * channel_gate
        spatial_gate = sigmoid(conv([mean of y over channels; max of y over channels]))
        out          = y * spatial_gate

    where MLP is fc2(relu(fc1(.))). The pass that writes out can go on as residual networks do::

        out          = relu(y * spatial_gate + residual)

    Sums are kept in float32 (float64 for float64), a NaN is every maximum it takes part in, and the
    first of equal values is the maximum whose gradient counts.

    Args:
        x: [N, C, *space] with 1, 2 or 3 dimensions of space; float32, float64, float16 or
            bfloat16, any strides. Contiguous and channels_last layouts are read as they are.
        fc1_weight: [hidden, C, 1, ...] or [hidden, C], in x's dtype or float32 (as are all weights;
            float64 where x is float64).
        fc1_bias: [hidden] or None.
        fc2_weight: [C, hidden, 1, ...] or [C, hidden].
        fc2_bias: [C] or None.
        conv_weight: [1, 2, k, ...], one odd k for each dimension of space; maps in the order
            mean, max; padded with zeros to keep the size.
        conv_bias: [1] or None.
        residual: like x, of any strides, in out's dtype or one that a sum with out widens to it;
            added to out. None for none.
        activation: "relu" of out and the residual, or None.
        return_attention: also return the gates; gradients flow through all three.
        backend: "auto" takes the fused backend of x's device, or the one that the environment
            variable CBAM_CUDA_BACKEND names. Any other name is used or is an error.

    Returns:
        out like x, in its dtype and memory format; with `return_attention`
        (out, channel_gate [N, C, 1, ...], spatial_gate [N, 1, *space]), all in x's dtype. Under
        autocast the dtype is the one that the plain PyTorch form gives.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not supported here.
        ValueError: shapes or devices do not fit, or `activation` is unknown, or `backend` is, or
            is not for this device.
        RuntimeError: the backend that was asked for is not part of this installation, or the call
            is under forward-mode differentiation or a torch.func transform, where only "auto" and
            "reference" work, both in plain PyTorch.
        torch.OutOfMemoryError: the GPU has no memory left; a RuntimeError that says so in a
            compiled call, or where it is the CPU.
    """
    weights = Weights(fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    return run(x, weights, residual, activation, return_attention, backend)


def run(
    x: Tensor,
    weights: Weights,
    residual: Tensor | None,
    activation: str | None,
    return_attention: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`cbam`, for weights that are together already."""
    ending = ending_of(residual, activation)
    if torch.compiler.is_compiling():
        check_tensors(x, weights)
        return _run(x, weights, ending, return_attention, backend, ops.forward_train)
    # What torch.jit traces are operators.
    forward_train = ops.forward_train if torch._C._is_tracing() else training.forward_train
    # Checks in Python take longer than small blocks do, and the operators refuse whatever these
    # refuse: they only say it better.
    try:
        return _run(x, weights, ending, return_attention, backend, forward_train)
    except Exception as error:
        _explain(error, x, weights, ending)


def run_normalised(
    x: Tensor,
    weights: Weights,
    norm: nn.Module,
    ending: Ending,
    return_attention: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`run`, with batch normalisation of the map that the convolution gives."""
    if (statistics := known(norm)) is not None:
        return run(x, fold(weights, statistics), *ending.arguments, return_attention, backend)
    if (why := _why_plain(norm)) is not None:
        take_plain_form(backend, f"norm takes its statistics from {why}")
        check_tensors(x, weights)
        return _plainly(x, weights, ending, return_attention, norm)
    if torch.compiler.is_compiling():
        check_tensors(x, weights)
        check_call(x, weights, ending.residual)
        return _run_by_batch(x, weights, norm, ending, return_attention, backend)
    try:
        return _run_by_batch(x, weights, norm, ending, return_attention, backend)
    except Exception as error:
        _explain(error, x, weights, ending)


def _why_plain(norm: nn.Module) -> str | None:
    """Whose statistics a layer takes which no operators can be given."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and isinstance(norm, nn.SyncBatchNorm):
        return "the batches of several processes"
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        return "the batch in a graph of torch.jit"
    return None


def _run_by_batch(
    x: Tensor, weights: Weights, norm: Any, ending: Ending, return_attention: bool, backend: str
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    if torch._C._is_any_autocast_enabled():
        x, weights = _cast_as_autocast(x, weights)
    ending = _widen(ending, x)
    library = choose(backend, x.device)
    if library is None or x.shape[0] == 0:  # no samples have no statistics
        return _plainly(x, weights, ending, return_attention, norm)
    acc = accumulator_dtype(x.dtype)
    affine = (None if t is None else t.to(acc) for t in (norm.weight, norm.bias))
    of = ops_normalised if torch.compiler.is_compiling() else training_normalised
    results: tuple[Tensor, ...] = of.train(library, norm, ending, x, *weights, *affine)
    out, channel_gate, spatial_gate = results
    if return_attention:
        return out, channel_gate.to(x.dtype), spatial_gate.to(x.dtype)
    return out


def _plainly(
    x: Tensor,
    weights: Weights,
    ending: Ending,
    return_attention: bool,
    norm: nn.Module | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    check_call(x, weights, ending.residual)
    residual, activation = ending.arguments
    return reference.cbam(
        x,
        *weights,
        residual=residual,
        activation=activation,
        return_attention=return_attention,
        normalise=None if norm is None else reference.in_its_dtype(norm),
    )


def _run(
    x: Tensor,
    weights: Weights,
    ending: Ending,
    return_attention: bool,
    backend: str,
    forward_train: Callable[..., tuple[Tensor, ...]],
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    if torch._C._is_any_autocast_enabled():
        x, weights = _cast_as_autocast(x, weights)
    ending = _widen(ending, x)
    library = choose(backend, x.device)
    if library is None:
        return _plainly(x, weights, ending, return_attention)
    if compiling := torch.compiler.is_compiling():
        check_call(x, weights, ending.residual)
    if return_attention or _needs_grad(x, *weights, ending.residual):
        out, channel_gate, spatial_gate, *_ = forward_train(x, weights, ending, library)
        if return_attention:
            return out, channel_gate.to(x.dtype), spatial_gate.to(x.dtype)
        return out
    if compiling:
        return ops.forward(x, weights, ending, library)
    with below_autograd():
        return ops.forward(x, weights, ending, library)


def _explain(error: Exception, x: Tensor, weights: Weights, ending: Ending) -> NoReturn:
    """Raise what is wrong with a call that failed: its arguments, or the GPU; or else the error."""
    try:
        check_tensors(x, weights)
        x, weights = _cast_as_autocast(x, weights)
        check_call(x, weights, ending.residual)
    except (TypeError, ValueError) as refused:
        raise refused from None
    if (explained := ops.memory_error(error)) is not None:
        raise explained from None
    raise error


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _widen(ending: Ending, x: Tensor) -> Ending:
    """With a residual in x's dtype."""
    if ending.residual is None:
        return ending
    check_residual(x, ending.residual)  # or it might be narrowed
    return ending._replace(residual=ending.residual.to(x.dtype))


def _cast_as_autocast(x: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
    """Under autocast, x in the dtype in which the plain form leaves it, and weights of one dtype.

    There the gates come out of convolutions in autocast's dtype and multiply x. float64 is left
    alone by autocast, and what is no floating point is refused as it is without.
    """
    if not is_cast(x):
        return x, weights
    x = x.to(dtype_of_out(x))
    if all(w is None or w.dtype == x.dtype for w in weights):
        return x, weights
    return x, Weights(*(None if w is None else w.to(torch.float32) for w in weights))  # type: ignore[arg-type]
