"""Streams and devices other than those that torch starts with."""

from __future__ import annotations

import torch

from .inputs import DTYPES, assert_right, assert_same, draw, draw_weights, run
from .results import SkippedError

SHAPE = (8, 256, 56, 56)
CYCLES = 200_000_000  # about a tenth of a second


def another_stream() -> str:
    """Work follows what its own stream does, however late that is."""
    for dtype in DTYPES:
        weights = draw_weights(SHAPE[1], dtype)
        old, new = (draw(SHAPE, dtype, seed=seed) for seed in (0, 1))
        expected, x = run(new, weights), old.clone()
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            x.copy_(new)
            out = run(x, weights)  # on the default stream it would see the old contents
            queued = not stream.query()
        stream.synchronize()
        assert_same(f"{dtype}", out, expected)
        assert queued, "the call waited for the device"
    return "results follow the stream, and calls do not wait for it"


def another_device() -> str:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        raise SkippedError("there is one device")
    for dtype in DTYPES:
        x, weights = draw(SHAPE, dtype, device="cuda:1"), draw_weights(SHAPE[1], dtype, "cuda:1")
        out = run(x, weights)
        assert torch.cuda.current_device() == 0, "the current device was changed"
        assert out.device == x.device, out.device
        with torch.cuda.device(1):
            assert_right(f"{dtype}", out, x, weights)
    return f"{torch.cuda.get_device_name(1)}"
