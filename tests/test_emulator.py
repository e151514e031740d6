"""The CUDA emulator: what it finds in kernels with a known mistake, and that it finds nothing else.

The kernels are in tests/emulator/catalogue.cu; variant 0 of each is right.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = ("ascending", "descending", "random:1", "random:2", "random:3")

N = 1024  # ints that each kernel is given
BLOCK = 256
PADDING = 32  # on both sides, so that a kernel that goes astray breaks nothing of ours

INPUT = torch.arange(1, N + 1, dtype=torch.int32)


def in_first_block(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values.flatten(), torch.zeros(N - BLOCK)]).int()


def last_block_result() -> torch.Tensor:
    return torch.tensor([N, *[BLOCK] * (N // BLOCK)] + [0] * (N - N // BLOCK - 1)).int()


RESULTS = {
    "reverse": INPUT.view(-1, BLOCK).flip(1).flatten(),
    "reverse_rows": INPUT.view(-1, BLOCK).flip(1).flatten(),
    "meet": in_first_block(INPUT[:BLOCK]),
    "swap_in_warp": in_first_block(INPUT[:BLOCK].view(-1, 2).flip(1)),
    "add_neighbours": in_first_block(
        INPUT[:BLOCK] + torch.cat([INPUT[1:BLOCK], INPUT[BLOCK - 1 : BLOCK]])
    ),
    "copy": INPUT,
    "fill": in_first_block(INPUT[:BLOCK]),
    "copy_by_halves": in_first_block(INPUT[:BLOCK]),
    "copy_vectors": INPUT,
    "sum_in_last_block": last_block_result(),
    "write_own": torch.arange(N).int(),
    "sum_warps": in_first_block(INPUT[:BLOCK].view(-1, 32).sum(1, keepdim=True).expand(-1, 32)),
    "two_arrays": in_first_block(INPUT[:BLOCK]),
    "follow": INPUT,
}

# What must tell of each mistake: in the plain and race builds a report in every schedule, WRONG a
# wrong result in some schedule; in the asan build what the process says. None: nothing can.
WRONG = "wrong values"
HAZARD = r"race: (read after write|write after read|write after write) of `\w+` \+ \d+ at"
UNWRITTEN = r"uninitialised: read of `tile` \+ \d+"
HEAP = "AddressSanitizer: heap-buffer-overflow"
NO_WAIT = "exits without a wait for the launch before"
EARLY_WRITE = "write of `out` before the wait for the launch before"
MISTAKES = {
    ("reverse", 1): (WRONG, f"{HAZARD}|{UNWRITTEN}", None),
    ("reverse_rows", 1): (WRONG, HAZARD, None),
    ("meet", 1): (r"divergent barrier: \d+ threads? wait in .*catalogue.cu:\d+",) * 3,
    ("meet", 2): (r"exits while .* wait in|__syncthreads at .* after \d+ threads? exited",) * 3,
    ("meet", 3): (
        r"deadlock:\n +225 threads wait in __syncthreads at .*catalogue.cu:\d+"
        r"\n +31 threads wait in __syncwarp at .*catalogue.cu:\d+",
    )
    * 3,
    ("swap_in_warp", 1): (None, HAZARD, None),
    ("swap_in_warp", 2): (WRONG, f"{HAZARD}|{UNWRITTEN}", None),
    ("add_neighbours", 1): (
        WRONG,
        r"out of bounds: read of 4 bytes at `tile` \+ 1024",
        "AddressSanitizer: use-after-poison",
    ),
    ("copy", 1): (None, r"out of bounds: read of 4 bytes at `in` \+ 4096", HEAP),
    ("copy", 2): (WRONG, r"out of bounds: read of 4 bytes, 4 before the start of `in`", HEAP),
    ("copy", 3): (None, r"write of `in` \+ 4092, which is read-only", None),
    ("fill", 1): (WRONG, r"uninitialised: read of `tile` \+ 28", None),
    ("copy_by_halves", 1): (WRONG, f"{HAZARD}|{UNWRITTEN}", None),
    ("copy_vectors", 1): (r"misaligned access of 16 bytes at address 0x.*catalogue.cu:\d+",) * 3,
    ("sum_in_last_block", 1): (None, "race: read after write of `out`", None),
    ("sum_in_last_block", 2): (None, "race: read after write of `out`", None),
    ("sum_in_last_block", 3): (None, "race: read after write of `out`", None),
    ("write_own", 1): (WRONG, "race: write after write of `out`", None),
    ("sum_warps", 1): (r"shuffle at .*(lane \d+ is not in its own mask|not taking part)",) * 3,
    ("sum_warps", 2): (r"shuffle at .* reads from lane 31 of warp \d, not taking part",) * 3,
    ("two_arrays", 1): (r"`second` \(1024 bytes at offset 1024\) does not fit in the 1024 bytes",)
    * 3,
    ("two_arrays", 2): (r"`second` .* overlaps the shared array `second`",) * 3,
    ("follow", 1): (NO_WAIT, EARLY_WRITE, NO_WAIT),
    ("follow", 2): (None, EARLY_WRITE, None),
}


@functools.cache
def builder():
    spec = importlib.util.spec_from_file_location("build", ROOT / "tests/emulator/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(kind: str) -> Path:
    return builder().build(kind, builder().CATALOGUE)


@functools.cache
def load(kind: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(kind)))
    for name in [*RESULTS, "exchange", "copy_within", "nothing", "without_opt_in"]:
        getattr(library, f"catalogue_{name}").restype = ctypes.c_char_p
    for name in ("emulator_counts", "emulator_kind"):
        getattr(library, name).restype = ctypes.c_char_p
    library.emulator_launches.restype = ctypes.c_ulonglong
    library.emulator_set_schedule(b"ascending")
    return library


@pytest.fixture(params=["plain", "race"])
def catalogue(request):
    return load(request.param)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def text(report: bytes | None) -> str:
    return report.decode() if report else ""


def padded(values: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(values.numel() + 2 * PADDING, dtype=values.dtype)
    inside = whole[PADDING:-PADDING]
    inside.copy_(values)
    return inside


def run(library, name: str, variant: int, schedule: str) -> tuple[str, torch.Tensor]:
    """The report of one launch, and what it computed."""
    assert library.emulator_set_schedule(schedule.encode()) == 0
    given, result = padded(INPUT), padded(torch.zeros(N).int())
    entry = getattr(library, f"catalogue_{name}")
    return text(entry(pointer(given), pointer(result), N, variant)), result


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RESULTS)
def test_right_kernels_give_no_findings(catalogue, name, schedule):
    report, result = run(catalogue, name, 0, schedule)
    assert report == ""
    assert torch.equal(result, RESULTS[name])


@pytest.mark.parametrize(("name", "variant"), MISTAKES)
def test_mistakes_are_found(catalogue, name, variant):
    plain, race, _ = MISTAKES[name, variant]
    expected = plain if catalogue.emulator_kind() == b"plain" else race
    outcomes = [run(catalogue, name, variant, schedule) for schedule in SCHEDULES]
    for report, _ in outcomes:
        if expected in (None, WRONG):
            assert report == ""
        else:
            assert re.search(expected, report)
            assert re.search(rf"kernel .*\b{name}\(.*, block \(256,1,1\), \d+ bytes", report)
    if expected == WRONG:
        assert any(not torch.equal(result, RESULTS[name]) for _, result in outcomes)


# Memory straight from malloc, so that the sanitizer knows where it ends.
IN_ASAN = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
for name, variant in (run.split(":") for run in sys.argv[2:]):
    entry = getattr(library, "catalogue_" + name)
    entry.restype = ctypes.c_char_p
    for schedule in (b"ascending", b"descending", b"random:1"):
        assert library.emulator_set_schedule(schedule) == 0
        given, result = (ctypes.c_void_p(malloc(ctypes.c_size_t(4 * 1024))) for _ in "ab")
        for i in range(1024):
            ctypes.c_int.from_address(given.value + 4 * i).value = i + 1
        report = entry(given, result, 1024, int(variant))
        print((report or b"nothing found").decode())
"""


