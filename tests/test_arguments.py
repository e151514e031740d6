"""Bad input: every error names the argument, what was expected and what came, on every backend."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Case, device_of, make_weights, make_x
from conftest import FUSED, why_not

from cbam_cuda import CBAM, CBAM3d, CBAM_Module, cbam, ops, reference, training

CASE = Case("", (2, 8, 6, 5), 2, (3, 3))
SEQUENCE = Case("", (2, 8, 6), 2, (3,))


@pytest.fixture(params=[*FUSED, "reference"])
def call(request):
    """Calls cbam with some arguments of a good call replaced."""
    backend = request.param
    if backend != "reference" and (reason := why_not(backend)):
        pytest.skip(reason)
    device = device_of(backend)

    def run(dtype=torch.float32, case=CASE, **replaced):
        weights = make_weights(case, dtype, device)._asdict()
        arguments = {"x": make_x(case, dtype, device), **weights}
        for name, value in replaced.items():
            arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
        return cbam(**arguments, backend=backend)

    return run


WRONG_SHAPES = {
    "x of the wrong channel count": (
        {"x": torch.zeros(2, 9, 6, 5)},
        r"fc1_weight: expected \[hidden, 9\].* for x with 9 channels, got shape \[2, 8, 1, 1\]",
    ),
    "x without a batch": (
        {"x": torch.zeros(8, 6)},
        r"x: expected \[samples, channels, \*space\] .* got shape \[8, 6\]",
    ),
    "x with four dimensions of space": (
        {"x": torch.zeros(2, 8, 2, 2, 2, 2)},
        r"x: expected .* 1, 2 or 3 spatial dimensions, got shape \[2, 8, 2, 2, 2, 2\]",
    ),
    "x of another number of dimensions than the kernel": (
        {"x": torch.zeros(2, 8, 6)},
        r"fc1_weight: expected \[hidden, 8\] or \[hidden, 8, 1\] .* got shape \[2, 8, 1, 1\]",
    ),
    "x with empty space": (
        {"x": torch.zeros(2, 8, 0, 5)},
        r"x: expected .* one position in space, got shape \[2, 8, 0, 5\]",
    ),
    "x without channels": (
        {"x": torch.zeros(2, 0, 6, 5)},
        r"x: expected at least one channel .* got shape \[2, 0, 6, 5\]",
    ),
    "fc1_weight with taps": (
        {"fc1_weight": torch.zeros(2, 8, 3, 3)},
        r"fc1_weight: expected .* got shape \[2, 8, 3, 3\]",
    ),
    "fc1_weight without hidden channels": (
        {"fc1_weight": torch.zeros(0, 8, 1, 1)},
        r"fc1_weight: expected at least one hidden channel, got 0",
    ),
    "fc1_bias": (
        {"fc1_bias": torch.zeros(3)},
        r"fc1_bias: expected shape \[2\], got \[3\]",
    ),
    "fc2_weight": (
        {"fc2_weight": torch.zeros(8, 3, 1, 1)},
        r"fc2_weight: expected shape \[8, 2, 1, 1\], got \[8, 3, 1, 1\]",
    ),
    "fc2_bias": (
        {"fc2_bias": torch.zeros(8, 1)},
        r"fc2_bias: expected shape \[8\], got \[8, 1\]",
    ),
    "conv_weight of one map": (
        {"conv_weight": torch.zeros(1, 1, 3, 3)},
        r"conv_weight: expected \[1, 2, odd, odd\] .* got shape \[1, 1, 3, 3\]",
    ),
    "conv_weight of two outputs": (
        {"conv_weight": torch.zeros(2, 2, 3, 3)},
        r"conv_weight: expected \[1, 2, odd, odd\] .* got shape \[2, 2, 3, 3\]",
    ),
    "even kernel": (
        {"conv_weight": torch.zeros(1, 2, 3, 4)},
        r"conv_weight: expected odd kernel sizes, got \[3, 4\]",
    ),
    "kernel of no taps": (
        {"conv_weight": torch.zeros(1, 2, 0, 3)},
        r"conv_weight: expected odd kernel sizes, got \[0, 3\]",
    ),
    "conv_bias": (
        {"conv_bias": torch.zeros(2)},
        r"conv_bias: expected shape \[1\], got \[2\]",
    ),
}


@pytest.mark.parametrize("what", WRONG_SHAPES)
def test_wrong_shape(call, what):
    replaced, message = WRONG_SHAPES[what]
    with pytest.raises(ValueError, match=message):
        call(**replaced)


WRONG_TYPES = {
    "x is no tensor": ({"x": [[1.0]]}, r"x: expected a Tensor, got list"),
    "x is None": ({"x": None}, r"x: expected a Tensor, got NoneType"),
    "weight is None": ({"fc1_weight": None}, r"fc1_weight: expected a Tensor, got NoneType"),
    "bias is a number": (
        {"fc2_bias": 0.0},
        r"fc2_bias: expected a Tensor or None, got float",
    ),
    "x is integer": (
        {"x": torch.zeros(2, 8, 6, 5, dtype=torch.int64)},
        r"x: expected float32, float64, float16 or bfloat16, got int64",
    ),
    "x is sparse": (
        {"x": torch.zeros(2, 8, 6, 5).to_sparse()},
        r"x: expected a strided tensor, got layout torch.sparse_coo",
    ),
    "weight is sparse": (
        {"fc2_weight": torch.zeros(8, 2, 1, 1).to_sparse()},
        r"fc2_weight: expected a strided tensor",
    ),
    "x is complex": (
        {"x": torch.zeros(2, 8, 6, 5, dtype=torch.complex64)},
        r"x: expected .*, got complex64",
    ),
    "float64 x beside float32 weights": (
        {"x": torch.zeros(2, 8, 6, 5, dtype=torch.float64)},
        r"fc1_weight: expected float64, got float32",
    ),
    "float32 x beside float64 weights": (
        {"fc1_weight": torch.zeros(2, 8, 1, 1, dtype=torch.float64)},
        r"fc1_weight: expected float32, got float64",
    ),
    "float16 x beside bfloat16 weights": (
        {
            "x": torch.zeros(2, 8, 6, 5, dtype=torch.float16),
            "fc1_weight": torch.zeros(2, 8, 1, 1, dtype=torch.bfloat16),
        },
        r"fc1_weight: expected float16 \(the dtype of x\) or float32, got bfloat16",
    ),
    "weights of two dtypes": (
        {"conv_weight": torch.zeros(1, 2, 3, 3, dtype=torch.float64)},
        r"conv_weight: expected float32, the dtype of fc1_weight, got float64",
    ),
}


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_wrong_type(call, what):
    replaced, message = WRONG_TYPES[what]
    with pytest.raises(TypeError, match=message):
        call(**replaced)


def test_more_positions_than_an_index_holds():
    weights = make_weights(SEQUENCE, torch.float32, "meta")
    with pytest.raises(ValueError, match=r"x: expected fewer than 2147483647 positions in space"):
        cbam(torch.empty(1, 8, 2**31, device="meta"), *weights)
    assert cbam(torch.empty(1, 8, 2**31 - 2, device="meta"), *weights).shape[2] == 2**31 - 2


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_mixed_devices(backend):
    weights = make_weights(CASE, torch.float32, "meta")
    with pytest.raises(ValueError, match=r"conv_bias: expected device \w+(:0)?, .*, got meta"):
        cbam(
            make_x(CASE, torch.float32),
            *make_weights(CASE, torch.float32)._replace(conv_bias=weights.conv_bias),
            backend=backend,
        )


WRONG_MODULES = {
    "ratio 0": ({"ratio": 0}, ValueError, r"ratio: expected at least 1, got 0"),
    "no hidden channel": (
        {"ratio": 65},
        ValueError,
        r"ratio: expected at most in_channels \(64\), got 65, which leaves no hidden channel",
    ),
    "ratio is a float": ({"ratio": 16.0}, TypeError, r"ratio: expected an int, got float"),
    "no channels": ({"in_channels": 0}, ValueError, r"in_channels: expected at least 1, got 0"),
    "channels are a bool": ({"in_channels": True}, TypeError, r"in_channels: .* got bool"),
    "even kernel": ({"kernel_size": 4}, ValueError, r"kernel_size: expected odd numbers, got 4"),
    "one of two is even": ({"kernel_size": (3, 4)}, ValueError, r"odd numbers, got \(3, 4\)"),
    "three of two": (
        {"kernel_size": [3] * 3},
        ValueError,
        r"for each of 2 dimensions .* \[3, 3, 3\]",
    ),
    "kernel of letters": ({"kernel_size": "33"}, TypeError, r"kernel_size: .* got str"),
    "kernel of a float": ({"kernel_size": (3, 3.0)}, TypeError, r"kernel_size: .* got float"),
    "kernel of no taps": ({"kernel_size": -1}, ValueError, r"kernel_size: .* got -1"),
    "dim 4": ({"dim": 4}, ValueError, r"dim: expected 1, 2 or 3, got 4"),
    "dim 0": ({"dim": 0}, ValueError, r"dim: expected at least 1, got 0"),
    "unknown backend": ({"backend": "gpu"}, ValueError, r"backend: expected one of auto, .*'gpu'"),
}


@pytest.mark.parametrize("what", WRONG_MODULES)
def test_wrong_module(what):
    options, error, message = WRONG_MODULES[what]
    with pytest.raises(error, match=message):
        CBAM(**{"in_channels": 64, **options})
    if "backend" not in options:
        with pytest.raises(error, match=message):
            reference.CBAM(**{"in_channels": 64, **options})
        arguments = {"dim": 2, "in_channels": 64, "ratio": 16, "kernel_size": 7, **options}
        with pytest.raises(error, match=message):
            CBAM_Module(**arguments)


def test_sizes_may_be_integers_of_numpy():
    numpy = pytest.importorskip("numpy")
    block = CBAM_Module(numpy.int64(2), numpy.int32(64), numpy.int64(4), numpy.int8(3))
    assert [*block.fc1.weight.shape[:2], *block.conv.weight.shape[2:]] == [16, 64, 3, 3]


def test_module_of_another_number_of_dimensions():
    with pytest.raises(ValueError, match=r"x: expected .* 3 spatial dimensions, got shape \[1, 32"):
        CBAM3d(32)(torch.zeros(1, 32, 5, 5))


# The operators are public, too: called directly, they must not leave their memory.


def direct_arguments():
    x, weights = make_x(CASE, torch.float32), make_weights(CASE, torch.float32)
    saved = torch.ops.cbam_cuda.forward_train(x, *weights)[1:]
    return [x, None, None, x, *weights, *saved, [True] * 7]


DIRECT = {
    "weights of another shape": (4, torch.zeros(2, 9, 1, 1), "fc1_weight: expected shape"),
    "weights of another dtype": (6, torch.zeros(8, 2, 1, 1).double(), "fc2_weight: expected dtype"),
    "gradient of another shape": (0, torch.zeros(2, 8, 6, 4), "grad_out: expected shape"),
    "saved tensor of another shape": (10, torch.zeros(2, 8), "channel_gate: expected shape"),
    "saved tensor of another dtype": (14, torch.zeros(2, 2, 6, 5).half(), "maps: expected dtype"),
    "pixel out of range": (15, torch.full((2, 8), 30).int(), r"indices in \[0, 30\)"),
    "channel out of range": (16, torch.full((2, 30), -1).int(), r"indices in \[0, 8\)"),
    "mask too short": (17, [True], "output_mask: expected 7"),
    "gradient of an absent bias": (5, None, "output_mask: expected false"),
    "gate's gradient of another shape": (1, torch.zeros(2, 8), "grad_channel_gate: expected"),
}


@pytest.mark.parametrize("what", DIRECT)
def test_operator_called_directly(what):
    index, value, message = DIRECT[what]
    arguments = direct_arguments()
    arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cbam_cuda.backward(*arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 8), "x: expected 3, 4 or 5 dimensions, got 2"),
        (torch.zeros(2, 8, 0, 5), "no empty channel or spatial"),
        (torch.zeros(2, 8, 6, 5).int(), "x: expected float32"),
        (torch.zeros(2, 8, 6), "conv_weight: expected 3 dimensions"),
    ],
)
def test_forward_operator_called_directly(x, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cbam_cuda.forward(x, *make_weights(CASE, torch.float32))


def test_even_kernel_in_a_direct_call():
    weights = make_weights(CASE, torch.float32)._replace(conv_weight=torch.zeros(1, 2, 2, 3))
    with pytest.raises(RuntimeError, match="conv_weight: expected odd"):
        torch.ops.cbam_cuda.forward(make_x(CASE, torch.float32), *weights)


KNOWN = {
    "x is sparse": {"x": make_x(CASE, torch.float32).to_sparse()},
    "x is of another dtype": {"x": make_x(CASE, torch.float32).int()},
    "x is no tensor": {"x": make_x(CASE, torch.float32).numpy()},
    "a weight has another dtype": {"fc2_weight": torch.zeros(8, 2, 1, 1).double()},
    "a weight has another shape": {"conv_weight": torch.zeros(1, 2, 4, 4)},
    "a bias is a number": {"conv_bias": 1.0},
}


@pytest.mark.parametrize("replaced", KNOWN.values(), ids=KNOWN)
def test_a_call_that_passed_hides_no_wrong_one(call, replaced):
    call()
    with pytest.raises((TypeError, ValueError), match="expected"):
        call(**replaced)
    call()


def test_integers_are_refused_under_autocast_too():
    x, weights = make_x(CASE, torch.float32).int(), make_weights(CASE, torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="x: expected float32, float64, float16 or bfloat16, got"),
    ):
        cbam(x, *weights)


# More bytes than there are addresses.
HUGE = torch.zeros(1, 8, 1, 1).expand(2**36, 8, 2**13, 2**5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("x", [HUGE, HUGE.transpose(2, 3)], ids=["rows", "columns"])
def test_no_memory_is_said_in_the_words_that_programs_look_for(x, training):
    weights = make_weights(CASE, torch.float32)
    weights.fc1_weight.requires_grad_(training)
    said = "DefaultCPUAllocator: can't allocate memory. Tried to make a tensor of shape"
    with pytest.raises(RuntimeError, match=re.escape(said)):
        cbam(x, *weights, backend="cpu")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_memory_on_a_gpu_is_torchs_own_error(monkeypatch, direction):
    def fail(*_):
        raise RuntimeError("empty_strided, arguments.cpp:95, CUDA out of memory. Tried to make")

    x, weights = make_x(CASE, torch.float32).requires_grad_(), make_weights(CASE, torch.float32)
    if direction == "forward":
        monkeypatch.setattr(ops, "forward", fail)
        with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            cbam(x, *weights)
        return
    out = cbam(x, *weights)
    monkeypatch.setattr(training, "forward_gradients", fail)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        out.sum().backward()


def test_another_error_in_the_backward_stays_what_it_is(monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access")

    x, weights = make_x(CASE, torch.float32).requires_grad_(), make_weights(CASE, torch.float32)
    out = cbam(x, *weights)
    monkeypatch.setattr(training, "forward_gradients", fail)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        out.sum().backward()
