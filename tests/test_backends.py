"""Which backend runs, and what the package says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from cases import Case, make_weights, make_x
from conftest import why_not

import cbam_cuda
from cbam_cuda import CBAM, cbam, choice, ops, reference

CASE = Case("", (2, 16, 6, 6), 2, (3, 3))

NO_KERNELS = frozenset()


@pytest.fixture
def inputs():
    return make_x(CASE, torch.float32), make_weights(CASE, torch.float32)


@pytest.fixture
def spied(monkeypatch):
    """Names the path that a call took."""
    taken = []
    forward, plain = ops.forward, reference.cbam
    monkeypatch.setattr(ops, "forward", lambda *a: taken.append("fused") or forward(*a))
    monkeypatch.setattr(
        reference, "cbam", lambda *a, **k: taken.append("reference") or plain(*a, **k)
    )
    return taken


@pytest.mark.parametrize(
    ("argument", "variable", "path"),
    [
        ("auto", None, "fused"),
        ("auto", "", "fused"),
        ("auto", "auto", "fused"),
        ("auto", "cpu", "fused"),
        ("auto", "reference", "reference"),
        ("cpu", "reference", "fused"),
        ("reference", None, "reference"),
        ("reference", "cpu", "reference"),
    ],
)
def test_argument_then_environment_then_device(
    inputs, spied, monkeypatch, argument, variable, path
):
    monkeypatch.delenv("CBAM_CUDA_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("CBAM_CUDA_BACKEND", variable)
    cbam(inputs[0], *inputs[1], backend=argument)
    assert spied == [path]


def test_unknown_name_in_the_environment(inputs, monkeypatch):
    monkeypatch.setenv("CBAM_CUDA_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"CBAM_CUDA_BACKEND: expected one of auto, .*'tpu'"):
        cbam(inputs[0], *inputs[1])


def test_named_backend_refuses_other_devices(inputs):
    with pytest.raises(ValueError, match="backend: 'cuda' expects tensors on cuda, got x on cpu"):
        cbam(inputs[0], *inputs[1], backend="cuda")


def test_named_backend_never_falls_back(inputs, monkeypatch):
    monkeypatch.setitem(ops._KERNELS, ops.FUSED, NO_KERNELS)
    with pytest.raises(RuntimeError, match="backend: 'cpu' cannot be used: this build has no"):
        cbam(inputs[0], *inputs[1], backend="cpu")


def test_emulated_without_its_library_says_how_to_build_it(inputs, monkeypatch, tmp_path):
    monkeypatch.setenv("CBAM_CUDA_EMULATOR", str(tmp_path / "none.so"))
    monkeypatch.delitem(ops._KERNELS, ops.EMULATED, raising=False)
    with pytest.raises(RuntimeError, match=r"'emulated' .*none.so does not exist.*make emulator"):
        cbam(inputs[0], *inputs[1], backend="emulated")
    assert "make emulator" in cbam_cuda.info()["backends"]["emulated"]


@pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")
def test_emulated_runs_a_script_that_does_not_know_of_it(inputs):
    code = """
        import torch, cbam_cuda
        from cbam_cuda import ops
        ops.forward = lambda *a, plain=ops.forward: print(a[-1]) or plain(*a)
        with torch.no_grad():
            cbam_cuda.CBAM(16, 8, 3)(torch.randn(2, 16, 6, 6))
    """
    assert run_python(code, CBAM_CUDA_BACKEND="emulated") == "cbam_cuda_emulated\n"
    assert run_python(code, CBAM_CUDA_BACKEND="cpu") == "cbam_cuda\n"


def test_auto_falls_back_and_says_so_once(inputs, spied, monkeypatch):
    monkeypatch.setitem(ops._KERNELS, ops.FUSED, NO_KERNELS)
    monkeypatch.setattr(choice, "_warned", set())
    with pytest.warns(UserWarning, match="plain PyTorch form on cpu: this build has no fused"):
        cbam(inputs[0], *inputs[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cbam(inputs[0], *inputs[1])
    assert spied == ["reference", "reference"]


def test_inference_takes_the_operator_without_autograd(inputs, spied):
    module = CBAM(16, 8, 3)
    with torch.no_grad():
        module(inputs[0])
    assert spied == ["fused"]
    module(inputs[0])  # needs gradients: forward_train
    assert spied == ["fused"]


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_works_without_the_compiled_module():
    output = run_python(
        """
        import sys
        sys.modules["cbam_cuda._C"] = None  # as if it did not load
        import torch, cbam_cuda
        x = torch.randn(2, 32, 5, 5)
        print(cbam_cuda.CBAM(32)(x).shape == x.shape)
        print(cbam_cuda.info()["backends"]["cpu"], cbam_cuda.info()["build"])
        try:
            cbam_cuda.CBAM(32, backend="cpu")(x)
        except RuntimeError as error:
            print(error)
        from cbam_cuda.__main__ import main
        main([])
        """
    )
    first, second, third, *_, last = output.splitlines()
    assert first == "True"
    assert "did not load" in second
    assert second.endswith("None")
    assert "'cpu' cannot be used" in third
    assert "pip install --no-build-isolation ." in third
    assert "did not load" in last


def test_info():
    facts = cbam_cuda.info()
    assert facts["version"] == cbam_cuda.__version__ == facts["build"]["version"]
    assert facts["torch"] == torch.__version__
    assert facts["backends"]["cpu"] == "available"
    assert facts["build"]["cpu_target"] in facts["build"]["cpu_targets"]
    assert "baseline" in facts["build"]["cpu_targets"]


def test_command_line():
    shown = subprocess.run(
        [sys.executable, "-m", "cbam_cuda"], capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith(f"cbam_cuda {cbam_cuda.__version__}, torch {torch.__version__}\n")
    assert "  cpu        available\n" in shown
    assert "  cpu_target " in shown


def test_command_line_in_this_process(capsys):
    from cbam_cuda.__main__ import main

    assert main([]) == 0
    assert "backends" in capsys.readouterr().out


# The CPU kernels are compiled for several targets; only the fastest runs by itself.

TARGETS = cbam_cuda.info()["build"]["cpu_targets"]
COMPARE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from cases import CASES, DTYPES, LAYOUTS, NATIVE_LAYOUTS, make_weights, make_x
from cases import gradients, leaves, reordered_gradients
from tolerance import assert_as_good_as_eager
import cbam_cuda
assert cbam_cuda.info()["build"]["cpu_target"] == {target!r}
for case in CASES:
    for dtype in DTYPES:
        for layout in NATIVE_LAYOUTS:
            x, grad = (LAYOUTS[layout](make_x(case, dtype, seed=s)) for s in (0, 2))
            weights = make_weights(case, dtype)
            fused = gradients("cpu", leaves(x, weights), grad)
            eager = gradients("reference", leaves(x, weights), grad)
            truth = gradients(
                "reference", leaves(x, weights, torch.float64), grad.double())
            reordered = reordered_gradients(leaves(x, weights), grad)
            for four in zip(fused, eager, truth, reordered, strict=True):
                assert_as_good_as_eager(f"{{case}} {{dtype}} {{layout}}", *four)
print("done")
"""


@pytest.mark.parametrize("target", TARGETS[1:])
def test_every_cpu_target_that_runs_here(target):
    code = COMPARE.format(tests=os.path.dirname(__file__), target=target)
    assert run_python(code, CBAM_CUDA_CPU_TARGET=target) == "done\n"


def test_unknown_cpu_target():
    output = run_python(
        """
        import cbam_cuda, torch
        try:
            cbam_cuda.CBAM(32)(torch.randn(1, 32, 4, 4))
        except RuntimeError as error:
            print(error)
        """,
        CBAM_CUDA_CPU_TARGET="mmx",
    )
    assert "CBAM_CUDA_CPU_TARGET: expected one of" in output
    assert "got mmx" in output
