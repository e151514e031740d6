"""How contestants are timed on the GPU: one after another, and in CUDA graphs.

Each sample begins with a cold L2 cache and goes through several inputs and outputs, so that every
call reads and writes memory, as it would inside of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..contestants import RIVALS, first_line
from ..timing import as_found
from .calls import Call
from .problems import GRAPH_CALLS

GRAPH_BELOW = 50.0  # microseconds
ROUNDS, SAMPLES_A_ROUND = 5, 5  # contestants take turns
MOST_SECONDS = 2.0  # a contestant that is slower gets fewer rounds
WARM_UPS = 3


class Clock:
    """The device's own clock, and a cold cache before each sample."""

    def __init__(self, l2_bytes: int) -> None:
        self.flush = torch.ones(2 * l2_bytes // 4, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, work: Callable[[], object], calls: int) -> float:
        """Microseconds a call, of work that makes so many."""
        self.flush.sum()
        self.start.record()
        work()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3 / calls


def measure(
    calls: dict[str, Call],
    count: int,
    clock: Clock,
    training: bool,
    rounds: int = ROUNDS,
    missing: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """By name: "launched" call by call and, where it is short for anyone, "graph" for all.

    Rivals that have not enough memory become `missing`, with why, where that is given.
    """
    with torch.set_grad_enabled(training):
        works: dict[str, Callable[[], object]] = {}
        for name, call in calls.items():
            try:
                works[name] = _launched(call, count)
            except torch.OutOfMemoryError as error:
                if missing is None or name not in RIVALS or name == "eager":
                    raise
                missing[name] = first_line(error)
        found: dict[str, dict[str, Any]] = {
            name: {"launched": timing}
            for name, timing in _take_turns(works, clock, count, rounds).items()
        }
        if min(result["launched"]["median"] for result in found.values()) >= GRAPH_BELOW:
            return found
        graphs: dict[str, Callable[[], object]] = {}
        for name in found:
            try:
                graphs[name] = _graph(calls[name], count)
            except RuntimeError as error:
                found[name]["no_graph"] = first_line(error)
        for name, timing in _take_turns(graphs, clock, GRAPH_CALLS, rounds).items():
            found[name]["graph"] = timing
    return found


def _take_turns(
    works: dict[str, Callable[[], object]], clock: Clock, calls: int, rounds: int
) -> dict[str, dict[str, Any]]:
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            if calls * sum(samples[name]) < 1e6 * MOST_SECONDS:
                work()
                samples[name] += [clock.sample(work, calls) for _ in range(SAMPLES_A_ROUND)]
    return {name: as_found(values) for name, values in samples.items()}


def _launched(call: Call, count: int) -> Callable[[], object]:
    """Goes through the buffers once. Results are kept, so that they too are many."""
    kept: list[object] = [None] * count

    def work() -> None:
        for i in range(count):
            kept[i] = call(i)

    for _ in range(WARM_UPS):
        work()
    return work


def _graph(call: Call, count: int) -> Callable[[], object]:
    """A replay of GRAPH_CALLS calls.

    Recorded on the stream that everything else ran on: a backward runs where its forward did.
    """
    kept: list[object] = [None] * count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(GRAPH_CALLS):
            kept[i % count] = call(i % count)

    def replay(_kept: list[object] = kept) -> None:  # its results live as long as the graph
        graph.replay()

    replay()
    return replay
