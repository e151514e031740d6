"""tests/mutate.py finds something to break in every kernel, and the emulator notices."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import why_not
from mutate import REDUNDANT, chosen, parse
from mutation.find import BARRIERS, all_mutants, emulated, mutants_of, sources
from mutation.run import HELD

from cbam_cuda.plan import plan

KERNELS = [path for path in sources() if "__global__" in path.read_text()]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_every_kernel_has_barriers_and_bounds_to_break(path):
    found = list(mutants_of(path))
    text = path.read_text()
    waits = any(f"{name}(" in text for name in BARRIERS)
    assert {mutant.kind for mutant in found} == ({"barrier", "bound"} if waits else {"bound"})
    barriers = [mutant for mutant in found if mutant.kind == "barrier"]
    assert len(barriers) >= text.count("__syncthreads();")
    assert all(mutant.text != text for mutant in found)
    assert len({mutant.text for mutant in found}) == len(found)


def test_headers_have_some_too():
    found = {mutant.path for mutant in all_mutants()}
    for header in ("kernels/blocks.cuh", "kernels/tile_sums.cuh", "primitives/vector_io.cuh"):
        assert f"cuda/{header}" in found


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_mutants_have_as_many_parentheses_open_as_closed(path):
    whole = path.read_text()
    for mutant in mutants_of(path):
        for pair in ("()", "[]", "{}"):
            opened, closed = (mutant.text.count(one) - whole.count(one) for one in pair)
            assert opened == closed, mutant


def test_what_is_listed_as_redundant_is_there_once():
    keys = Counter(mutant.key for mutant in all_mutants())
    assert set(REDUNDANT) <= set(keys)
    assert set(keys.values()) == {1}


def held(direction: str, named: str = "", split: str = "") -> list[dict]:
    """How the blocks of plans hold samples: of problems so named, by strategies that say so."""
    return [
        plan(
            case.shape,
            str(dtype).removeprefix("torch."),
            device,
            strategy=strategy,
            multiprocessors=multiprocessors,
            hidden=case.hidden,
            kernel_size=case.kernel,
            channels_last=layout == "channels_last",
            training=direction == "forward",
            backward=direction == "backward",
        )["passes"]["resident"]
        for way, strategy, problems in HELD
        for case, dtypes, layouts, devices in problems
        if way == direction and split in strategy and named in case.name
        for dtype in dtypes
        for layout in layouts
        for device, multiprocessors in devices
    ]


# Plans change: none of these would be noticed to be no more what it is called.
def test_there_are_bands_to_break():
    (found,) = held("forward", "a short last band")
    assert found["pixels"] > found["band"]
    assert found["pixels"] % found["band"] > 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_there_are_units_that_blocks_share_to_break(direction):
    (found,) = held(direction, "blocks that add up some units")
    assert found["shares_units"]


def test_there_is_x_that_comes_and_goes():
    found = held("backward", "x comes")
    assert all(g["x"] == "is read twice" for g in found)
    assert {g["copy"] for g in found} == {"bulk", "async", "plain"}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_there_are_both_splits_to_break(direction):
    pixels = held(direction, split="pixels")
    assert {g["copy"] for g in pixels} == {"bulk", "async", "plain"}
    found = held(direction)
    for split in ("channels", "pixels"):
        assert {g["kind"] for g in found if g["split"] == split} == {"cluster", "grid"}


def test_what_only_nvcc_compiles_is_left_alone():
    """The emulator could not notice."""
    text = """
#if defined(CBAM_EMULATED)
kept 1
#elif X
nvcc
#else
#if X
nvcc
#endif
nvcc
#endif
#if !defined(CBAM_EMULATED) && X
nvcc
#else
kept 2
#endif
#if X
kept 3
#else
kept 4
#endif
#if defined(CBAM_EMULATED) || X
kept 5
#endif
"""
    assert emulated(text).split() == [word for i in "12345" for word in ("kept", i)]
    assert len(emulated(text)) == len(text)
    assert not [m for m in all_mutants() if m.path == "cuda/primitives/team.cuh"]


def test_shards_together_are_all():
    shards = [chosen(parse(["--shard", f"{index}/3"])) for index in range(3)]
    for index, mutant in enumerate(all_mutants()):
        assert shards[index % 3][index // 3] == mutant
    assert sum(map(len, shards)) == len(all_mutants())


@pytest.mark.parametrize("text", ["3/3", "-1/3", "0/0", "1", "a/b"])
def test_a_shard_that_is_none(text, capsys):
    with pytest.raises(SystemExit):
        parse([f"--shard={text}"])
    assert "expected I/N with I from 0 to N - 1" in capsys.readouterr().err


# A barrier and a bound of streaming kernels, and runs that notice: resident ones take three times
# as long to compile and to run.
SAMPLE = ("__syncthreads after stage_hidden", "within <= rows) write_part")
RUNS = ("small", "three walks over the weights")


# Of the backward, and changes nothing: whatever notices it would notice every mutant.
HARMLESS = "at > end) return"


@pytest.mark.slow
@pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")
def test_missing_barriers_and_wrong_bounds_are_noticed():
    program = Path(__file__).with_name("mutate.py")
    options = [f"--only={part}" for part in (*SAMPLE, HARMLESS)]
    options += [f"--runs={part}" for part in RUNS]
    done = subprocess.run(
        [sys.executable, str(program), *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"score: {len(SAMPLE)}/{len(SAMPLE) + 1}, 1 redundant" in done.stdout
