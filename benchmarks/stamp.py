"""On what machine, and with which sources, results were found."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import cbam_cuda

ROOT = Path(__file__).resolve().parents[1]


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code. Called before measuring: see `load`."""
    build = cbam_cuda.info()["build"] or {}
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "load": _load_average(),
        "cbam_cuda": cbam_cuda.__version__,
        "cpu_target": build.get("cpu_target"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _load_average() -> float | None:
    """Of the last minute. Beside other work OpenMP's threads wait for each other's time slices."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def stamp() -> dict[str, str]:
    """What every file of results carries."""
    return {"commit": commit(), "date": date.today().isoformat()}


def commit() -> str:
    """Of the sources, with "-dirty" where they differ from it."""
    name = printed(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if not name:
        return "unknown"
    changed = printed(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{name}-dirty" if changed else name


def printed(command: Sequence[str]) -> str:
    """What a program prints; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
