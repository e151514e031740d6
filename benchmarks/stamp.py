"""On what machine, and with which sources, results were found."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cbam_cuda

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("triton", "timm")  # packages that contestants need


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code. Called before measuring: see `load`."""
    build = cbam_cuda.info()["build"] or {}
    return {
        "device": _device_name(device),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _load_average(),
        "cbam_cuda": cbam_cuda.__version__,
        "cpu_target": build.get("cpu_target"),
        "compiler": build.get("compiler"),
        "torch": torch.__version__,
        **{name: _version(name) for name in OPTIONAL},
        "compiler_of_torch_compile": _compiler(),
        "python": platform.python_version(),
        "command": shlex.join(["python", *map(_without_place, sys.orig_argv[1:])]),
    }


def _without_place(argument: str) -> str:
    """The argument, its path by name alone where that says where things stand on this machine."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    return f"{option}{equals}{path.name}" if path.is_absolute() else argument


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """What torch.compile compiles with for the CPU."""
    said = printed([os.environ.get("CXX", "g++"), "--version"])
    return said.splitlines()[0] if said else None


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
