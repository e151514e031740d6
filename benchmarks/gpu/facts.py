"""The machine, the versions and the sources that results were found with."""

from __future__ import annotations

import shutil
from typing import Any

import torch

import cbam_cuda

from ..outcome import PASSED, Folder, Outcome
from ..stamp import environment, printed, stamp
from .architecture import capability

QUERIES = (
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
)


def step(seconds: float, folder: Folder) -> Outcome:
    """The environment."""
    found = collect()
    line = "{device}, driver {driver}, torch {torch}".format_map(found)
    return Outcome(PASSED, f"{line}, commit {found['commit'][:10]}", details=found)


def collect(index: int = 0) -> dict[str, Any]:
    """All of it."""
    device = torch.device("cuda", index)
    build = cbam_cuda.info()["build"] or {}
    properties = torch.cuda.get_device_properties(device)
    smi = nvidia_smi(index)
    return {
        **environment(device),
        **stamp(),
        "devices": torch.cuda.device_count(),
        "capability": capability(index),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": smi.get("driver_version", "unknown"),
        "torch_cuda": torch.version.cuda,
        "build_cuda": build.get("cuda_version"),
        "build_architectures": build.get("cuda_architectures"),
        "nvidia_smi": smi,
    }


def nvidia_smi(index: int = 0) -> dict[str, str]:
    """What nvidia-smi says of a device; nothing where there is no such program."""
    if not shutil.which("nvidia-smi"):
        return {}
    # By its name: nvidia-smi does not count as CUDA_VISIBLE_DEVICES does.
    name = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    query = ["--format=csv,noheader", f"--query-gpu={','.join(QUERIES)}"]
    values = printed(["nvidia-smi", f"--id={name}", *query]).split(", ")
    return dict(zip(QUERIES, values, strict=True)) if len(values) == len(QUERIES) else {}
