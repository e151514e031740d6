"""The machine, the versions and the sources that results were found with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch

import cbam_cuda

from ..timing import environment
from .architecture import capability
from .commands import ROOT
from .results import PASSED, Folder, Outcome

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


def stamp() -> dict[str, str]:
    """What every file of results carries."""
    return {"commit": commit(), "date": date.today().isoformat()}


def commit() -> str:
    """Of the sources, with "-dirty" where they differ from it."""
    name = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if not name:
        return "unknown"
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{name}-dirty" if changed else name


def nvidia_smi(index: int = 0) -> dict[str, str]:
    """What nvidia-smi says of a device; nothing where there is no such program."""
    if not shutil.which("nvidia-smi"):
        return {}
    # By its name: nvidia-smi does not count as CUDA_VISIBLE_DEVICES does.
    name = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    query = ["--format=csv,noheader", f"--query-gpu={','.join(QUERIES)}"]
    values = _output(["nvidia-smi", f"--id={name}", *query]).split(", ")
    return dict(zip(QUERIES, values, strict=True)) if len(values) == len(QUERIES) else {}


def _output(command: Sequence[str]) -> str:
    """What a program prints; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
