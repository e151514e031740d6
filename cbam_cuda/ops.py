"""Loads the compiled module and describes its operators to torch: tracing and autograd.

Nothing else loads it. The operators (schemas in csrc/ops.cpp), for x [N, C, *space] and acc =
float64 for float64, else float32:

- ``forward`` returns out. It saves nothing, so that its derivative runs the next one first: graphs
  have it where nothing needed a gradient when they were made. Both take what follows the block, a
  residual like x or None, and whether there is a ReLU.
- ``forward_train`` also returns channel_gate acc [N, C, 1, ...], spatial_gate acc [N, 1, *space],
  pooled acc [N, 2, C], hidden acc [N, 2, R], maps in x's dtype [N, 2, *space], and the positions
  of the maxima, pixel_argmax int32 [N, C] and channel_argmax int32 [N, S].
- ``backward`` returns a gradient for x and each weight, an empty tensor where not asked for.

Where something is done to the logits of the spatial gate, a step is made of four, without autograd:

- ``logits`` returns what forward_train does, but for out and with the logits as spatial_gate.
- ``scale`` returns out = x * channel_gate * spatial_gate, on which goes what follows, and the
  spatial gate of its logits.
- ``scale_backward`` returns the gradients of both gates, through out alone.
- ``logits_backward`` is ``backward`` from what reaches channel_gate, that through out included, and
  from what reaches the logits; the gradient of x has its part through out as well.

Two more, over these, are in `ops_normalised`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

from . import derivatives, gradients, ops_normalised
from .arguments import Weights, accumulator_dtype, check_call, check_residual
from .ending import NO_ENDING, Ending

# Libraries of operators: the same schemas, and for tensors on a CPU different kernels behind them.
FUSED = "cbam_cuda"
EMULATED = "cbam_cuda_emulated"

load_error: ImportError | None = None
try:
    from . import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    load_error = error


def missing(device_type: str, index: int | None = None, name: str = FUSED) -> str | None:
    """Why a library has no kernels for tensors on such a device; None if it has.

    Without an index, why there are none for any device of this type.
    """
    if name == FUSED and _C is None:
        return (
            f"the compiled module did not load ({load_error}); "
            "build it with `pip install --no-build-isolation .`"
        )
    if name == EMULATED and EMULATED not in _KERNELS:
        if not _emulator().exists():
            return f"{_emulator()} does not exist; build it with `make emulator`"
        load_emulated()
    if device_type not in _KERNELS[name]:
        return f"this build has no fused kernels for {device_type}"
    if device_type == "cuda":
        return _cuda_problem(-1 if index is None else index) or None
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_problem(index: int) -> str:
    # Not when the package is imported: asking starts CUDA, after which a process must not fork.
    if index not in _cuda_problems:
        _cuda_problems[index] = str(_C.cuda_problem(index))
    return _cuda_problems[index]


_cuda_problems: dict[int, str] = {}


def load_emulated() -> None:
    """Load the library in which an emulator runs the CUDA kernels on CPU tensors."""
    torch.ops.load_library(str(_emulator()))  # type: ignore[no-untyped-call]
    _describe(EMULATED)


def _emulator() -> Path:
    return Path(os.environ.get("CBAM_CUDA_EMULATOR") or Path(__file__).with_name("_emulated.so"))


def compiled() -> Any:
    """The compiled module.

    Raises:
        RuntimeError: it did not load.
    """
    if _C is None:
        raise RuntimeError(missing("cpu"))
    return _C


def build_info() -> dict[str, Any] | None:
    """What the compiled module says of itself; None where it did not load."""
    return None if _C is None else _C.build_info()


def forward(x: Tensor, weights: Weights, ending: Ending = NO_ENDING, name: str = FUSED) -> Tensor:
    """The output alone."""
    out: Tensor = getattr(torch.ops, name).forward.default(x, *weights, *ending)
    return out


def forward_train(
    x: Tensor, weights: Weights, ending: Ending = NO_ENDING, name: str = FUSED
) -> tuple[Tensor, ...]:
    """The output, the gates, and what else backward needs."""
    operator = getattr(torch.ops, name).forward_train.default
    outputs: tuple[Tensor, ...] = operator(x, *weights, *ending)
    return outputs


def memory_error(error: Exception) -> torch.OutOfMemoryError | None:
    """What torch raises where a GPU has no memory left, if that is why an operator failed."""
    if "CUDA out of memory." not in str(error):
        return None
    if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()  # raises what broke the device before, if something did
    return torch.OutOfMemoryError(str(error))


class MemoryErrors(contextlib.AbstractContextManager[None]):
    """Raises `memory_error` in the place of what an operator raises inside."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and (explained := memory_error(error)) is not None:
            raise explained from None


