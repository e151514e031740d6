"""Strategies along walks through neighbouring shapes: no flapping, and none that is clearly slower.

What a resident plan takes goes up and down along a walk, as teams of whole blocks fill a device
more or less well. So a strategy may change where samples stop or start to fit on the chip and where
one strategy is clearly faster; where neither is, shapes with one typical shape get the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import floor, gcd, log2

import pytest
from test_plan import BYTES, DEVICES
from test_plan_resident import RESNET

from cbam_cuda.plan import plan

DTYPES = ("float16", "float32")
CLEARLY = 1.15  # the planner's
NEEDED = 4  # switches that a walk may need: a sample begins to fit, to pay, no longer pays or fits
MORE = 4  # switches of a walk beside those
MORE_ON_AVERAGE = 1.2


@dataclass(frozen=True)
class Step:
    """A shape of a walk and what is planned for it."""

    shape: list[int]
    resident: bool
    share: float | None  # of streaming's time that a resident plan takes; None where there is none

    @classmethod
    def of(cls, shape: list[int], **what) -> Step:
        streamed = plan(shape, **what, strategy="streaming")["predicted_seconds"]
        chosen = plan(shape, **what)["strategy"] == "resident"
        try:
            held = plan(shape, **what, strategy="resident")
        except ValueError:
            return cls(shape, chosen, None)
        return cls(shape, chosen, held["predicted_seconds"] / streamed)

    def clear(self) -> bool | None:
        """Whether it must be resident; None where neither strategy is clearly slower."""
        if self.share is None or self.share > CLEARLY:
            return False
        return True if self.share * CLEARLY < 1 else None

    def typical(self) -> tuple[int, ...]:
        def octave(size: float) -> int:
            return floor(log2(size) + 0.5)

        batch, channels, *space = self.shape
        hidden = max(1, channels // 16)
        sizes = (octave(size) for size in (batch, channels, hidden))
        return (*sizes, *(octave(size / 7) for size in space))


def switches(choices: list[bool]) -> int:
    return sum(one != other for one, other in itertools.pairwise(choices))


def needed(walk: list[Step]) -> int:
    """The fewest switches by which no shape gets what is clearly slower."""
    return switches([clear for step in walk if (clear := step.clear()) is not None])


def walks(batch: int, **what) -> Iterator[list[Step]]:
    """In height and width, apart by what pixels have in common with a vector; and in channels."""
    vector = 16 // BYTES[what["dtype"]]
    sizes = {size: Step.of([batch, 256, size, size], **what) for size in range(7, 113)}
    if what["channels_last"]:
        yield list(sizes.values())
    else:
        for common in {gcd(size**2, vector) for size in sizes}:
            yield [step for size, step in sizes.items() if gcd(size**2, vector) == common]
    yield [Step.of([batch, channels, 28, 28], **what) for channels in range(8, 769, 8)]


def check_choices(walk: list[Step]) -> None:
    """What is clearly faster is chosen; where neither is, shapes with one typical shape agree."""
    chosen: dict[tuple[int, ...], bool] = {}
    for step in walk:
        clear = step.clear()
        expected = chosen.setdefault(step.typical(), step.resident) if clear is None else clear
        assert step.resident == expected, step


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_the_strategy_does_not_flap_along_a_walk(device, backward):
    more = []
    for batch, dtype, last in itertools.product((1, 32), DTYPES, (False, True)):
        what = {"device": device, "dtype": dtype, "channels_last": last, "backward": backward}
        for walk in walks(batch, **what):
            check_choices(walk)
            which = f"{walk[0].shape} to {walk[-1].shape}, {what}"
            assert needed(walk) <= NEEDED, which
            more.append(switches([step.resident for step in walk]) - needed(walk))
            assert more[-1] <= MORE, which
    assert sum(more) / len(more) <= MORE_ON_AVERAGE


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_typical_shapes_get_what_is_faster(device, backward):
    """Those of a ResNet among them."""
    for batch, dtype, last in itertools.product((1, 8, 32, 256), DTYPES, (False, True)):
        what = {"device": device, "dtype": dtype, "channels_last": last, "backward": backward}
        for shape in RESNET:
            step = Step.of([batch, *shape], **what)
            assert step.resident == (step.share is not None and step.share < 1), step