def run_in_asan(*runs: str) -> str:
    command = [sys.executable, "-c", IN_ASAN, str(build("asan")), *runs]
    environment = builder().asan_environment()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout + done.stderr


def test_right_kernels_give_no_findings_in_asan():
    assert run_in_asan(*(f"{name}:0" for name in RESULTS)) == "nothing found\n" * 3 * len(RESULTS)


@pytest.mark.parametrize(
    ("name", "variant", "expected"),
    [(*mistake, asan) for mistake, (_, _, asan) in MISTAKES.items() if asan],
)
def test_mistakes_are_found_in_asan(name, variant, expected):
    assert re.search(expected, run_in_asan(f"{name}:{variant}"))


def test_reports_name_kernel_place_and_both_threads():
    report, _ = run(load("race"), "write_own", 1, "descending")
    assert re.search(
        r"kernel .*write_own\(.*, grid \(4,1,1\), block \(256,1,1\), 0 bytes of shared memory\n"
        r"  block \(2,0,0\) thread \(255,0,0\): race: write after write of `out` \+ 1020 at "
        r"\S+catalogue.cu:\d+; nothing orders it after block \(3,0,0\) thread \(255,0,0\) at "
        r"\S+catalogue.cu:\d+",
        report,
    )
    assert len(report.splitlines()) <= 22


