from collections.abc import Sequence
from typing import Any

def build_info() -> dict[str, Any]: ...
def cuda_problem(index: int) -> str: ...
def known_devices() -> list[dict[str, Any]]: ...
def plan(
    shape: Sequence[int],
    hidden: int,
    kernel: Sequence[int],
    dtype: str,
    device: str,
    *,
    channels_last: bool = False,
    training: bool = False,
    residual: bool = False,
    backward: bool = False,
    aligned: bool = True,
    bias: bool = True,
    weight_dtype: str = "",
    strategy: str = "auto",
    multiprocessors: int = 0,
) -> dict[str, Any]: ...