_WEIGHTS = len(Weights._fields)


def _fake_forward(x: Tensor, *given: Any) -> Tensor:
    weights, ending = Weights(*given[:_WEIGHTS]), Ending(*given[_WEIGHTS:])
    check_call(x, weights, ending.residual)
    return torch.empty_like(x)


def _fake_forward_train(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    out = _fake_forward(x, *given)
    samples, channels, *space = x.shape
    hidden = given[0].shape[0]
    acc = accumulator_dtype(x.dtype)
    return (
        out,
        x.new_empty((samples, channels, *(1 for _ in space)), dtype=acc),
        x.new_empty((samples, 1, *space), dtype=acc),
        x.new_empty((samples, 2, channels), dtype=acc),
        x.new_empty((samples, 2, hidden), dtype=acc),
        x.new_empty((samples, 2, *space)),
        x.new_empty((samples, channels), dtype=torch.int32),
        x.new_empty((samples, math.prod(space)), dtype=torch.int32),
    )


def _fake_logits(x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
    return _fake_forward_train(x, *weights)[1:]


def _fake_scale(
    x: Tensor,
    channel_gate: Tensor,
    logits: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    if residual is not None:
        check_residual(x, residual)
    return torch.empty_like(x), logits.new_empty(logits.shape)


def _fake_scale_backward(
    grad_out: Tensor, x: Tensor, channel_gate: Tensor, spatial_gate: Tensor
) -> tuple[Tensor, Tensor]:
    return channel_gate.new_empty(channel_gate.shape), spatial_gate.new_empty(spatial_gate.shape)


def _fake_backward(
    grad_out: Tensor,
    grad_channel_gate: Tensor | None,
    grad_spatial_gate: Tensor | None,
    x: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights, output_mask = rest[:_WEIGHTS], rest[-1]
    dx = torch.empty_like(x) if output_mask[0] else x.new_empty(0)
    gradients = [
        _empty_gradient(name, w) if wanted else x.new_empty(0)
        for name, w, wanted in zip(Weights._fields, weights, output_mask[1:], strict=True)
    ]
    return (dx, *gradients)


def _empty_gradient(name: str, w: Tensor) -> Tensor:
    """Contiguous, or of the convolution as channels_last has its weights."""
    if name == "conv_weight" and w.movedim(1, -1).is_contiguous():
        return torch.empty_like(w)
    return w.new_empty(w.shape)


# What a library has, and what it is for tracing.
OPERATORS: dict[str, Callable[..., Any]] = {
    "forward": _fake_forward,
    "forward_train": _fake_forward_train,
    "backward": _fake_backward,
    "logits": _fake_logits,
    "logits_backward": _fake_backward,
    "scale": _fake_scale,
    "scale_backward": _fake_scale_backward,
}


# For each library, the types of device that it has kernels for.
_KERNELS: dict[str, frozenset[str]] = {}


def _describe(name: str) -> None:
    """Register tracing and autograd for a library that is loaded, and note what it has."""
    for operator, description in OPERATORS.items():
        library.register_fake(f"{name}::{operator}", description)
    operators = getattr(torch.ops, name)
    library.register_autograd(
        f"{name}::forward",
        functools.partial(gradients.backward_of_inference, operators),
        setup_context=gradients.setup_inference,
    )
    library.register_autograd(
        f"{name}::forward_train",
        functools.partial(gradients.backward_of_forward, operators.backward),
        setup_context=gradients.setup_forward,
    )
    library.register_autograd(
        f"{name}::backward",
        derivatives.backward_gradients,
        setup_context=derivatives.setup_backward,
    )
    ops_normalised.define(name)
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    _KERNELS[name] = frozenset(d for d, key in keys.items() if has(f"{name}::forward", key)) | {
        "meta"
    }


if _C is not None:
    _describe(FUSED)
