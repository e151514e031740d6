"""The backends that the suite runs over, and the fixtures that every file shares."""

from __future__ import annotations

import ctypes
import importlib.util
import os

# Each worker of pytest has as many threads of OpenMP as there are processors. Those that wait in
# turns of a loop take the processors from those that work, which was most of the time of tests on
# small tensors. OpenMP reads this when torch loads it; processes that a test starts inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import library

import cbam_cuda

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("suite")


# What PyTorch computes on CUDA for comparison. By default cuDNN rounds float32 convolutions to
# TF32, which no fused kernel does, and which the rule in tolerance.py would forgive us in turn; and
# some of its algorithms add in another order at every call, as second derivatives then do.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

FUSED = ("cpu", "emulated", "cuda")


def why_not(backend: str) -> str | None:
    """Why a fused backend cannot run here, or None."""
    state = cbam_cuda.info()["backends"][backend]
    if backend == "cuda" and torch.cuda.is_available():  # there may be others
        state = cbam_cuda.ops.missing("cuda", torch.cuda.current_device()) or "available"
    return None if state == "available" else f"{backend}: {state}"


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fused backend; cases.device_of tells whose tensors it takes."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    if request.param == "emulated":  # it shares its device with the cpu backend
        monkeypatch.setenv("CBAM_CUDA_BACKEND", "emulated")
    return request.param


@pytest.fixture
def strategy(monkeypatch: pytest.MonkeyPatch):
    """Choose the strategy of the CUDA backend by its name."""
    return lambda name: monkeypatch.setenv("CBAM_CUDA_STRATEGY", name)


@pytest.fixture
def emulator() -> ctypes.CDLL:
    """The emulator behind the backend "emulated"."""
    loaded = ctypes.CDLL(str(cbam_cuda.ops._emulator()))
    loaded.emulator_launches.restype = ctypes.c_ulonglong
    loaded.emulator_prefetched.restype = ctypes.c_ulonglong
    loaded.emulator_prefetched_bytes.restype = ctypes.c_ulonglong
    loaded.emulator_prefetched.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return loaded


@pytest.fixture
def threads():
    """Set torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cuda_autocast():
    """On the CPU, autocast that casts convolutions in derivatives too, as it does on CUDA."""

    def cast(x, weight, bias, *rest):
        dtype = torch.get_autocast_dtype("cpu")
        with torch._C._DisableAutocast():
            bias = None if bias is None else bias.to(dtype)
            return torch.ops.aten.convolution.default(x.to(dtype), weight.to(dtype), bias, *rest)

    with library._scoped_library("aten", "IMPL") as aten:
        aten.impl("convolution", cast, "AutocastCPU")
        yield
