"""How the CUDA backend would run a problem: ``python -m cbam_cuda plan``, with or without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import ops

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def known_devices() -> list[str]:
    """Names of the GPUs whose limits are on record."""
    return [device["name"] for device in ops.compiled().known_devices()]


def plan(
    shape: Sequence[int],
    dtype: str = "float32",
    device: str = "H100",
    *,
    hidden: int | None = None,
    kernel_size: int | Sequence[int] = 7,
    channels_last: bool = False,
    training: bool = False,
    residual: bool = False,
    backward: bool = False,
    strategy: str = "auto",
    multiprocessors: int = 0,
) -> dict[str, Any]:
    """Plan of a forward, or of a backward, for dense x of `shape` [N, C, *space].

    Args:
        shape: sizes of x, with 1 to 3 dimensions of space.
        dtype: "float32", "float64", "float16" or "bfloat16", of x and of the weights.
        device: a name of `known_devices`, or "cuda:INDEX" for a GPU of this machine.
        hidden: hidden channels of the MLP; C // 16, but at least 1, by default.
        kernel_size: of the convolution, for each dimension of space or for all.
        channels_last: whether x's channels lie side by side in memory.
        training: whether the forward keeps what backward needs.
        residual: whether the forward adds one; the backward has nothing to do with it.
        backward: plan the backward instead, with every gradient asked for.
        strategy: "streaming" (a forward reads x three times, a backward reads x and its partner
            twice), "resident" (samples stay on the chip and are read once, but that a backward may
            read x twice), "resident-channels" or "resident-pixels" (so that a block holds some
            channels of all pixels, or some pixels of all channels), or "auto" for the one that is
            predicted to be faster; where both take about as long, for what is faster in a typical
            shape nearby. For measurements a resident one may go on with ":cluster" or ":grid", and
            numbers behind colons: blocks of a team, blocks on a multiprocessor, and samples of a
            visit, as in "resident-channels:grid:8:2:1"; the plan chooses what is missing or 0. With
            ":ahead" behind all that, which the plan never chooses, teams bring their next visit to
            the L2 cache early.
        multiprocessors: plan for a part of the device that has so many; 0 for all of it.

    Returns:
        ``strategy``, with its ``reason`` and ``predicted_seconds``; ``group`` (samples
        that take all launches together), ``in_cache`` (whether x of a group stays in the L2
        cache), ``stages`` (of a full group: name, blocks, threads, shared_bytes, ``overlaps``
        where it starts before the launch before it has ended, traffic in bytes), ``traffic`` (of
        all groups), ``device_memory_bytes`` and the ``seconds`` that these take at the device's
        full bandwidth; ``passes``, the geometry of the passes over x by name;
        ``summing_launches``, small ones that follow a backward and make the gradients of the
        weights; ``scratch_bytes``; ``device``, its limits.

    Raises:
        RuntimeError: the compiled module did not load.
        ValueError: no such device, dtype or strategy, sizes below 1, a kernel too large for the
            device, or a resident strategy where no sample fits on the chip.
    """
    dim = len(shape) - 2
    kernel = [kernel_size] * dim if isinstance(kernel_size, int) else list(kernel_size)
    units = hidden if hidden is not None else max(1, shape[1] // 16 if len(shape) > 1 else 1)
    found: dict[str, Any] = ops.compiled().plan(
        list(shape),
        units,
        kernel,
        dtype,
        device,
        channels_last=channels_last,
        training=training,
        residual=residual,
        backward=backward,
        strategy=strategy,
        multiprocessors=multiprocessors,
    )
    return found


def render(found: dict[str, Any]) -> str:
    """A plan as text."""
    device, traffic = found["device"], found["traffic"]
    cached = "stays in the L2 cache" if found["in_cache"] else "does not fit into the L2 cache"
    lines = [
        f"{found['strategy']} on {device['name']}: "
        + (
            "samples stay on the chip"
            if found["strategy"] == "resident"
            else f"groups of {found['group']} samples, whose x {cached}"
        ),
        f"{found['reason']}; predicted {found['predicted_seconds'] * 1e6:.1f} us",
        f"scratch memory {_bytes(found['scratch_bytes'])}",
        *_overlap(found),
        "",
        f"{'launches of a group':<22}{'blocks':>9}{'threads':>9}{'shared':>10}{'x read':>11}"
        f"{'written':>11}{'other':>11}",
    ]
    for stage in found["stages"]:
        t = stage["traffic"]
        other = t["residual_read"] + t["weights_read"] + t["small_read"] + t["small_written"]
        lines.append(
            f"{stage['name']:<22}{stage['blocks']:>9}{stage['threads']:>9}"
            f"{_bytes(stage['shared_bytes']):>10}{_bytes(t['x_read']):>11}"
            f"{_bytes(t['out_written']):>11}{_bytes(other):>11}"
        )
    lines.append("")
    for name, geometry in found["passes"].items():
        described = ", ".join(f"{key} {_shown(value)}" for key, value in geometry.items())
        lines.append(f"{name:<9}{described}")
    small = traffic["small_read"] + traffic["small_written"]
    lines += [
        "",
        f"asked for: x {_bytes(traffic['x_read'])}, out {_bytes(traffic['out_written'])}, "
        f"residual {_bytes(traffic['residual_read'])}, "
        f"weights of the MLP {_bytes(traffic['weights_read'])}, all else {_bytes(small)}",
        *_second_reading(found),
        *_sums(found),
        f"device memory: {_bytes(found['device_memory_bytes'])}, at "
        f"{device['bandwidth'] / 1e9:.0f} GB/s {found['seconds'] * 1e6:.1f} us",
    ]
    return "\n".join(lines)


def _overlap(found: dict[str, Any]) -> list[str]:
    if not any(stage["overlaps"] for stage in found["stages"]):
        return []
    return ["each launch starts before the one before it has ended"]


def _second_reading(found: dict[str, Any]) -> list[str]:
    if found["passes"].get("resident", {}).get("x") != "is read twice":
        return []
    return ["of what is read, a third is x again, soon after and so from the L2 cache"]


def _sums(found: dict[str, Any]) -> list[str]:
    if not (launches := found["summing_launches"]):
        return []
    read, written = (_bytes(found["traffic"][f"sums_{way}"]) for way in ("read", "written"))
    return [f"sums over the batch: {launches} launches, {read} read, {written} written"]


def _bytes(count: int) -> str:
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B" if count else "-"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
