"""The resident backward on the emulator: every way to hold samples on the chip gives gradients as
good as eager's, and streaming's, in one launch and those that sum over the batch. What it reads,
and that it gives the same bits in every schedule, is shown in test_emulated.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import (
    CASES,
    LAYOUTS,
    NATIVE_LAYOUTS,
    Case,
    gradients,
    leaves,
    make_weights,
    make_x,
    reordered_gradients,
)
from cases import operators as operators_of
from conftest import why_not
from regimes import (
    CHANNELS_LAST,
    HELD,
    IN_EITHER_DIRECTION,
    NOT_POSSIBLE,
    SPLITS,
    STAYING,
    WEIGHTS_THAT_STAY,
    Regime,
    device,
    plan_of,
)
from tolerance import assert_as_good_as_eager, assert_strategies_agree

import cbam_cuda
from cbam_cuda.arguments import Weights

pytestmark = pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")

NAMES = ("x", *Weights._fields)


def operators():
    return operators_of("emulated")


def assert_agree(found, streaming) -> None:
    """With what streaming gives, in roundings of each gradient's largest value: small ones may be
    sums of large terms.
    """
    for name, *both in zip(NAMES, found, streaming, strict=True):
        largest = both[1].abs().max().double().clamp(min=torch.finfo(torch.float32).tiny)
        assert_strategies_agree(name, *(t / largest for t in both), both[1].dtype)


def assert_is_right(case: Case, dtype, layout: str, strategy, *strategies: str) -> list:
    """Every gradient by these strategies, against the reference in float64. Returns them."""
    x, grad = (LAYOUTS[layout](make_x(case, dtype, seed=seed)) for seed in (0, 2))
    weights = make_weights(case, dtype)
    strategy("streaming")
    saved = operators().forward_train(x, *weights)[1:]
    eager = gradients("reference", leaves(x, weights), grad)[1:]
    truth = gradients("reference", leaves(x, weights, torch.float64), grad.double())[1:]
    reordered = reordered_gradients(leaves(x, weights), grad)[1:]
    results = []
    for name in strategies:
        strategy(name)
        found = operators().backward(grad, None, None, x, *weights, *saved, [True] * 7)
        results.append(found)
        assert found[0].stride() == x.stride()
        for what, result, *others in zip(NAMES, found, eager, truth, reordered, strict=True):
            shaped = result.view(others[0].shape).to(others[0].dtype)
            assert_as_good_as_eager(f"{what}, {name}", shaped, *others)
    return results


def possible(case: Case, dtype, layout: str, split: str) -> bool:
    try:
        plan_of(case, dtype, layout, strategy=split, backward=True)
    except ValueError as error:
        if NOT_POSSIBLE not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", HELD, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_every_strategy(case, dtype, layout, strategy):
    assert_is_right(case, dtype, layout, strategy, "streaming")
    for split in SPLITS:
        if possible(case, dtype, layout, split):
            assert_is_right(case, dtype, layout, strategy, split)
        else:
            with pytest.raises(ValueError, match=NOT_POSSIBLE):
                assert_is_right(case, dtype, layout, strategy, split)


REGIMES = (
    *IN_EITHER_DIRECTION,
    Regime("packed rows", (3, 64, 14, 14), 4, plan={"access": "packed", "x": "stays"}),
    Regime(
        "pixels of clusters of 16",
        (2, 256, 56, 56),
        16,
        plan={"split": "pixels", "team": 16, "x": "stays"},
        strategy="resident-pixels:cluster:16",
    ),
    Regime(
        "pixels of a cluster, channels last",
        (5, 64, 52, 52),
        4,
        "H100",
        4,
        CHANNELS_LAST,
        plan={"split": "pixels", "kind": "cluster", "x": "stays", "rounds": 5},
        strategy="resident-pixels:cluster",
    ),
    Regime(
        "pixels, x comes and goes",
        (3, 96, 40, 40),
        4,
        multiprocessors=2,
        plan={"split": "pixels", "kind": "cluster", "x": "is read twice", "rounds": 3},
        strategy="resident-pixels:cluster",
    ),
    Regime(
        "pixels, x comes and goes, channels last",
        (3, 96, 40, 40),
        4,
        "H100",
        2,
        CHANNELS_LAST,
        plan={"split": "pixels", "kind": "cluster", "x": "is read twice", "rounds": 3},
        strategy="resident-pixels:cluster",
    ),
    Regime(
        "unequal pixels of a grid, x comes and goes",
        (3, 128, 28, 28),
        8,
        "T4",
        5,
        plan={"split": "pixels", "copy": "plain", "x": "is read twice", "uneven": True},
    ),
    Regime(
        "the same, channels last, asynchronous copies",
        (2, 96, 40, 40),
        4,
        "A100",
        3,
        CHANNELS_LAST,
        plan={"split": "pixels", "copy": "async", "x": "is read twice", "uneven": True},
    ),
    Regime(
        "pixels of a volume",
        (2, 64, 5, 8, 16),
        9,
        "A100",
        layout=CHANNELS_LAST,
        plan={"split": "pixels", "kind": "grid"},
        strategy="resident-pixels",
    ),
    Regime(
        "pixels of a sequence",
        (5, 4, 4096),
        2,
        multiprocessors=4,
        plan={"split": "pixels", "rounds": 2},
        strategy="resident-pixels",
    ),
    Regime(
        "x comes and goes, many visits",
        (5, 64, 56, 56),
        4,
        multiprocessors=4,
        plan={"x": "is read twice", "rounds": 5},
    ),
    Regime(
        "x comes and goes, channels last",
        (5, 64, 56, 56),
        4,
        "H100",
        4,
        CHANNELS_LAST,
        plan={"x": "is read twice", "rounds": 5},
        strategy="resident-channels",
    ),
    Regime(
        "x comes and goes, packed rows",
        (4, 1024, 7, 7),
        16,
        "RTX 5090",
        2,
        plan={"x": "is read twice", "access": "packed", "rounds": 4, "holds_weights": False},
    ),
    Regime(
        "x comes and goes on the whole grid",
        (3, 128, 28, 28),
        8,
        "A100",
        2,
        plan={"x": "is read twice", "kind": "grid", "rounds": 3},
    ),
    Regime(
        "the same, channels last",
        (3, 128, 28, 28),
        8,
        "A100",
        2,
        CHANNELS_LAST,
        plan={"x": "is read twice", "kind": "grid", "rounds": 3},
    ),
    Regime(
        "x comes and goes, unequal blocks",
        (2, 164, 34, 34),
        4,
        multiprocessors=8,
        plan={"x": "is read twice", "kind": "cluster", "uneven": True},
        strategy="resident-channels:cluster:4",
    ),
    Regime(
        "x comes and goes, three unequal blocks of a grid",
        (2, 164, 20, 20),
        4,
        "A100",
        3,
        dtype=torch.float32,
        plan={"x": "is read twice", "team": 3, "uneven": True, "rounds": 2},
    ),
    Regime(
        "x comes and goes through registers",
        (2, 164, 20, 20),
        4,
        "T4",
        8,
        dtype=torch.float32,
        plan={"x": "is read twice", "copy": "plain", "split": "channels", "rounds": 2},
    ),
    Regime(
        "several samples of a visit",
        (33, 512, 7, 7),
        128,
        multiprocessors=32,
        plan={"samples": 8, "rounds": 2},
    ),
    Regime(
        "several samples, channels last",
        (21, 512, 7, 7),
        128,
        "H100",
        16,
        CHANNELS_LAST,
        plan={"samples": 8},
        strategy="resident:grid:0:0:8",
    ),
    Regime(
        "several samples on the whole grid",
        (19, 512, 7, 7),
        128,
        "A100",
        32,
        plan={"kind": "grid", "samples": 8},
        strategy="resident:grid:0:0:8",
    ),
    Regime(
        "the whole grid, channels last",
        (7, 128, 14, 14),
        8,
        "A100",
        16,
        CHANNELS_LAST,
        plan={"kind": "grid", "copy": "async"},
    ),
    Regime(
        "copies through registers",
        (9, 128, 14, 14),
        8,
        "T4",
        8,
        plan={"kind": "grid", "copy": "plain", "rounds": 3},
    ),
)


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_every_regime(regime, emulator, strategy):
    assert regime.facts(backward=True) == regime.plan
    with device(emulator, regime.gpu, regime.multiprocessors):
        what = (regime.case, regime.dtype, regime.layout)
        assert_agree(*assert_is_right(*what, strategy, regime.strategy, "streaming"))


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("weights", WEIGHTS_THAT_STAY, ids=str)
def test_weights_that_stay(weights, layout, emulator, strategy):
    """On their way to the chip: of another type than x, and at any address."""
    assert dataclasses.replace(STAYING, layout=layout).facts(backward=True) == STAYING.plan
    x, grad = (LAYOUTS[layout](make_x(STAYING.case, STAYING.dtype, seed=seed)) for seed in (0, 2))
    given = (x, *WEIGHTS_THAT_STAY[weights])
    strategy("streaming")
    saved = operators().forward_train(*given)[1:]
    with device(emulator, STAYING.gpu, STAYING.multiprocessors):
        found = []
        for name in ("resident", "streaming"):
            strategy(name)
            found.append(operators().backward(grad, None, None, *given, *saved, [True] * 7))
    assert_agree(*found)


GATES = Case("gates", (3, 32, 12, 12), 4, (5, 5))


def gate_gradients(tensors, grad, more) -> tuple[torch.Tensor, ...]:
    """By the reference, where the gates get more gradients, or none for None."""
    out, *gates = cbam_cuda.cbam(*tensors, backend="reference", return_attention=True)
    given = [(g, m.view(g.shape)) for g, m in zip(gates, more, strict=True) if m is not None]
    outputs, into = zip((out, grad), *given, strict=True)
    return torch.autograd.grad(outputs, tensors, into)


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,)])
def test_gradients_of_the_gates(wanted, layout, strategy):
    """What reaches the gates from elsewhere, by every strategy."""
    x, grad = (LAYOUTS[layout](make_x(GATES, torch.float32, seed=seed)) for seed in (0, 2))
    weights = make_weights(GATES, torch.float32)
    strategy("streaming")
    saved = operators().forward_train(x, *weights)[1:]
    given = [torch.randn_like(saved[i]) if i in wanted else None for i in range(2)]
    eager = gate_gradients(leaves(x, weights), grad, given)
    wide = [None if g is None else g.double() for g in given]
    truth = gate_gradients(leaves(x, weights, torch.float64), grad.double(), wide)
    for name in ("streaming", *SPLITS):
        strategy(name)
        found = operators().backward(grad, *given, x, *weights, *saved, [True] * 7)
        for what, result, *both in zip(NAMES, found, eager, truth, strict=True):
            assert_as_good_as_eager(f"{what}, {name}", result.view(both[0].shape), *both)


# None, all, one alone, all but one, and those of one kind.
MASKS = {
    *(tuple(flag ^ (i == k) for i in range(7)) for k in range(8) for flag in (False, True)),
    (False, True, False, True, False, False, False),
    (False, False, True, False, True, False, False),
    (False, False, False, False, False, True, True),
}


# The same of a larger MLP, whose layers take a launch each.
LARGER = dataclasses.replace(GATES, name="larger MLP", hidden=40)


@pytest.mark.parametrize(
    ("name", "case", "launches"),
    [("streaming", GATES, 5), ("streaming", LARGER, 6), *((split, GATES, 1) for split in SPLITS)],
    ids=str,
)
def test_only_what_is_asked_for(name, case, launches, emulator, strategy):
    """Launches, and the same bits as with all gradients."""
    x, grad = (make_x(case, torch.float32, seed=seed) for seed in (0, 2))
    weights = make_weights(case, torch.float32)
    strategy(name)
    saved = operators().forward_train(x, *weights)[1:]
    everything = operators().backward(grad, None, None, x, *weights, *saved, [True] * 7)
    for mask in MASKS:
        emulator.emulator_reset_counts()
        found = operators().backward(grad, None, None, x, *weights, *saved, list(mask))
        products, sums = any(mask[i] for i in (1, 3)), any(mask[i] for i in (2, 4, 5, 6))
        needed = launches if mask[0] else 4 if any(mask[1:5]) else 2
        if any(mask):  # else there is nothing to launch for
            assert emulator.emulator_launches() == min(launches, needed) + products + sums
        for wanted, one, of_all in zip(mask, found, everything, strict=True):
            assert torch.equal(one, of_all) if wanted else one.numel() == 0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_a_nan_in_any_block_of_a_team(layout, split, emulator, strategy):
    """It makes its own sample's gradient NaN and touches no other."""
    case = Case("NaN", (3, 64, 16, 16), 4, (7, 7))
    weights, x = make_weights(case, torch.float32), LAYOUTS[layout](make_x(case, torch.float32))
    strategy(split)
    with device(emulator, "H100", 16):
        saved = operators().forward_train(x, *weights)[1:]
        for channel, row in ((0, 0), (17, 5), (63, 15)):
            grad = LAYOUTS[layout](make_x(case, torch.float32, seed=2))
            grad[1, channel, row, 3] = torch.nan
            dx = operators().backward(grad, None, None, x, *weights, *saved, [True] * 7)[0]
            assert dx[1].isnan().all()
            assert dx[[0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_a_sample_does_not_depend_on_its_place(layout, emulator, strategy):
    """The same bits in the first and in the last visit, which has fewer samples."""
    case = Case("places", (19, 512, 7, 7), 128, (7, 7))
    weights = make_weights(case, torch.float32)
    x, grad = (make_x(case, torch.float32, seed=seed) for seed in (0, 2))
    x, grad = (LAYOUTS[layout](t[:1].expand_as(t).contiguous()) for t in (x, grad))
    strategy("resident")
    with device(emulator, "H100", 16):
        out, *saved = operators().forward_train(x, *weights)
        dx = operators().backward(grad, None, None, x, *weights, *saved, [True] * 7)[0]
    assert torch.equal(out, out[:1].expand_as(out))
    assert torch.equal(dx, dx[:1].expand_as(dx))


def trained(block, x) -> dict[str, torch.Tensor]:
    """The gradients of a loss."""
    wanted = {"x": x.clone().requires_grad_(), **dict(block.named_parameters())}
    loss = block(wanted["x"]).square().sum()
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values()), strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_training_by_resident_plans(split, strategy):
    """From module to gradients, as a user gets them."""
    strategy(split)
    block = cbam_cuda.CBAM(32, backend="emulated")
    x = torch.randn(4, 32, 16, 16)
    found = trained(block, x)
    plain = cbam_cuda.CBAM(32, backend="reference")
    plain.load_state_dict(block.state_dict())
    eager, truth = trained(plain, x), trained(plain.double(), x.double())
    for name, *gradient in zip(found, found.values(), eager.values(), truth.values(), strict=True):
        assert_as_good_as_eager(name, *gradient)
