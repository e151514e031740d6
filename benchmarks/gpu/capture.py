"""CUDA graphs: what is captured once and replayed over other contents equals a plain call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import cbam_cuda
from cbam_cuda.arguments import Weights

from ..problems import DTYPES, draw
from .inputs import assert_same, draw_weights, run, train
from .strategies import Tally

SHAPES = ((1, 256, 56, 56), (8, 512, 28, 28), (8, 2048, 7, 7))
LAYOUTS = ("contiguous", "channels_last")
WARM_UP_CALLS = 3
REPLAYS = 3


def forward() -> str:
    """Inference."""
    return _for_all(lambda x, weights, grad: lambda: [run(x, weights)])


def forward_with_attention() -> str:
    """The operator that keeps what backward needs, and the gates."""

    def make(x: Tensor, weights: Weights, grad: Tensor) -> Callable[[], Sequence[Tensor]]:
        return lambda: cbam_cuda.cbam(x, *weights, return_attention=True, backend="cuda")

    return _for_all(make)


def training() -> str:
    """Forward and backward for all gradients."""
    return _for_all(lambda x, weights, grad: lambda: train(x, weights, grad))


def _for_all(
    make: Callable[[Tensor, Weights, Tensor], Callable[[], Sequence[Tensor]]],
) -> str:
    """Check the call that `make` gives for x, weights and a gradient; says over how many."""
    tally = Tally()
    for shape in SHAPES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                x, grad = (draw(shape, dtype, layout, seed=seed) for seed in (0, 1))
                call = make(x, draw_weights(shape[1], dtype), grad)
                name = f"{shape}, {dtype}, {layout}"
                with tally.problem(name):
                    _check(name, call, x, grad)
    return tally.said(f"graphs with {REPLAYS} replays each")


def _check(name: str, call: Callable[[], Sequence[Tensor]], x: Tensor, grad: Tensor) -> None:
    graph, results = captured(call)
    before = [result.clone() for result in results]
    for replay in range(REPLAYS):
        for tensor, seed in ((x, 10 + replay), (grad, 20 + replay)):
            tensor.copy_(draw(tensor.shape, tensor.dtype, device=str(x.device), seed=seed))
        graph.replay()
        replayed = [result.clone() for result in results]
        assert not torch.equal(replayed[0], before[0]), f"{name}: the replay changed nothing"
        assert_same(f"{name}, replay {replay}", replayed, call())
        before = replayed


def captured(
    call: Callable[[], Sequence[Tensor]],
) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """A graph of one call, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    return graph, results
