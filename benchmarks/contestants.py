"""What is compared: the same block, with the same weights, on the same input.

``eager``               `cbam_cuda.reference.CBAM`, plain PyTorch
``tuned``               the same with the fastest operators that PyTorch has for it
``timm``                `timm.layers.cbam.CbamModule` without its norm; 2D, where timm is importable
``compile``             eager under `torch.compile`
``tuned compile``       tuned under `torch.compile`
``max-autotune``        eager under `torch.compile(mode="max-autotune-no-cudagraphs")`; CUDA only
``tuned max-autotune``  tuned under the same
``fused``               `cbam_cuda.CBAM`, on the device's own backend or not at all
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, library, nn

import cbam_cuda
from cbam_cuda import reference

RATIO, KERNEL_SIZE = 16, 7
PLAIN = ("eager", "tuned", "timm")


class Compiled(NamedTuple):
    """Which contestant is compiled, and in which mode of torch.compile."""

    of: str
    mode: str = "default"


COMPILED = {"compile": Compiled("eager"), "tuned compile": Compiled("tuned")}
# CUDA graphs are made of all contestants alike, by what times them.
_MOST = "max-autotune-no-cudagraphs"
COMPILED_ON_CUDA = {
    **COMPILED,
    "max-autotune": Compiled("eager", _MOST),
    "tuned max-autotune": Compiled("tuned", _MOST),
}
RIVALS = (*PLAIN, *COMPILED_ON_CUDA)


class Tuned(reference.CBAM):
    """The reference with `mean` and `amax`, which keep no indices.

    Where several elements are the maximum, `amax` splits the gradient evenly between them; the
    reference gives it to the first.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """CBAM of x."""
        space = tuple(range(2, x.dim()))
        pooled = (x.mean(space, keepdim=True), x.amax(space, keepdim=True))
        hidden = sum(torch.relu(self.fc1(vector)) for vector in pooled)
        bias = 0 if self.fc2.bias is None else self.fc2.bias.view(1, -1, *(1 for _ in space))
        y = x * torch.sigmoid(self.fc2(hidden) + bias)
        maps = torch.cat((y.mean(1, keepdim=True), y.amax(1, keepdim=True)), 1)
        return y * torch.sigmoid(self.conv(maps))


def make_block(
    name: str, channels: int, dtype: torch.dtype, device: torch.device, dim: int = 2
) -> nn.Module:
    """A contestant; all that are made for the same sizes have the same weights.

    Raises:
        ImportError: timm is not there.
        ValueError: there is no such contestant for so many dimensions.
    """
    if name in COMPILED_ON_CUDA:
        of, mode = COMPILED_ON_CUDA[name]
        # For this very shape: by the second shape torch would compile for all sizes at once.
        return torch.compile(make_block(of, channels, dtype, device, dim), dynamic=False, mode=mode)  # type: ignore[return-value]
    sizes = {"ratio": RATIO, "kernel_size": KERNEL_SIZE, "dim": dim}
    place = {"device": device, "dtype": dtype}
    torch.manual_seed(0)
    eager = reference.CBAM(channels, **sizes, **place)
    if name == "timm":
        return _timm(eager)
    if name == "eager":
        return eager
    if name == "tuned":
        other: nn.Module = Tuned(channels, **sizes, **place)
    elif name == "fused":
        other = cbam_cuda.CBAM(channels, backend=device.type, **sizes, **place)
    else:
        raise ValueError(f"expected one of {', '.join(PLAIN)}, fused, got {name!r}")
    other.load_state_dict(eager.state_dict())
    return other


def _timm(eager: reference.CBAM) -> nn.Module:
    if eager.dim != 2:
        raise ValueError(f"expected 2 dimensions, got {eager.dim}")
    _make_torchvision_importable()
    from timm.layers.cbam import CbamModule

    hidden, channels = eager.fc1.weight.shape[:2]
    found = CbamModule(channels, rd_channels=hidden, spatial_kernel_size=KERNEL_SIZE, mlp_bias=True)
    found.channel.fc1, found.channel.fc2 = eager.fc1, eager.fc2
    found.spatial.conv = eager.conv  # in place of a convolution and its norm
    return found


@functools.cache  # what is returned must live on
def _make_torchvision_importable() -> library.Library | None:
    """For timm, which imports it.

    Built for another torch it comes without its operators, and yet declares, as it is imported,
    what two of them give: these get their schemas.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:  # timm will say so
        return None
    except RuntimeError:
        operators = library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators
    return None


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
