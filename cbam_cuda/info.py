"""What this installation can do."""

from __future__ import annotations

from typing import Any

import torch

from . import ops
from .version import __version__


def info() -> dict[str, Any]:
    """Which backends there are, for what they were built, and why one is missing.

    Returns:
        ``version``, ``torch``; ``backends``, a dict from "cpu", "cuda" and "emulated" to
        "available" or the reason why not; ``build``, what the compiled
        module says of itself (compiler, CPU targets that run here and the one in use, CUDA
        version, architectures and visible devices), or None where it did not load.
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "backends": {
            **{d: ops.missing(d) or _unusable(d) or "available" for d in ("cpu", "cuda")},
            "emulated": ops.missing("cpu", name=ops.EMULATED) or "available",
        },
        "build": ops.build_info(),
    }


def _unusable(device_type: str) -> str | None:
    if device_type == "cuda" and not torch.cuda.is_available():
        return "built, but torch sees no CUDA device"
    return None
