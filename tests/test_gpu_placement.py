"""The checks of streams and devices, with what stands for them on a CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks.gpu import inputs, placement
from benchmarks.outcome import SkippedError


class Stream:
    """Stands for a stream."""

    def __init__(self, busy=True):
        self.busy = busy

    def query(self):
        return not self.busy

    def synchronize(self):
        pass


@pytest.fixture
def two_devices(monkeypatch):
    """Stands for what torch says of streams and of two devices, all of them the CPU."""
    fakes = {
        "Stream": Stream,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_name": lambda device: "a GPU",
        "device": contextlib.nullcontext,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


SHAPE = (2, 8, 6, 5)
PLACES = {
    "stream": lambda: placement.another_stream(SHAPE, "cpu"),
    "device": lambda: placement.another_device(SHAPE, "cpu", "cpu"),
}


@pytest.mark.parametrize("place", PLACES)
def test_checks_of_placement_pass_on_the_cpu(two_devices, place):
    PLACES[place]()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("part", range(8))
def test_gradients_that_differ_elsewhere_fail(monkeypatch, two_devices, place, part):
    gradients, calls = inputs.cases.gradients, []

    def drifting(backend, leaves, grad):
        found = gradients(backend, leaves, grad)
        calls.append(found)
        found[part] = found[part] + len(calls)
        return found

    monkeypatch.setattr(inputs.cases, "gradients", drifting)
    with pytest.raises(AssertionError, match=f"float32, forward and backward, result {part}: "):
        PLACES[place]()


@pytest.mark.parametrize("direction", placement.CALLS)
def test_calls_that_run_before_their_stream_does_fail(monkeypatch, two_devices, direction):
    call, first = placement.CALLS[direction], {}

    def early(x, weights, grad):
        """What came of the tensors' first contents."""
        return first.setdefault(x.data_ptr(), call(x, weights, grad))

    monkeypatch.setitem(placement.CALLS, direction, early)
    with pytest.raises(AssertionError, match=f"float32, {direction}, result 0: "):
        PLACES["stream"]()


def test_a_call_that_waits_for_its_stream_fails(monkeypatch, two_devices):
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(busy=False))
    with pytest.raises(AssertionError, match="float32, forward: the call waited for the device"):
        PLACES["stream"]()


def test_calls_that_change_the_current_device_fail(monkeypatch, two_devices):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(AssertionError, match="forward: the current device was changed"):
        PLACES["device"]()


def test_another_device_asks_for_two(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SkippedError, match="there is one device"):
        placement.another_device()
