"""Batch normalisation between the convolution and the sigmoid of the spatial gate."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from cases import DTYPES, device_of
from tolerance import assert_as_good_as_eager
from torch import library, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from cbam_cuda import CBAM, choice, ops, reference

SHAPES = {1: (3, 32, 50), 2: (3, 32, 12, 9), 3: (3, 32, 5, 6, 4)}


@pytest.fixture(autouse=True)
def nothing_warned_of(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())


def pair(dim: int = 2, **options) -> tuple[CBAM, reference.CBAM]:
    """The fused module and the plain one, with weights and statistics as after training."""
    torch.manual_seed(0)
    plain = reference.CBAM(32, 4, 3, dim=dim, norm=True, **options)
    with torch.no_grad():
        for tensor in plain.norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.3, 1.5)
    ours = CBAM(32, 4, 3, dim=dim, norm=True, **options)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours.eval(), plain.eval()


MODES = pytest.mark.parametrize("training", [False, True], ids=["known", "batch"])


@MODES
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend, dtype, conv_bias, dim, training):
    """Also the gradients of the norm's weight and bias."""
    ours, plain = pair(dim, conv_bias=conv_bias)
    device = device_of(backend)
    ours, eager = (m.to(device, dtype).train(training) for m in (ours, plain))
    ours.backend = backend
    assert_as_good(ours, eager, torch.randn(SHAPES[dim], dtype=dtype, device=device))
    torch.testing.assert_close(ours.norm.state_dict(), eager.norm.state_dict())


def assert_as_good(ours, eager, x) -> None:
    truth, grad = copy.deepcopy(eager).to("cpu", torch.float64), torch.randn_like(x)
    found = differentiated(ours, x, grad)
    plain = differentiated(eager, x, grad)
    backwards = differentiated(copy.deepcopy(eager), x.flip(0), grad.flip(0))
    exact = differentiated(truth, x.to("cpu", torch.float64), grad.to("cpu", torch.float64))
    if ours.norm.training and "conv.bias" in found:  # 0, but for rounding
        bound = torch.finfo(x.dtype).eps * exact["x"].abs().sum()
        assert found.pop("conv.bias").cpu().abs() <= bound
    for name, value in found.items():
        other = backwards[name].flip(0) if name in ("out", "x") else backwards[name]
        assert_as_good_as_eager(name, value, plain[name], exact[name], other)


