"""``python examples/digits.py``: trains one small network twice, with CBAM plain and fused.

The same handwritten digits, initial weights and batches: only the CBAM differs. Exits with an error
unless both learn the same and read the digits. Then times the block and draws what came out, in
`examples/output/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cbam_cuda
from benchmarks import __main__ as bench
from benchmarks import plots
from benchmarks.outcome import Folder
from cbam_cuda import reference
from examples import agreement, pictures
from examples.agreement import Check
from examples.network import Network
from examples.training import SEED, Digits, Run, load, train

OUTPUT = Path(__file__).resolve().parent / "output"
ACCURACY = 0.97


def exact_arithmetic() -> None:
    """Float32 that means float32, and no choice of algorithms by their time: CUDA only."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def run_all(digits: Digits, device: torch.device) -> dict[str, Run]:
    """Train plain and fused to the end, and the runs that they are judged by for some steps."""
    torch.manual_seed(SEED)
    initial = Network(reference.CBAM).to(device)
    steps = digits.steps
    runs = {
        "plain": Run(reference.CBAM, initial, steps),
        "fused": Run(cbam_cuda.CBAM, initial, steps),
    }
    probes = {
        "plain_reversed": Run(reference.CBAM, initial, steps, view=lambda batch: batch.flip(0)),
        "plain_float64": Run(reference.CBAM, initial, steps, torch.float64),
        "fused_float64": Run(cbam_cuda.CBAM, initial, steps, torch.float64),
    }
    train(digits, list(runs.values()), list(probes.values()), agreement.STEPS)
    return runs | probes


def check(runs: dict[str, Run], digits: Digits) -> list[Check]:
    """Whether both learnt the same, and enough."""
    first_losses = {name: run.losses[: agreement.STEPS] for name, run in runs.items()}
    accuracies = [
        Check(f"test accuracy, {name}", runs[name].accuracy(digits), ACCURACY, at_least=True)
        for name in ("plain", "fused")
    ]
    return [*agreement.loss_checks(**first_losses), *accuracies]


def print_times(runs: dict[str, Run]) -> None:
    """The time of a training step of the whole network, convolutions and all."""
    plain, fused = runs["plain"].step_milliseconds, runs["fused"].step_milliseconds
    print(
        f"     one training step: {plain:.1f} ms plain, {fused:.1f} ms fused, "
        f"{plain / fused:.2f} times as fast"
    )


def draw(runs: dict[str, Run], digits: Digits) -> None:
    """Write where the network looks, and what it learnt."""
    OUTPUT.mkdir(exist_ok=True)
    plain, fused = runs["plain"], runs["fused"]
    rewritten = {
        "batch in reverse": runs["plain_reversed"].losses,
        "in float64": runs["plain_float64"].losses,
    }
    allowed = agreement.allowed_differences(plain.losses[: agreement.STEPS], *rewritten.values())
    pictures.draw_losses(plain.losses, fused.losses, rewritten, allowed, OUTPUT / "loss.png")
    images = pictures.one_of_each(digits.test_images, digits.test_labels)
    gates = fused.network.eval().spatial_gates(images)
    pictures.draw_attention(images, gates, OUTPUT / "attention.png")


def main() -> int:
    """Train, check, time, draw."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact_arithmetic()
    digits = load(device)
    print(f"{len(digits.labels)} digits to train with, {len(digits.test_labels)} to test, {device}")
    runs = run_all(digits, device)
    checks = check(runs, digits)
    print("\n" + "\n".join(map(str, checks)))
    print_times(runs)
    if not all(c.passed for c in checks):
        return 1
    print("\nSpeed of the block alone; most of the wait is torch.compile at work\n")
    folder = bench.main(["--quick", "--only", "block", "--output", str(OUTPUT)])
    plots.draw("speed", Folder(folder).read("block")["rows"], OUTPUT / "speed.png")
    draw(runs, digits)
    print(f"pictures: {OUTPUT}/attention.png, loss.png, speed.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
