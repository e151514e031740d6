"""CBAM (Convolutional Block Attention Module), fused: a drop-in for the plain PyTorch module.

``CBAM`` and its relatives are modules, ``cbam`` is the function under them, ``reference`` holds
the same function in plain PyTorch. ``convert`` swaps the CBAM modules of a model for these, and
``info`` says which backends this installation has.
"""

from . import reference
from .convert import convert, revert
from .forms import ResidualCBAM
from .functional import cbam
from .info import info
from .module import CBAM, CBAM1d, CBAM2d, CBAM3d, CBAM_Module
from .version import __version__

__all__ = [
    "CBAM",
    "CBAM1d",
    "CBAM2d",
    "CBAM3d",
    "CBAM_Module",
    "ResidualCBAM",
    "__version__",
    "cbam",
    "convert",
    "info",
    "reference",
    "revert",
]
