"""Resident plans on a device of which a process may use less than they were made for, as in a slice
of it, or that has no cooperative launches: a team that cannot run is not launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import Case, make_weights, make_x, operators
from conftest import why_not
from regimes import device

from cbam_cuda.plan import plan

pytestmark = pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")

NO_ROOM = "this process may not use enough of the device for a team"
NO_COOPERATION = "the device takes no cooperative launches"
EMULATED_MULTIPROCESSORS = 132  # of the emulator's device


@dataclass(frozen=True)
class Team:
    """A team that a plan for all of a GPU has, and the fewest multiprocessors that hold it."""

    kind: str
    gpu: str
    case: Case
    enough: dict[str, int]  # by direction
    picked: tuple[str, ...] = ()  # directions in which it is what "auto" picks

    def __str__(self) -> str:
        return f"{self.kind} of a {self.gpu}"


TEAMS = (
    # 16 blocks, of which a multiprocessor holds 4.
    Team(
        "cluster",
        "H100",
        Case("a cluster", (2, 128, 28, 28), 8, (7, 7)),
        {"forward": 4, "backward": 4},
    ),
    # 64 blocks, all of which must run at once.
    Team(
        "grid",
        "A100",
        Case("a grid", (8, 64, 28, 28), 4, (7, 7)),
        {"forward": 16, "backward": 16},
    ),
    Team(
        "grid",
        "T4",
        Case("a grid where memory is slow", (16, 128, 28, 28), 8, (7, 7)),
        {"forward": 14},
        picked=("forward",),
    ),
)


@pytest.fixture
def room(emulator):
    """Leave so many multiprocessors of the device to this process; plans do not know."""
    yield emulator.emulator_set_multiprocessors
    emulator.emulator_set_multiprocessors(EMULATED_MULTIPROCESSORS)


@pytest.fixture
def no_cooperative_launches(emulator):
    """The device takes none, as some drivers have it."""
    emulator.emulator_set_cooperative_launch(0)
    yield
    emulator.emulator_set_cooperative_launch(1)


@pytest.fixture(params=TEAMS, ids=str)
def team(request, emulator):
    with device(emulator, request.param.gpu):
        yield request.param


@pytest.fixture(params=["forward", "backward"])
def direction(request, team):
    if request.param not in team.enough:
        pytest.skip("for the other direction")
    return request.param


@pytest.fixture
def call(team, direction, emulator, strategy):
    """What comes out by a strategy, and whether that took one launch for the passes over x."""
    run, case = operators("emulated"), team.case
    x, grad = (make_x(case, torch.float16, seed=seed) for seed in (0, 2))
    weights = make_weights(case, torch.float16)
    strategy("streaming")
    saved = run.forward_train(x, *weights)[1:]
    launches = {
        name: len(found["stages"]) * -(-len(x) // found["group"]) + found["summing_launches"]
        for name in ("streaming", "resident")
        for found in [planned(team, direction, name)]
    }

    def called(name: str) -> tuple[tuple[torch.Tensor, ...], str]:
        strategy(name)
        emulator.emulator_reset_counts()
        if direction == "forward":
            found = run.forward_train(x, *weights)
        else:
            found = run.backward(grad, None, None, x, *weights, *saved, [True] * 7)
        (ran,) = (n for n, count in launches.items() if count == emulator.emulator_launches())
        return tuple(found), ran

    return called


def planned(team: Team, direction: str, strategy: str = "auto") -> dict:
    return plan(
        team.case.shape,
        "float16",
        team.gpu,
        hidden=team.case.hidden,
        training=direction == "forward",
        backward=direction == "backward",
        strategy=strategy,
    )


def same_bits(found, expected) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_team_without_room_is_streamed(team, direction, call, room):
    if direction not in team.picked:
        pytest.skip("streamed anyway")
    found = planned(team, direction)
    assert found["strategy"] == "resident"
    assert found["passes"]["resident"]["kind"] == team.kind
    held, streamed = call("resident")[0], call("streaming")[0]
    for multiprocessors, expected in (
        (team.enough[direction], (held, "resident")),
        (team.enough[direction] - 1, (streamed, "streaming")),
        (1, (streamed, "streaming")),
        (EMULATED_MULTIPROCESSORS, (held, "resident")),
    ):
        room(multiprocessors)
        results, ran = call("auto")
        assert ran == expected[1]
        assert same_bits(results, expected[0])


def test_a_team_without_room_that_is_asked_for(team, direction, call, room):
    room(team.enough[direction] - 1)
    with pytest.raises(ValueError, match=NO_ROOM):
        call("resident")
    room(team.enough[direction])
    assert call("resident")[1] == "resident"


def test_grids_where_there_are_no_cooperative_launches(
    team, direction, call, no_cooperative_launches
):
    runs = team.kind == "cluster"
    picked = runs and direction in team.picked
    assert call("auto")[1] == ("resident" if picked else "streaming")
    if runs:
        assert call("resident")[1] == "resident"
        return
    with pytest.raises(ValueError, match=NO_COOPERATION):
        call("resident")
