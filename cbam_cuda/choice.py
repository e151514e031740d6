"""Which backend a call takes, and what is said where it is the plain form."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from . import ops
from .derivatives import is_transformed

BACKENDS = ("auto", "cuda", "cpu", "emulated", "reference")
_VARIABLE = "CBAM_CUDA_BACKEND"


def choose(backend: str, device: torch.device) -> str | None:
    """The library of operators for tensors on `device`, or None for the plain form."""
    name, source = _named(backend)
    if name == "reference":
        return None
    if is_transformed():
        if name == "auto":
            return None
        raise RuntimeError(
            f"{source}: {name!r} cannot be used under forward-mode differentiation or a torch.func "
            "transform, which pass only through PyTorch's own operators: use 'auto' or 'reference'"
        )
    if name == "auto":
        why = ops.missing(device.type, device.index)
        if why is None:
            return ops.FUSED
        _warn_of_fallback(f"on {device.type}: {why}")
        return None
    expected = "cpu" if name == "emulated" else name
    # Meta tensors have no data: any backend's operators describe what they would return.
    if device.type not in (expected, "meta"):
        raise ValueError(f"{source}: {name!r} expects tensors on {expected}, got x on {device}")
    library = ops.EMULATED if name == "emulated" else ops.FUSED
    if (why := ops.missing(device.type, device.index, library)) is not None:
        raise RuntimeError(f"{source}: {name!r} cannot be used: {why}")
    return library


def take_plain_form(backend: str, why: str) -> None:
    """Warn once that a call takes the plain form, or raise where it was to take a fused one."""
    name, source = _named(backend)
    if name not in ("auto", "reference"):
        raise RuntimeError(f"{source}: {name!r} cannot be used: {why}")
    if name == "auto":
        _warn_of_fallback(f"as {why}")


def _named(backend: str) -> tuple[str, str]:
    """The backend that is asked for, and who asks for it."""
    name, source = backend, "backend"
    if backend == "auto" and (named := os.environ.get(_VARIABLE)):
        name, source = named, _VARIABLE
    check_backend(source, name)
    return name, source


def check_backend(source: str, name: str) -> None:
    """Raise unless there is a backend of this name; `source` says who named it."""
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")


_warned: set[str] = set()
# Between whoever calls a module and what warns: this package, and torch, which calls modules.
_CALLEES = tuple(str(Path(m.__file__ or "").parent) + os.sep for m in (ops, torch))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_of_fallback(where: str) -> None:
    """Say once for each reason that the slow path is taken."""
    if where in _warned:
        return
    _warned.add(where)
    warnings.warn(f"cbam_cuda runs its plain PyTorch form {where}", stacklevel=_frames_of_callees())


def _frames_of_callees() -> int:
    """The `stacklevel` of whoever called this package, from the caller's point of view."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_CALLEES):
        level, frame = level + 1, frame.f_back
    return level