def differentiated(module, x, grad) -> dict[str, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    out = module(leaf)
    gradients = torch.autograd.grad(out, [leaf, *weights.values()], grad)
    found = dict(zip(["out", "x", *weights], [out.detach(), *gradients], strict=True))
    # Two sums of their own, in either of which eager may happen to be right.
    if of_norm := [found.pop(name) for name in weights if "norm." in name]:
        found["norm"] = torch.cat(of_norm)
    return found


def test_gates_at_0_and_1(backend):
    """Where the derivative of the sigmoid is below what floats have."""
    ours, eager = (m.to(device_of(backend)).train() for m in pair())
    ours.backend = backend
    x = torch.randn(SHAPES[2], device=device_of(backend))
    for module in (ours, eager):
        module.norm.weight.data.fill_(30.0)
    gate = ours(x, return_attention=True)[2]
    assert (gate == 1).any()
    assert (gate < 1e-14).any()
    assert_as_good(ours, eager, x)
    ours.norm.weight.data.fill_(1e4)
    assert (ours(x, return_attention=True)[2] == 0).any()
    assert all(t.isfinite().all() for t in differentiated(ours, x, x).values())


@MODES
@pytest.mark.parametrize("frozen", ["", "norm", "conv", "fc", "fc2.bias", "conv norm", "fc conv"])
def test_gradients_of_some(backend, frozen, training):
    place = {"device": device_of(backend), "dtype": torch.float64}
    ours, eager = (m.to(**place).train(training) for m in pair())
    for module in (ours, eager):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(frozen.split())))
    ours.backend = backend
    assert_as_good(ours, eager, torch.randn(SHAPES[2], **place))
    x = torch.randn(SHAPES[2], **place)  # and without that of x
    for module in (ours, eager):
        module(x).square().sum().backward()
    for one, other in zip(ours.parameters(), eager.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and one is not ours.conv.bias:
            torch.testing.assert_close(one.grad, other.grad)


def function_of(block: CBAM):
    """Of x and all parameters, in double precision."""
    names = [name for name, _ in block.named_parameters()]

    def function(x, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(block, parameters, (x, True))

    tensors = [p.detach().requires_grad_() for p in block.parameters()]
    return function, tensors


@MODES
def test_gradcheck(backend, training):
    torch.manual_seed(0)
    block = CBAM(4, 2, 3, norm=True, device=device_of(backend), dtype=torch.float64)
    block.backend = backend
    function, tensors = function_of(block.train(training))
    x = torch.randn(2, 4, 3, 4, device=device_of(backend), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, [x, *tensors])
    assert torch.autograd.gradgradcheck(function, [x, *tensors], fast_mode=True)
    for chosen in (slice(0, 1), slice(1, 3)):  # out alone, the gates alone

        def part(*t, chosen=chosen):
            return function(*t)[chosen]

        assert torch.autograd.gradcheck(part, [x, *tensors], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(13, 32, 57, 56), (1, 32, 300, 301), (3, 32, 50000)], ids=str)
def test_any_number_of_threads_gives_the_same(threads, shape, dtype):
    """Sums of the batch are over more values than PyTorch leaves to one thread."""
    found = []
    for count in (1, 2, 3):
        threads(count)
        ours = pair(len(shape) - 2)[0].to(dtype).train()
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype)
        results = differentiated(ours, x, torch.randn_like(x))
        found.append([*results.values(), ours.norm.running_mean, ours.norm.running_var])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_second_derivatives_in_16_bits_do_not_overflow(backend):
    """The plain form's products in 16 bits would."""
    ours = pair()[0].to(device_of(backend), torch.float16).train()
    ours.backend = backend
    x = torch.randn(SHAPES[2], device=device_of(backend)).half().requires_grad_()
    (first,) = torch.autograd.grad(64 * ours(x).float().square().sum(), x, create_graph=True)
    second = torch.autograd.grad(first.float().square().mean(), [x, *ours.parameters()])
    assert all(gradient.isfinite().all() for gradient in second)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"eps": 0.5}, {"track_running_stats": False}, {"momentum": None}],
    ids=str,
)
@MODES
def test_other_norms(backend, options, training):
    ours, plain = (m.to(device_of(backend)) for m in pair())
    for module in (ours, plain):
        module.norm = nn.BatchNorm2d(1, **options, device=device_of(backend))
        module.train(training)
    ours.backend = backend
    for _ in range(3):
        assert_as_good(ours, plain, torch.randn(SHAPES[2], device=device_of(backend)))
    torch.testing.assert_close(ours.norm.state_dict(), plain.norm.state_dict())


def test_statistics_without_gradients(backend):
    """As they are recomputed for averaged weights."""
    ours, plain = (m.to(device_of(backend)).train() for m in pair())
    ours.backend = backend
    x = torch.randn(SHAPES[2], device=device_of(backend))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.norm.state_dict(), plain.norm.state_dict())


def test_no_samples(backend):
    ours = pair()[0].to(device_of(backend)).train()
    ours.backend = backend
    out = ours(torch.empty(0, 32, 6, 5, device=device_of(backend)))
    out.sum().backward()
    assert out.shape == (0, 32, 6, 5)
    assert all((p.grad == 0).all() for p in ours.parameters())
    assert ours.norm.running_var.isfinite()


def test_training_on_meta_describes_gradients():
    block = CBAM(32, 4, norm=True, device="meta")
    x = torch.empty(SHAPES[2], device="meta", requires_grad=True)
    block(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in block.parameters())


def test_one_position_is_refused_as_torch_does(backend):
    block = CBAM(32, 4, norm=True, device=device_of(backend))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block(torch.randn(1, 32, 1, 1, device=device_of(backend)))


def test_wrong_arguments_are_explained(backend):
    block = CBAM(32, 4, norm=True, device=device_of(backend))
    with pytest.raises(ValueError, match=r"fc1_weight: expected .* for x with 16 channels"):
        block(torch.randn(2, 16, 6, 5, device=device_of(backend)))
    with pytest.raises(TypeError, match="x: expected float32, float64"):
        block(torch.zeros(2, 32, 6, 5, device=device_of(backend), dtype=torch.int32))
    with pytest.raises(ValueError, match=r"fc1_weight: expected .* for x with 16 channels"):
        block.eval()(torch.randn(2, 16, 6, 5, device=device_of(backend)))
    block.train().conv.double()
    with pytest.raises(TypeError, match="conv_weight: expected float32, the dtype of fc1_weight"):
        block(torch.randn(2, 32, 6, 5, device=device_of(backend)))
    with pytest.raises(TypeError, match="fc1_weight: expected float32, got float64"):
        block.double()(torch.randn(2, 32, 6, 5, device=device_of(backend)))