def test_a_launch_that_fails_leaves_nothing_behind(catalogue):
    for name, variant in MISTAKES:
        run(catalogue, name, variant, "ascending")
        report, result = run(catalogue, "reverse", 0, "ascending")
        assert report == ""
        assert torch.equal(result, RESULTS["reverse"])


def test_launches_are_ordered():
    library = load("race")
    given, result = padded(INPUT), padded(torch.zeros(N).int())
    for source, target in ((given, result), (result, given), (given, result)):
        assert not library.catalogue_copy(pointer(source), pointer(target), N, 0)


def test_schedules_are_reproducible(catalogue):
    _, first = run(catalogue, "reverse", 1, "random:5")
    _, again = run(catalogue, "reverse", 1, "random:5")
    _, other = run(catalogue, "reverse", 1, "random:6")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_votes_shuffles_and_atomics(catalogue):
    result = torch.zeros(8 * BLOCK).int()
    assert not catalogue.catalogue_exchange(pointer(result), result.numel())
    rows = result.view(BLOCK, 8)
    t = torch.arange(BLOCK)
    lane = t % 32
    assert torch.equal(rows[:, 0], (t - lane + 3).int())
    assert torch.equal(rows[:, 1], torch.where(lane == 0, t, t - 1).int())
    assert torch.equal(rows[:, 2], torch.where(lane % 8 == 7, t, t + 1).int())
    assert torch.equal(rows[:, 3], (t ^ 5).int())
    assert (rows[:, 4] == 7).all()
    assert (rows[:, 5] == 1).all()
    assert (rows[:, 6] == 1).all()
    assert rows[0, 7] == BLOCK
    assert rows[1, 7] == BLOCK - 1


def test_bytes_are_counted():
    library = load("race")
    library.emulator_reset_counts()
    run(library, "copy", 0, "ascending")
    assert library.emulator_counts() == b"in 4096 0\nout 0 4096\n"
    run(library, "copy_vectors", 0, "random:1")
    assert library.emulator_counts() == b"in 8192 0\nout 0 8192\n"
    assert library.emulator_launches() == 2
    library.emulator_reset_counts()
    assert library.emulator_counts() == b""
    assert library.emulator_launches() == 0


def test_regions_may_overlap():
    library = load("race")
    library.emulator_reset_counts()
    buffer = torch.cat([INPUT, torch.zeros(N).int()])
    assert not library.catalogue_copy_within(pointer(buffer), N)
    assert torch.equal(buffer[N:], INPUT)
    assert library.emulator_counts() == b"whole 4096 0\nhalf 0 4096\n"


