"""Memory that a forward and its backward take beside their inputs and weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it speaks of each profile

from torch.profiler import ProfilerActivity, profile

from . import calls
from .calls import Buffers


def of_blocks(blocks: Mapping[str, nn.Module], buffers: Buffers) -> dict[str, dict[str, int]]:
    """Of forward and backward of each block, by its name."""
    found = {}
    x = buffers.xs[0].detach().requires_grad_()
    for name, block in blocks.items():
        step = calls.step(block, buffers)
        found[name] = {
            "saved_bytes": saved_bytes(lambda b=block: b(x), [x, *block.parameters()]),
            "peak_bytes": peak_bytes(lambda s=step: s(0), x.device),
        }
    return found


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a forward until the backward; storages of `known` not counted.

    `forward` must require gradients, and gets its result dropped.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept while storages are counted: addresses are not used again
    old = {tensor.untyped_storage().data_ptr() for tensor in known}
    del result
    return sum(nbytes for address, nbytes in storages.items() if address not in old)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that a call adds to the memory that torch's allocator gave out."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
