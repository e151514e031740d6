"""``python -m benchmarks.gpu.small``: all kinds of calls, small, for compute-sanitizer."""

from __future__ import annotations

import torch

import cbam_cuda
from cbam_cuda.arguments import Weights

from .inputs import cases, train
from .strategies import STRATEGIES, Tally, forced

FINISHED = "small: reached the end"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = tuple(
    case
    for case in cases.CASES
    if case in cases.FEW_CASES
    or case.name
    in (
        "small sample, one thread does it all",
        "several column tiles, row blocks and pool blocks",
        "more channels than a column tile",
        "kernel larger than the image",
        "one of everything",
    )
)


def run(device: str = "cuda") -> int:
    """Make all calls; returns how many.

    Inputs are made on the CPU and copied, so that hardly any kernels run but those in question.
    """
    calls = 0
    for case in CASES:
        for dtype in DTYPES:
            for layout in cases.NATIVE_LAYOUTS:
                calls += _calls(case, dtype, layout, device)
    return calls


def _calls(case: cases.Case, dtype: torch.dtype, layout: str, device: str) -> int:
    x = cases.LAYOUTS[layout](cases.make_x(case, dtype)).to(device)
    weights = Weights(*(w.to(device) for w in cases.make_weights(case, dtype)))
    grad = cases.LAYOUTS[layout](cases.make_x(case, dtype, seed=2)).to(device)
    results = []
    tally = Tally()
    for strategy in STRATEGIES:
        with tally.problem(strategy), forced(strategy), torch.no_grad():
            results.append([cbam_cuda.cbam(x, *weights, backend=device)])
            results.append(cbam_cuda.cbam(x, *weights, backend=device, return_attention=True))
        with tally.problem(strategy), forced(strategy):
            results.append(train(x, weights, grad))
    # The copies wait for the kernels, and an error of theirs is raised here.
    finite = [torch.isfinite(t.cpu()).all().item() for tensors in results for t in tensors]
    assert all(finite), (case, dtype, layout)
    return len(results)


if __name__ == "__main__":
    calls = run()
    torch.cuda.synchronize()
    print(f"cbam_cuda {cbam_cuda.__version__}, {calls} calls")
    print(FINISHED)
