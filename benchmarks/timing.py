"""The one place that measures time."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

# A sample is a batch of calls this long, so that neither the clock nor one launch is what counts.
SAMPLE_MICROSECONDS = 500.0
# Contestants take turns this often, so that a busy moment of the machine hits all of them.
ROUNDS = 5
WARM_UP_CALLS = 3
MOST = 1.5  # times the wanted time, after which a contestant gets no more turns
MOST_SAMPLES = 20  # of a turn


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


def as_found(samples: Iterable[float]) -> dict[str, Any]:
    """What is kept of them: the summary, and each of them to the nanosecond."""
    values = list(samples)
    return {**summarize(values)._asdict(), "raw": [round(value, 3) for value in values]}


def preemptions() -> int:
    """How often other programs have taken a processor from this one.

    Each time may cost a slice of the scheduler's, milliseconds, in which threads wait for each
    other. All samples may be so: the quartiles do not show it.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


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


def time_together(
    fns: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time each function for about so many seconds, taking turns; by name as `as_found` has it.

    One that is so slow that it would take far longer has fewer samples, at least one.
    """
    calls = {}
    for name, fn in fns.items():
        warm = _warm_up(fn, device, seconds)
        calls[name] = max(1, round(SAMPLE_MICROSECONDS / max(warm, 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(ROUNDS):
        for name, fn in fns.items():
            if calls[name] * sum(samples[name]) > 1e6 * MOST * seconds:
                continue
            fn()  # brings its own data back to the caches
            samples[name] += _samples(fn, device, calls[name], seconds / ROUNDS)
    return {name: as_found(values) for name, values in samples.items()}


def _warm_up(fn: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Microseconds of the fastest of some calls; of one that takes very long."""
    best = time_once(fn, device)
    for _ in range(WARM_UP_CALLS - 1):
        if best < 1e6 * seconds:
            best = min(best, time_once(fn, device))
    return best


def _samples(
    fn: Callable[[], Any], device: torch.device, calls: int, seconds: float
) -> list[float]:
    samples: list[float] = []
    while not samples or (calls * sum(samples) < 1e6 * seconds and len(samples) < MOST_SAMPLES):
        samples.append(time_once(fn, device, calls))
    return samples