@pytest.mark.parametrize("kind", ["plain", "race"])
def test_kinds(kind):
    assert load(kind).emulator_kind() == kind.encode()


@pytest.mark.parametrize("schedule", ["", "up", "random", "random:", "random:x", "Ascending"])
def test_unknown_schedules(schedule):
    assert load("plain").emulator_set_schedule(schedule.encode()) == -1


def test_schedule_from_the_environment():
    code = (
        "import ctypes; library = ctypes.CDLL(r'{}'); f = library.catalogue_nothing;"
        "f.restype = ctypes.c_char_p; print(f(1, 32, ctypes.c_size_t(0)))"
    ).format(build("plain"))

    def shown(schedule: str) -> str:
        environment = {**os.environ, "CBAM_CUDA_EMULATOR_SCHEDULE": schedule}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=environment).stdout

    assert shown("random:7") == "None\n"
    assert "expected ascending, descending or random:SEED, got sideways" in shown("sideways")


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "message"),
    [
        (1, 1024, 0, ""),
        (1, 32, 227 * 1024, ""),
        (0, 32, 0, r"nothing: expected 1 to 2\^31 - 1 blocks, got 0"),
        (1, 0, 0, "0 threads in a block"),
        (1, 1025, 0, "1025 threads in a block"),
        (1, 32, 227 * 1024 + 1, "232449 bytes of shared memory, of at most 232448"),
    ],
)
def test_limits_of_launches(catalogue, blocks, threads, shared_bytes, message):
    report = text(catalogue.catalogue_nothing(blocks, threads, ctypes.c_size_t(shared_bytes)))
    assert re.search(message, report) if message else not report


def test_much_shared_memory_must_be_asked_for(catalogue):
    assert not catalogue.catalogue_without_opt_in(ctypes.c_size_t(48 * 1024))
    report = text(catalogue.catalogue_without_opt_in(ctypes.c_size_t(48 * 1024 + 1)))
    assert "cudaFuncAttributeMaxDynamicSharedMemorySize" in report


def test_atomics_on_floating_point_do_not_compile(tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text("#include <cuda_runtime.h>\nvoid f(float* p) { atomicAdd(p, 1.0f); }\n")
    compiler = builder().load_setup().compiler()
    command = f"{compiler} -std=c++17 -fsyntax-only -I{ROOT}/tests/emulator/include {source}"
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "atomics on floating point are not allowed" in done.stderr


def floats_of_all_kinds() -> torch.Tensor:
    """Random bits, values near half's and bfloat16's limits, and ties."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2_000_000,), dtype=torch.int64).int()
    halves = torch.arange(-(2**15), 2**15).short()
    near = [halves.view(torch.float16).float().view(torch.int32)]
    near += [halves.view(torch.bfloat16).float().view(torch.int32)]
    steps = torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001]).int()
    nearby = (torch.cat(near)[:, None] + steps).flatten()
    subnormal = (torch.randn(200_000) * 2.0**-18).view(torch.int32)
    return torch.cat([bits, nearby, subnormal]).view(torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions_agree_with_torch(name, dtype):
    library = load("plain")
    bits = torch.arange(-(2**15), 2**15).short()
    widened = torch.empty(bits.numel())
    convert = getattr(library, f"catalogue_from_{name}")
    convert(pointer(bits), pointer(widened), ctypes.c_size_t(bits.numel()))
    expected = bits.view(dtype).float()
    number = ~expected.isnan()
    assert torch.equal(widened.isnan(), ~number)
    assert torch.equal(widened.view(torch.int32)[number], expected.view(torch.int32)[number])

    floats = floats_of_all_kinds()
    narrowed = torch.empty(floats.numel(), dtype=torch.int16)
    convert = getattr(library, f"catalogue_to_{name}")
    convert(pointer(floats), pointer(narrowed), ctypes.c_size_t(floats.numel()))
    expected = floats.to(dtype)
    number = ~expected.isnan()
    assert torch.equal(narrowed.view(dtype).isnan(), ~number)
    assert torch.equal(narrowed[number], expected.view(torch.int16)[number])
