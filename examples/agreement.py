"""When two trainings agree.

In exact arithmetic the plain and the fused CBAM are the same function, so their losses may differ
by rounding only. Training magnifies rounding: a maximum that falls on another pixel, a ReLU that
opens, and one unit in the last place has become a thousandth within some ten steps of float32.
Therefore three comparisons, for the first `STEPS` losses:

- the first loss, which no step has touched yet, to `FIRST_LOSS` of itself;
- float64, where the first steps turn nothing over, each loss to `FLOAT64` of itself. A gradient
  that is wrong by a millionth fails here;
- float32, each loss to a multiple of how far the plain CBAM is from itself when the same
  computation is only written in another way (see `allowed_differences`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 20
FIRST_LOSS = 1e-5
FLOAT64 = 1e-12
MULTIPLE_OF_SPREAD = 10.0
STEPS_AHEAD = 5


@dataclass(frozen=True)
class Check:
    """Something that was measured and its limit."""

    title: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the value keeps to the limit; a NaN does not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.title}: {self.value:.3g} (expected {sign} {self.limit:.3g})"


def differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """|a - b|, element by element."""
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def allowed_differences(losses: Sequence[float], *same: Sequence[float]) -> list[float]:
    """How far another implementation may be from `losses`, step by step.

    `same` are losses of the same implementation, for the same computation written in another way.
    Allowed is a multiple of the largest difference from any of them so far, or up to a few steps
    later, as no two runs take off at the same step; and always the tolerance of the first loss.
    """
    spread = [max(step) for step in zip(*(differences(losses, s) for s in same), strict=True)]
    return [
        MULTIPLE_OF_SPREAD * max(spread[: step + 1 + STEPS_AHEAD]) + FIRST_LOSS * abs(loss)
        for step, loss in enumerate(losses)
    ]


def largest_relative_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Of a from b, as a fraction of b."""
    return max(d / abs(y) for d, y in zip(differences(a, b), b, strict=True))


def loss_checks(
    plain: Sequence[float],
    fused: Sequence[float],
    plain_reversed: Sequence[float],
    plain_float64: Sequence[float],
    fused_float64: Sequence[float],
) -> list[Check]:
    """The three comparisons of this file; all sequences are the losses of the first steps."""
    allowed = allowed_differences(plain, plain_reversed, plain_float64)
    shares = [d / a for d, a in zip(differences(fused, plain), allowed, strict=True)]
    exact = largest_relative_difference(fused_float64, plain_float64)
    first = largest_relative_difference(fused[:1], plain[:1])
    return [
        Check("first loss, relative difference", first, FIRST_LOSS),
        Check(f"first {len(plain)} losses in float64, largest relative difference", exact, FLOAT64),
        Check(f"first {len(plain)} losses in float32, share of what is allowed", max(shares), 1.0),
    ]
