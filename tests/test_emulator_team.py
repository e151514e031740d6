"""The CUDA emulator: blocks that run at the same time, and copies that go on beside the threads.

The kernels are in tests/emulator/catalogue_team.cu and catalogue_copies.cu; variant 0 of each is
right.
"""

from __future__ import annotations

import ctypes
import functools
import re

import pytest
import torch
from test_emulator import (
    BLOCK,
    HAZARD,
    HEAP,
    INPUT,
    SCHEDULES,
    WRONG,
    N,
    in_first_block,
    load,
    run,
    run_in_asan,
    text,
)

TILES = INPUT.view(-1, BLOCK)
REVERSED = TILES.flip(1).flatten()
SUMS = TILES.sum(0).int().repeat(N // BLOCK)
PARTED = N // BLOCK // 2  # blocks of one of two parts

RESULTS = {
    "rotate": TILES.view(2, 2, BLOCK).flip(1).flatten(),
    "reverse_alone": REVERSED,
    "sum_over_grid": SUMS,
    "sum_over_parts": TILES.view(2, -1, BLOCK).sum(1).int().repeat_interleave(PARTED, 0).flatten(),
    "sum_over_clusters": SUMS,
    "stream": REVERSED,
    "stream_without_syncthreads": REVERSED,
    "stream_by_threads": REVERSED,
    "copy_and_store": in_first_block(TILES[0].flip(0)),
    "copy_back": in_first_block(TILES[0].flip(0)),
    "share": TILES[0].repeat(N // BLOCK),
    "ask_ahead": REVERSED,
}

# As in test_emulator.py: a report in every schedule, or WRONG: in some schedule a wrong result or a
# report; in the asan build what the process says. None: nothing tells.
UNWRITTEN = r"uninitialised: read of `tiles?` \+ \d+"
POISON = "AddressSanitizer: use-after-poison"
CLUSTER = r"cluster_barrier at .*catalogue_team.cu:\d+"
GRID = r"grid_barrier at .*catalogue_team.cu:\d+"
PART = r"part_barrier at .*catalogue_team.cu:\d+"
WAIT = r"mbarrier_wait at .*catalogue_copies.cu:\d+"
STUCK = rf"deadlock:\n(.*\n)*? +\d+ threads? wait in {WAIT}"
COPY = r"copy of 16 bytes at .*catalogue_copies.cu:\d+"
BULK_COPY = r"bulk copy of \d+ bytes at .*catalogue_copies.cu:\d+"
PREFETCH = r"prefetch of \d+ bytes at .*catalogue_copies.cu:\d+"
COPY_HAZARD = (
    r"race: (read|write) after write of `tiles` \+ \d+ .*nothing orders it after the copy that "
    r"block \(0,0,0\) started at .*catalogue_copies.cu:\d+"
)
TWICE = r"into `tiles`: another copy into the same bytes is under way"
PROXY = (
    r"proxy: bulk copy into `tiles` \+ \d+ at .*catalogue_copies.cu:\d+ in fetch; no "
    r"hand_over_to_bulk_copies stands behind the access of block \(0,0,0\) thread"
)
MISTAKES = {
    ("rotate", 1): (WRONG, f"{HAZARD}|{UNWRITTEN}", None),
    ("rotate", 2): (
        WRONG,
        r"the block exits after a read of `tile`; nothing orders it after block \(\d,0,0\) thread|"
        r"read of `tile` of block \(\d,0,0\): the shared memory of an exited block at",
        POISON,
    ),
    ("rotate", 3): (r"in_block: `tile` of block \(\d,0,0\), which has not carved it yet",) * 3,
    ("rotate", 4): (r"in_block: rank 2 in a cluster of 2",) * 3,
    ("rotate", 5): (
        rf"divergent barrier: \d+ threads? wait in {CLUSTER} \(the first is block \(\d,0,0\) "
        r"thread \(\d+,0,0\)\), and this one came to .*catalogue_team.cu:\d+",
    )
    * 3,
    ("rotate", 6): (rf"exits while .* wait in {CLUSTER}|{CLUSTER} after|which has exited",) * 3,
    ("rotate", 7): (
        r"deadlock:\n +1 thread of block \(\d,0,0\) wait in __syncthreads at .*\n"
        rf" +511 threads of 2 blocks wait in {CLUSTER}",
    )
    * 3,
    ("rotate", 8): (WRONG, r"out of bounds: read of 4 bytes at `tile` \+ 1024", POISON),
    ("reverse_alone", 1): (WRONG, f"{HAZARD}|{UNWRITTEN}", None),
    ("sum_over_grid", 1): (WRONG, HAZARD, None),
    ("sum_over_grid", 2): (WRONG, HAZARD, None),
    ("sum_over_grid", 3): (
        rf"deadlock:\n +128 threads of 4 blocks wait in {CLUSTER}\n"
        rf" +896 threads of 4 blocks wait in {GRID}",
    )
    * 3,
    ("sum_over_grid", 4): (rf"exits while .* wait in {GRID}|{GRID} after \d+ threads? exited",) * 3,
    ("sum_over_grid", 5): (rf"{GRID} in a launch that is not cooperative",) * 3,
    ("sum_over_parts", 1): (WRONG, HAZARD, None),
    ("sum_over_parts", 2): (
        rf"{PART}: \d+ blocks do not come in parts of \d+, and came in parts of \d+",
    )
    * 3,
    ("sum_over_parts", 3): (
        rf"deadlock:\n +\d+ threads of \d+ blocks wait in {GRID}\n"
        rf" +\d+ threads of \d+ blocks wait in {PART}",
    )
    * 3,
    ("sum_over_parts", 4): (rf"exits while .* wait in {PART}|{PART} after \d+ threads? exited",)
    * 3,
    ("sum_over_parts", 5): (r"(grid|part)_barrier at .* in a launch that is not cooperative",) * 3,
    ("sum_over_parts", 6): (rf"{PART}: the count of the part's blocks is 4294967295, not 0",) * 3,
    ("sum_over_parts", 7): (WRONG, WRONG, None),
    ("sum_over_parts", 8): (WRONG, WRONG, None),
    ("sum_over_clusters", 1): (WRONG, HAZARD, None),
    ("stream", 1): (WRONG, COPY_HAZARD, None),
    ("stream", 2): (WRONG, f"{COPY_HAZARD}|{STUCK}", None),
    ("stream", 3): (WRONG, HAZARD, None),
    ("stream", 4): (rf"{BULK_COPY}: addresses and size must be multiples of 16",) * 3,
    ("stream", 5): (rf"{BULK_COPY}: the thread that initialised .* has not published it",) * 3,
    ("stream", 6): (r"16 bytes more have arrived than the mbarrier's phase expects",) * 3,
    ("stream", 7): (STUCK,) * 3,
    ("stream", 9): (
        WRONG,
        r"out of bounds: read of 1024 bytes at `in` \+ 3136, which has 4096 at",
        rf"{BULK_COPY} starts outside of what may be read|{HEAP}",
    ),
    ("stream", 10): (r"exits with copies under way: no thread has waited for the one at .*:\d+",)
    * 3,
    ("stream", 11): (r"no mbarrier of this block was initialised there",) * 3,
    ("stream", 12): (r"it has been initialised before",) * 3,
    ("stream", 13): (r"more than the 1 arrivals of a phase of the mbarrier",) * 3,
    ("stream", 14): (rf"{BULK_COPY} {TWICE}",) * 3,
    ("stream", 15): (r"something overwrote the mbarrier",) * 3,
    ("stream", 16): (WRONG, r"read after write of `full` \+ \d+|was initialised there", None),
    ("stream", 17): (None, PROXY, None),
    ("stream", 18): (None, PROXY, None),
    ("stream_without_syncthreads", 1): (WRONG, f"{COPY_HAZARD}|{HAZARD}|deadlock", None),
    ("stream_without_syncthreads", 2): (None, "race: write after read of `tiles`", None),
    ("stream_by_threads", 1): (WRONG, f"{COPY_HAZARD}|{HAZARD}|{UNWRITTEN}", None),
    ("stream_by_threads", 2): (WRONG, f"{COPY_HAZARD}|{HAZARD}|{UNWRITTEN}", None),
    ("stream_by_threads", 3): (WRONG, f"{COPY_HAZARD}|{HAZARD}", None),
    ("stream_by_threads", 4): (r"exits with 128 copies under way that no mbarrier waits for",) * 3,
    ("stream_by_threads", 5): (rf"{COPY} {TWICE}|the mbarrier's phase ended before",) * 2 + (None,),
    ("stream_by_threads", 6): (WRONG, COPY_HAZARD, None),
    ("copy_and_store", 1): (None, "race: read after write of `tiles`", None),
    ("copy_back", 1): (
        WRONG,
        r"race: write after read of `out` \+ \d+ at .*; nothing orders it after the copy that",
        None,
    ),
    ("share", 1): (WRONG, COPY_HAZARD, None),
    ("ask_ahead", 1): (rf"{PREFETCH}: addresses and size must be multiples of 16",) * 3,
    ("ask_ahead", 2): (
        None,
        r"out of bounds: read of 2048 bytes at `in` \+ \d+, which has 4096 at",
        rf"{PREFETCH} starts outside of what may be read|{HEAP}",
    ),
}


@functools.cache
def load_team(kind: str) -> ctypes.CDLL:
    library = load(kind)
    for name in [*RESULTS, "meet_often"]:
        getattr(library, f"catalogue_{name}").restype = ctypes.c_char_p
    return library


@pytest.fixture(params=["plain", "race"])
def catalogue(request):
    library = load_team(request.param)
    library.emulator_set_multiprocessors(132)
    library.emulator_set_schedule(b"ascending")
    return library


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RESULTS)
def test_right_kernels_give_no_findings(catalogue, name, schedule):
    report, result = run(catalogue, name, 0, schedule)
    assert report == ""
    assert torch.equal(result, RESULTS[name])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bytes_may_be_expected_after_the_copy_started(catalogue, schedule):
    report, result = run(catalogue, "stream", 8, schedule)
    assert report == ""
    assert torch.equal(result, REVERSED)


@pytest.mark.parametrize(("name", "variant"), MISTAKES)
def test_mistakes_are_found(catalogue, name, variant):
    plain, race, _ = MISTAKES[name, variant]
    expected = plain if catalogue.emulator_kind() == b"plain" else race
    outcomes = [run(catalogue, name, variant, schedule) for schedule in SCHEDULES]
    if expected == WRONG:
        assert any(report or not torch.equal(result, RESULTS[name]) for report, result in outcomes)
        return
    for report, _ in outcomes:
        assert re.search(expected, report) if expected else not report


def test_right_kernels_give_no_findings_in_asan():
    assert run_in_asan(*(f"{name}:0" for name in RESULTS)) == "nothing found\n" * 3 * len(RESULTS)


# One process a mistake: the sanitizer ends it. Those that every build finds are found in one.
ASAN_ENDS = {m: asan for m, (plain, _, asan) in MISTAKES.items() if asan and asan != plain}
REPORTED = {m: asan for m, (plain, _, asan) in MISTAKES.items() if asan and asan == plain}


@pytest.mark.parametrize(("name", "variant"), ASAN_ENDS)
def test_mistakes_are_found_in_asan(name, variant):
    assert re.search(ASAN_ENDS[name, variant], run_in_asan(f"{name}:{variant}"))


def test_what_every_build_finds_is_found_in_asan():
    said = run_in_asan(*(f"{name}:{variant}" for name, variant in REPORTED))
    reports = re.split(r"^.*kernel .*, grid ", said, flags=re.M)[1:]
    assert len(reports) == 3 * len(REPORTED)
    for i, expected in enumerate(REPORTED.values()):
        for report in reports[3 * i : 3 * i + 3]:
            assert re.search(expected, report)


def test_a_launch_that_fails_leaves_nothing_behind(catalogue):
    for name, variant in MISTAKES:
        run(catalogue, name, variant, "random:1")
        report, result = run(catalogue, "stream", 0, "ascending")
        assert report == ""
        assert torch.equal(result, REVERSED)


def test_copies_count_as_reads():
    library = load_team("race")
    library.emulator_reset_counts()
    for name in ("stream", "stream_by_threads"):
        run(library, name, 0, "ascending")
    assert library.emulator_counts() == b"in 8192 0\nout 0 8192\n"


def meet(
    library, blocks, threads=128, cluster=1, cooperative=False, shared_bytes=0, rounds=2
) -> str:
    bytes_ = ctypes.c_size_t(shared_bytes)
    report = library.catalogue_meet_often(blocks, threads, cluster, cooperative, bytes_, rounds)
    return text(report)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_large_gangs(catalogue, schedule):
    catalogue.emulator_set_schedule(schedule.encode())
    catalogue.catalogue_allow_large_clusters(1)
    assert not meet(catalogue, 32, threads=512, cluster=16, rounds=10)
    assert not meet(catalogue, 132 * 2, threads=128, cooperative=True)


def test_clusters_of_more_than_8_must_be_asked_for(catalogue):
    catalogue.catalogue_allow_large_clusters(0)
    assert not meet(catalogue, 16, cluster=8)
    report = meet(catalogue, 16, cluster=16)
    assert re.match("cudaErrorInvalidClusterSize: .*NonPortableClusterSizeAllowed", report)
    catalogue.catalogue_allow_large_clusters(1)
    assert not meet(catalogue, 16, cluster=16)
    assert meet(catalogue, 32, cluster=32).startswith("cudaErrorInvalidClusterSize")


def test_grids_are_whole_clusters(catalogue):
    assert re.match(
        r"cudaErrorInvalidConfiguration: .*grid of \(6,1,1\) blocks in clusters of \(4,1,1\)",
        meet(catalogue, 6, cluster=4),
    )


def test_clusters_must_fit_in_a_group_of_multiprocessors(catalogue):
    catalogue.emulator_set_multiprocessors(20)
    catalogue.catalogue_allow_large_clusters(1)
    most = catalogue.catalogue_most_clusters
    assert most(1024, ctypes.c_size_t(0), 8) == 5
    assert most(1024, ctypes.c_size_t(0), 16) == 2
    catalogue.emulator_set_multiprocessors(3)
    assert most(1024, ctypes.c_size_t(0), 8) == 0
    assert "no cluster of 8 such blocks fits" in meet(catalogue, 8, threads=1024, cluster=8)


def test_cooperative_launches_must_fit_the_device(catalogue):
    catalogue.emulator_set_multiprocessors(2)
    assert not meet(catalogue, 4, threads=1024, cooperative=True)
    assert re.match(
        "cudaErrorCooperativeLaunchTooLarge: .*5 blocks that cooperate, .* holds 4",
        meet(catalogue, 5, threads=1024, cooperative=True),
    )
    assert not meet(catalogue, 5, threads=1024)


def test_a_device_without_cooperative_launches(catalogue):
    catalogue.emulator_set_cooperative_launch(0)
    report = meet(catalogue, 4, cooperative=True)
    catalogue.emulator_set_cooperative_launch(1)
    assert re.match("cudaErrorNotSupported: .*the device has no cooperative launches", report)
    assert not meet(catalogue, 4, cooperative=True)


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "blocks"),
    [(1024, 0, 2), (1, 0, 32), (65, 0, 21), (128, 40 * 1024, 5), (512, 227 * 1024, 1)],
)
def test_occupancy(threads, shared_bytes, blocks):
    library = load_team("plain")
    found = library.catalogue_blocks_per_multiprocessor(threads, ctypes.c_size_t(shared_bytes))
    assert found == blocks


def test_a_device_has_multiprocessors():
    library = load_team("plain")
    assert library.emulator_set_multiprocessors(0) == -1
    assert library.emulator_set_multiprocessors(132) == 0
