"""``python -m benchmarks.gpu.architecture``: what to build for on this machine, like 9.0.

Knows nothing of the compiled module, which may not have been built yet.
"""

from __future__ import annotations

import sys

import torch

NO_GPU = 2  # exit code


def why_no_gpu() -> str | None:
    """One line about what is missing; None where torch sees a GPU."""
    if torch.cuda.is_available():
        return None
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"benchmarks.gpu: no CUDA device is seen by torch {torch.__version__} ({built})"


def architectures() -> str:
    """Those of all devices here, as in TORCH_CUDA_ARCH_LIST."""
    return ";".join(sorted({capability(i) for i in range(torch.cuda.device_count())}))


def capability(index: int) -> str:
    """Of one device, like 9.0."""
    return ".".join(map(str, torch.cuda.get_device_capability(index)))


def main() -> int:
    """Print it."""
    if reason := why_no_gpu():
        print(reason, file=sys.stderr)
        return NO_GPU
    print(architectures())
    return 0


if __name__ == "__main__":
    sys.exit(main())
