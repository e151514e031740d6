"""The logic of the demo, without the waiting."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

import cbam_cuda
from examples import agreement
from examples.network import Network

LOSSES = [2.0, 1.5, 1.0, 0.5]


def test_trainings_that_agree_pass():
    near = [loss * (1 + 1e-9) for loss in LOSSES]
    checks = agreement.loss_checks(LOSSES, near, near, LOSSES, LOSSES)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("step", range(4))
def test_trainings_that_differ_fail(step):
    off = [loss + (0.01 if i == step else 0.0) for i, loss in enumerate(LOSSES)]
    checks = agreement.loss_checks(LOSSES, off, LOSSES, LOSSES, off)
    assert [check.passed for check in checks] == [step != 0, False, False]


def test_nan_agrees_with_nothing():
    nan = [float("nan")] * 4
    assert not any(c.passed for c in agreement.loss_checks(LOSSES, nan, LOSSES, LOSSES, nan))


def test_network_of_the_demo_takes_either_class():
    torch.manual_seed(0)
    plain, fused = Network(cbam_cuda.reference.CBAM).eval(), Network(cbam_cuda.CBAM).eval()
    fused.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-4, atol=1e-5)
    gates = fused.spatial_gates(images)
    assert [tuple(g.shape) for g in gates] == [(2, 1, 28, 28), (2, 1, 14, 14), (2, 1, 7, 7)]
