"""What is compared: the same block, with the same weights, on the same input.

``eager``    `cbam_cuda.reference.CBAM`, plain PyTorch
``compile``  the same under `torch.compile`
``fused``    `cbam_cuda.CBAM`, on the device's own backend or not at all
``copy``     the memory limit: the least that must be read and written, by torch's own kernels
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import cbam_cuda
from cbam_cuda import reference

NAMES = ("copy", "eager", "compile", "fused")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RATIO, KERNEL_SIZE = 16, 7

Shape = tuple[int, int, int, int]


class Contestants:
    """All of them for one shape [N, C, H, W].

    `forward` and `step` map a name to a function of no arguments. Without a C++ compiler (Triton on
    CUDA) "compile" is left out of both, and `no_compile` says why.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        layout: str,
        device: torch.device,
        with_compile: bool = True,
    ) -> None:
        torch.manual_seed(0)
        x = torch.randn(shape, device=device).to(dtype, memory_format=LAYOUTS[layout])
        grad = torch.randn(shape, device=device).to(dtype, memory_format=LAYOUTS[layout])
        self.forward: dict[str, Callable[[], object]] = {"copy": _copy(x)}
        self.step: dict[str, Callable[[], object]] = {"copy": _copy_step(x, grad)}
        self.no_compile = None if with_compile else "left out by --no-compile"
        for name, block in blocks(shape[1], dtype, device, with_compile).items():
            forward, step = _forward(block, x), _step(block, x, grad)
            if name == "compile" and not self._compiles(forward, step):
                continue
            self.forward[name], self.step[name] = forward, step

    def _compiles(self, *fns: Callable[[], object]) -> bool:
        try:
            for fn in fns:
                fn()
        except Exception as error:  # each missing compiler is missed in another way
            self.no_compile = first_line(error)
            return False
        return True


def blocks(
    channels: int, dtype: torch.dtype, device: torch.device, with_compile: bool
) -> dict[str, nn.Module]:
    """By name, all with the same weights."""
    sizes = {"ratio": RATIO, "kernel_size": KERNEL_SIZE, "device": device, "dtype": dtype}
    eager = reference.CBAM(channels, **sizes)
    fused = cbam_cuda.CBAM(channels, backend=device.type, **sizes)
    fused.load_state_dict(eager.state_dict())
    if not with_compile:
        return {"eager": eager, "fused": fused}
    # Compiled for this very shape: by the second shape torch would compile for all sizes at once.
    torch.compiler.reset()
    return {"eager": eager, "compile": torch.compile(eager, dynamic=False), "fused": fused}


def _forward(block: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> None:
        block(x)

    return forward


def _step(block: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward, for the gradients of x and all weights."""
    x = x.detach().requires_grad_()
    variables = [x, *block.parameters()]

    def step() -> None:
        for variable in variables:
            variable.grad = None
        block(x).backward(grad)

    return step


def _copy(x: Tensor) -> Callable[[], object]:
    """Reads x, writes out."""
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


def _copy_step(x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Reads x, writes out; then reads x and out's gradient, writes x's gradient."""
    out, dx = torch.empty_like(x), torch.empty_like(x)

    def step() -> None:
        out.copy_(x)
        torch.mul(x, grad, out=dx)

    return step


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