def test_transforms_take_the_plain_form():
    ours, plain = (m.train() for m in pair())
    for module in (ours, plain):
        module.norm = nn.BatchNorm2d(1, track_running_stats=False)
    x, t = torch.randn(SHAPES[2]), torch.randn(SHAPES[2])
    expected = torch.func.jvp(plain, (x,), (t,))[1]
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (t,))[1], expected)
    ours.backend = "cpu"
    with pytest.raises(RuntimeError, match="backend: 'cpu' cannot be used under forward-mode"):
        torch.func.jvp(ours, (x,), (t,))


def test_training_that_jit_traces_takes_the_plain_form_and_says_so():
    ours, plain = (m.train() for m in pair())
    x = torch.randn(SHAPES[2])
    with pytest.warns(UserWarning, match="form as norm takes its statistics from the batch in a"):
        traced = torch.jit.trace(copy.deepcopy(ours), x, check_trace=False)
    torch.testing.assert_close(traced(x), plain(x))
    ours.backend = "cpu"
    with pytest.raises(RuntimeError, match="'cpu' cannot be used: norm takes its statistics"):
        torch.jit.trace(ours, x)


def test_statistics_of_several_processes_take_the_plain_form(monkeypatch):
    ours, plain = (m.train() for m in pair())
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    x = torch.randn(SHAPES[2])
    torch.testing.assert_close(ours(x), plain(x))  # there is one process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    ours.backend = "cpu"
    with pytest.raises(RuntimeError, match="statistics from the batches of several processes"):
        ours(x)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


def test_recomputed_in_the_backward_and_differentiated_again(backend):
    torch.manual_seed(0)
    block = CBAM(16, 4, 3, norm=True, device=device_of(backend), dtype=torch.float64)
    block.backend = backend
    x = torch.randn(2, 16, 6, 5, device=device_of(backend), dtype=torch.float64, requires_grad=True)
    found = []
    for call in (block, lambda v: checkpoint(block, v, use_reentrant=False)):
        (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *block.parameters()]))
    torch.testing.assert_close(*found)


def test_statistics_that_change_are_the_ones_used():
    ours, plain = pair()
    x = torch.randn(SHAPES[2])
    before = ours(x)
    for module in (ours, plain):
        module.norm.running_mean.data.add_(1.0)  # which counts as no change of the tensor
    torch.testing.assert_close(ours(x), plain(x))
    assert not torch.allclose(ours(x), before)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.norm.register_forward_hook(lambda *_: None), "norm"),
        (lambda m: setattr(m, "norm", nn.Identity()), "norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:cbam_cuda runs its plain")
def test_norms_that_are_more_than_weights_are_called(change, name):
    ours, plain = pair()
    for module in (ours, plain):
        change(module)
        assert module.layer_to_call() == name
    x = torch.randn(SHAPES[2])
    assert torch.equal(ours(x), plain(x))


def test_what_torch_folds_for_inference():
    ours, plain = pair()
    ours.conv, ours.norm = fuse_conv_bn_eval(ours.conv, ours.norm), None
    x = torch.randn(SHAPES[2])
    assert ours.layer_to_call() is None
    torch.testing.assert_close(ours(x), plain(x))


def test_synchronized():
    ours, plain = pair()
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(ours.norm) is nn.SyncBatchNorm
    assert ours.layer_to_call() is None
    x = torch.randn(SHAPES[2])
    torch.testing.assert_close(ours(x), plain(x))


@MODES
def test_autocast(backend, training):
    ours, plain = (m.train(training) for m in pair(device=device_of(backend)))
    x = torch.randn(SHAPES[2], device=device_of(backend))
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        out, eager = ours(x), plain(x)
    assert out.dtype == eager.dtype
    assert_as_good_as_eager("out", out, eager, plain.double()(x.double()))


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_nothing_is_cast_where_statistics_are_taken(backend, again, cuda_autocast):
    """Neither the convolution that has them, nor gradients, which may be differentiated."""
    results = []
    for enabled in (False, True):
        ours = pair()[0].to(device_of(backend)).train()
        ours.backend = backend
        x = torch.randn(SHAPES[2], device=device_of(backend), requires_grad=True)
        with torch.autocast(device_of(backend), dtype=torch.bfloat16, enabled=enabled):
            out = ours(x)
            of = [x, *ours.parameters()]
            found = torch.autograd.grad(out, of, torch.ones_like(out), create_graph=again)
        results.append((ours.norm.running_var, out, *found))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@MODES
