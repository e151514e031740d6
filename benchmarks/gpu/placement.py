"""Streams and devices other than those that torch starts with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cbam_cuda.arguments import Weights

from ..outcome import SkippedError
from ..problems import DTYPES, draw
from .inputs import assert_right, assert_same, draw_weights, run, train
from .strategies import Tally

SHAPE = (8, 256, 56, 56)
CYCLES = 200_000_000  # about a tenth of a second

# What is called with x, the weights and the output's gradient.
Call = Callable[[Tensor, Weights, Tensor], Sequence[Tensor]]
CALLS: dict[str, Call] = {
    "forward": lambda x, weights, grad: [run(x, weights)],
    "forward and backward": train,
}


def another_stream(shape: tuple[int, ...] = SHAPE, device: str = "cuda") -> str:
    """Work follows what its own stream does, however late that is."""
    tally = Tally()
    for dtype, (direction, call) in itertools.product(DTYPES, CALLS.items()):
        name = f"{dtype}, {direction}"
        weights = draw_weights(shape[1], dtype, device)
        x, grad = (draw(shape, dtype, device=device, seed=seed) for seed in (0, 1))
        with tally.problem(name):
            expected = call(x, weights, grad)
            found, queued = _late(call, x, weights, grad)
            assert_same(name, found, expected)
            assert queued, f"{name}: the call waited for the device"
    return tally.said("calls follow the stream and do not wait for it")


def _late(call: Call, x: Tensor, weights: Weights, grad: Tensor) -> tuple[Sequence[Tensor], bool]:
    """Results on a stream that copies x and grad only after a while, and whether they came later.

    On the default stream the call would see other contents.
    """
    copies = torch.zeros_like(x), torch.zeros_like(grad)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(copies[0], weights, copies[1])  # takes memory: taking it may wait for the device
        torch.cuda._sleep(CYCLES)
        for copy, contents in zip(copies, (x, grad), strict=True):
            copy.copy_(contents)
        found = call(copies[0], weights, copies[1])
        queued = not stream.query()
    stream.synchronize()
    return found, queued


def another_device(
    shape: tuple[int, ...] = SHAPE, first: str = "cuda:0", second: str = "cuda:1"
) -> str:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        raise SkippedError("there is one device")
    models = [torch.cuda.get_device_name(device) for device in (first, second)]
    # Another model cuts the work in another way: only where it is current has it the same bits.
    other = first if models[0] == models[1] else second
    tally = Tally()
    for dtype, (direction, call) in itertools.product(DTYPES, CALLS.items()):
        name = f"{dtype}, {direction}"
        x, grad = (draw(shape, dtype, device=second, seed=seed) for seed in (0, 1))
        weights = draw_weights(shape[1], dtype, second)
        with tally.problem(name):
            found = call(x, weights, grad)
            assert torch.cuda.current_device() == 0, f"{name}: the current device was changed"
            assert all(t.device == x.device for t in found), [t.device for t in found]
            with torch.cuda.device(other):
                there = Weights(*(w.to(other) for w in weights))
                expected = call(x.to(other), there, grad.to(other))
                assert_same(name, [t.to(other) for t in found], expected)
            with torch.cuda.device(second):
                assert_right(name, found[0], x, weights)
    return tally.said(f"calls on {models[1]}, the same bits as on {other}")
