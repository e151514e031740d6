"""The one place that measures time, and the one that says on what machine."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

import cbam_cuda

# A sample is a batch of calls this long, so that neither the clock nor one launch is what counts.
SAMPLE_MICROSECONDS = 500.0
# Contestants take turns this often, so that a busy moment of the machine hits all of them.
ROUNDS = 5
WARM_UP_CALLS = 3


class Timing(NamedTuple):
    """How long one call takes, in microseconds, over so many samples."""

    median: float
    lower: float  # a quarter of the samples is below
    upper: float  # a quarter of the samples is above
    samples: int


def summarize(samples: Iterable[float]) -> Timing:
    """Median and quartiles."""
    values = sorted(samples)
    if len(values) < 2:
        (only,) = values
        return Timing(only, only, only, 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))


def time_once(fn: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Microseconds a call, over `calls` calls in a row. On CUDA the device's own clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - begin) * 1e6 / calls


def time_call(fn: Callable[[], Any], device: torch.device, seconds: float) -> Timing:
    """Time `fn` for about so many seconds, after a warm-up."""
    return time_together({"fn": fn}, device, seconds)["fn"]


def time_together(
    fns: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Time each function for about so many seconds, taking turns."""
    calls = {}
    for name, fn in fns.items():
        warm = min(time_once(fn, device) for _ in range(WARM_UP_CALLS))
        calls[name] = max(1, round(SAMPLE_MICROSECONDS / max(warm, 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(ROUNDS):
        for name, fn in fns.items():
            fn()  # brings its own data back to the caches
            samples[name] += _samples(fn, device, calls[name], seconds / ROUNDS)
    return {name: summarize(values) for name, values in samples.items()}


def _samples(
    fn: Callable[[], Any], device: torch.device, calls: int, seconds: float
) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        samples.append(time_once(fn, device, calls))
    return samples


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
        "date": date.today().isoformat(),
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