def test_compiled(backend, training):
    """Graphs for batches of any size, with the statistics that move on."""
    torch.compiler.reset()
    ours = pair()[0].to(device_of(backend)).train(training)
    ours.backend, other = backend, copy.deepcopy(ours)
    other.backend = backend
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend=counter)
    for samples in (2, 3, 5):
        x = torch.randn(samples, *SHAPES[2][1:], device=device_of(backend))
        found, expected = (differentiated(m, x, torch.ones_like(x)) for m in (compiled, ours))
        torch.testing.assert_close([*found.values()], [*expected.values()])
    torch.testing.assert_close(other.norm.state_dict(), ours.norm.state_dict())
    # The second for batch normalisation in training, as in networks without a CBAM.
    assert counter.frame_count == 1 + training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trains_in_16_bits_without_weights_of_the_norm(backend, dtype):
    """Whose statistics are in 16 bits then, beside a map in float32."""
    x = torch.linspace(-2, 2, 32 * 12 * 9 * 3).view(SHAPES[2]).to(device_of(backend), dtype)
    found = []
    ours, plain = pair()
    ours.backend = backend
    for block, given in ((ours, x), (plain, x), (pair()[1], x.double())):
        block.norm = nn.BatchNorm2d(1, affine=False)
        out = block.to(given.device, given.dtype).train()(given.requires_grad_())
        found.append((out, block.norm.running_mean, block.norm.running_var))
    for name, *three in zip(("out", "mean", "variance"), *found, strict=True):
        assert_as_good_as_eager(name, *three)


@pytest.mark.parametrize("options", [{}, {"conv_bias": False, "bias": False}], ids=str)
def test_operators_are_what_they_say(backend, options):
    ours = pair(1, **options)[0].to(device_of(backend)).train()
    if options:
        ours.norm = nn.BatchNorm1d(1, affine=False, device=device_of(backend))
    name = ops.EMULATED if backend == "emulated" else ops.FUSED
    operators = getattr(torch.ops, name)
    x = torch.randn(SHAPES[1], device=device_of(backend), requires_grad=True)
    given = (x, *ours.weights(), ours.norm.weight, ours.norm.bias)
    residual = None if options else torch.randn(SHAPES[1], device=x.device, requires_grad=True)
    arguments = (*given, residual, residual is not None, ours.norm.eps)
    library.opcheck(operators.train_normalised.default, arguments)
    with torch.no_grad():
        out, _, *saved = operators.train_normalised.default(*arguments)
        mask = [t is not None for t in given]
        mask[1] = not options
        grads = (torch.ones_like(out), None, torch.ones_like(saved[1]))
        variables = (None if t is None else t.detach() for t in given)
        library.opcheck(
            operators.backward_normalised.default,
            (*grads, *variables, *saved, ours.norm.eps, mask),
        )


def test_traced():
    """By torch.fx with both modes of the norm; by torch.jit with statistics that may change."""
    ours, _ = pair()
    network = nn.Sequential(nn.Conv2d(3, 32, 3), ours).eval()
    x = torch.randn(2, 3, 9, 7)
    with pytest.warns(UserWarning, match="plain PyTorch form as torch.fx traces a norm as a layer"):
        graph = torch.fx.symbolic_trace(network)
    for training in (False, True):
        expected = copy.deepcopy(network).train(training)(x)
        torch.testing.assert_close(copy.deepcopy(graph).train(training)(x), expected)
    double, wide = (copy.deepcopy(m).double() for m in (graph, network))
    torch.testing.assert_close(double(x.double()), wide(x.double()))
    with torch.no_grad():
        traced = torch.jit.trace(network, x)
        ours.norm.running_mean += 1.0
        assert torch.equal(traced(x), network(x))


@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_hidden_channels(hidden):
    block = CBAM(32, 999, hidden=hidden)
    assert block.fc1.weight.shape[:2] == (hidden, 32)
    assert block.fc2.weight.shape[:2] == (32, hidden)
    with pytest.raises(ValueError, match="hidden: expected at least 1, got 0"):
        CBAM(32, hidden=0)
    with pytest.raises(TypeError, match="hidden: expected an int, got float"):
        CBAM(32, hidden=2.0)
