"""The kernels as nvcc compiled them: no spills, 16 bytes an access, loads under way together."""

from __future__ import annotations

import fcntl
import itertools
import os
import pickle
import re

import cuda_code
import pytest
from cuda_code import (
    ARCHITECTURES,
    DISASSEMBLED,
    FENCE_OF_COPIES,
    START_NEXT,
    TABLE,
    TEMPLATES,
    WAIT,
    WRITE,
    code_of,
    is_global,
    is_vector_load,
    sm,
)

import cbam_cuda

# The kernels that read tensors of x's size.
PASSES = (
    "reduce_rows",
    "reduce_packed_rows",
    "reduce_columns",
    "spatial_gate",
    "scale",
    "cross_sums",
    "map_terms",
    "input_gradient",
)

REGISTERS_OF_SM = 65536
WRITES = ("spatial_gate", "scale", "input_gradient")  # and those that write one
RESIDENT = ("resident_forward", "resident_backward")  # and those that hold them on the chip
THREADS = {
    "gate_layer": 128,
    "gate_layer_backward": 512,
    "hidden_layer_backward": 128,
    "both_layers_backward": 512,
    "vector_sums": 512,
    "resident_forward": 512,
    "resident_backward": 512,
}  # of a block; 256 for the other kernels

UNDER_WAY = 3  # 16-byte loads of a thread at a time, at least

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=sm)
each_disassembled = pytest.mark.parametrize("architecture", DISASSEMBLED, ids=sm)
each_kernel = pytest.mark.parametrize("kind", TEMPLATES)
each_pass = pytest.mark.parametrize("kind", PASSES)


@pytest.fixture(scope="session")
def usage():
    if reason := cuda_code.why_not():
        pytest.skip(reason)
    return {a: cuda_code.read_usage(a) for a in cuda_code.built_for()}


@pytest.fixture(scope="session")
def sass(tmp_path_factory):
    """Disassembled once: xdist's workers share the folder above theirs, for this run alone."""
    if reason := cuda_code.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "cuda_code.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / "cuda_code.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(cuda_code.read_sass(tmp_path_factory.mktemp("cubins"))))
        return pickle.loads(kept.read_bytes())


def kernels_of(of_architectures, architecture, kind):
    """The instantiations of one kernel for one architecture."""
    if architecture not in of_architectures:
        pytest.skip(f"the extension has no machine code for {sm(architecture)}")
    found = {k: v for k, v in of_architectures[architecture].items() if k.kind == kind}
    assert found
    return found


def none_of(found: dict) -> None:
    """Fails with what was found, a kernel a line."""
    if found:
        pytest.fail("\n".join(f"{kernel}: {what}" for kernel, what in found.items()), pytrace=False)


def reads_vectors(kernel) -> bool:
    return kernel.kind in PASSES and "scalar" not in kernel.words


def matching(opcodes, pattern):
    return sorted(opcode for opcode in opcodes if re.match(pattern, opcode))


def is_compiled(kind: str, words: tuple[str, ...]) -> bool:
    """Not vectors and resident samples of float64, nor packed rows where channels come last or
    blocks hold pixels, nor resident samples that would be read one element at a time."""
    if {"packed", "by pixels"} <= set(words):
        return False
    if "packed" in words and not {"channels last", ""}.isdisjoint(words[2:3]):
        return False
    if kind in RESIDENT and not {"float64", "scalar"}.isdisjoint(words):
        return False
    return "float64" not in words or {"vector", "packed"}.isdisjoint(words)


@each_architecture
@each_kernel
def test_every_instantiation_was_read(usage, sass, kind, architecture):
    every = itertools.product(*(set(words.values()) for words in TEMPLATES[kind]))
    expected = {words for words in every if is_compiled(kind, words)}
    assert {k.words for k in kernels_of(usage, architecture, kind)} == expected
    if architecture in sass:
        assert {k.words for k in kernels_of(sass, architecture, kind)} == expected


@each_architecture
@each_kernel
def test_nothing_spills(usage, kind, architecture):
    none_of(
        {
            kernel: used
            for kernel, used in kernels_of(usage, architecture, kind).items()
            if used.stack or used.local
        }
    )


@each_disassembled
@each_kernel
def test_nothing_passes_through_local_memory(sass, kind, architecture):
    code = kernels_of(sass, architecture, kind)
    none_of({k: found for k, c in code.items() if (found := matching(c.opcodes, "LDL|STL"))})


@each_disassembled
@each_kernel
def test_no_atomics_on_floats(sass, kind, architecture):
    """They would make results depend on the order of blocks; CAS loops stand for such."""
    atomics = r"(RED|ATOM[GS]?)\..*(F16|F32|F64|BF16|CAS)"
    code = kernels_of(sass, architecture, kind)
    none_of({k: found for k, c in code.items() if (found := matching(c.opcodes, atomics))})


@each_disassembled
@each_kernel
def test_every_address_space_is_known(sass, kind, architecture):
    """A generic access to shared memory is slower than one that says so, and costs registers."""
    if kind in RESIDENT:
        pytest.skip("what a team exchanges is in shared memory or in global memory, by the plan")
    code = kernels_of(sass, architecture, kind)
    none_of({k: found for k, c in code.items() if (found := matching(c.opcodes, r"(LD|ST)(\.|$)"))})


@each_disassembled
@each_pass
def test_x_passes_in_vectors(sass, kind, architecture):
    wrong = {}
    for kernel, code in kernels_of(sass, architecture, kind).items():
        if not reads_vectors(kernel):
            if found := [opcode for opcode in code.opcodes if is_vector_load(opcode)]:
                wrong[kernel] = f"{found} where the rows may not be aligned"
            continue
        if not code.x_loops():
            wrong[kernel] = "no loop with 16-byte loads"
            continue
        # Generic accesses have a test of their own.
        accesses = [
            i.opcode for loop in code.x_loops() for i in loop if re.match("LDG|STG", i.opcode)
        ]
        if narrow := {opcode for opcode in accesses if ".128" not in opcode}:
            wrong[kernel] = f"{sorted(narrow)} next to the 16-byte loads"
        elif kind in WRITES and not matching(accesses, r"STG.*\.128"):
            wrong[kernel] = "no 16-byte stores"
    none_of(wrong)


@each_disassembled
@each_pass
def test_loops_over_x_are_unrolled(sass, kind, architecture):
    wrong = {}
    for kernel, code in kernels_of(sass, architecture, kind).items():
        if reads_vectors(kernel):
            # Packed, the gates and rows of a vector's elements take the registers of more.
            packed = kind in ("spatial_gate", "scale") and "packed" in kernel.words
            floor = 2 if packed or kind == "input_gradient" else 4
            loads = min(map(cuda_code.vector_loads, code.main_loops()), default=0)
            if loads < floor:
                wrong[kernel] = f"{loads} 16-byte loads a turn, {floor} expected"
    none_of(wrong)


@each_disassembled
@each_pass
def test_several_loads_are_under_way(sass, kind, architecture):
    """A warp that waits for each load before the next needs far more warps to fill the memory."""
    wrong = {}
    for kernel, code in kernels_of(sass, architecture, kind).items():
        if reads_vectors(kernel) and kernel.dtype != "float64":  # two elements a load: as slow
            flying = min(map(cuda_code.loads_in_flight, code.main_loops()), default=0)
            floor = 2 if kind == "input_gradient" else UNDER_WAY
            if flying < floor:
                wrong[kernel] = f"{flying} 16-byte loads at a time, {floor} expected"
    none_of(wrong)


def copies_of(architecture: str) -> str:
    """The instruction that brings x to shared memory."""
    major = int(architecture.split(".")[0])
    return r"UBLKCP" if major >= 9 else r"LDGSTS.*\.128" if major == 8 else r"LDG\.E\.128"


@each_disassembled
@pytest.mark.parametrize("kind", RESIDENT)
def test_samples_come_to_the_chip_by_copies(sass, kind, architecture):
    code = kernels_of(sass, architecture, kind)
    wanted = (copies_of(architecture), r"LDS\.128", r"STG.*\.128")
    none_of(
        {
            kernel: f"no {pattern}"
            for kernel, c in code.items()
            for pattern in wanted
            if not matching(c.opcodes, pattern)
        }
    )


@each_disassembled
@pytest.mark.parametrize("kind", RESIDENT)
def test_rows_are_handed_over_to_bulk_copies(sass, kind, architecture):
    """By a fence before the barrier: they write past what orders other accesses."""
    missing = {
        kernel: "no fence"
        for kernel, code in kernels_of(sass, architecture, kind).items()
        if bool(matching(code.opcodes, FENCE_OF_COPIES)) != (float(architecture) >= 9)
    }
    none_of(missing)


# What reads the operator's weights, or asks for x or its gradient, while the launch before runs.
READS_AHEAD = (
    "hidden_layer",
    "gate_layer",
    "both_layers",
    "spatial_gate",
    "spatial_logits",
    "stencil",
)
PREFETCHES_AHEAD = ("reduce_columns", "spatial_gate", "map_terms", "input_gradient")


def waits(architecture: str, kind: str) -> bool:
    return float(architecture) >= 9 and kind not in RESIDENT


@each_disassembled
@each_kernel
def test_launches_that_overlap_wait_for_the_one_before(sass, kind, architecture):
    """On every way through the kernel, and only then let the next one start."""
    wrong = {}
    for kernel, code in kernels_of(sass, architecture, kind).items():
        found = (code.opcodes[WAIT], code.opcodes[START_NEXT])
        expected = (1, 1) if waits(architecture, kind) else (0, 0)
        if found != expected:
            wrong[kernel] = f"{found} waits and starts of the next launch, {expected} expected"
        elif expected != (0, 0) and (early := matching(code.before_wait, f"EXIT|{START_NEXT}")):
            wrong[kernel] = f"{early} before the wait"
    none_of(wrong)


@each_disassembled
@each_kernel
def test_what_the_launch_before_may_write_is_not_touched_before_the_wait(sass, kind, architecture):
    """The compiler may not move loads there either: it takes many to be of constant memory."""
    if not waits(architecture, kind):
        pytest.skip("its launches do not overlap")
    wrong = {}
    for kernel, code in kernels_of(sass, architecture, kind).items():
        first = kind == "reduce_columns" and "scaled" not in kernel.words
        reads = [op for op in code.before_wait if is_global(op)]
        if kind in READS_AHEAD:  # weights, one by one
            reads = [op for op in reads if op.startswith("ST") or ".128" in op or ".CONSTANT" in op]
        if kind not in PREFETCHES_AHEAD or first:
            reads += matching(code.before_wait, "UBLKPF")
        if reads:
            wrong[kernel] = f"{reads} before the wait"
    none_of(wrong)


@pytest.mark.parametrize("kind", PREFETCHES_AHEAD)
def test_passes_ask_for_their_tensor_before_the_wait(sass, kind):
    wrong = {}
    for kernel, code in kernels_of(sass, "9.0", kind).items():
        later = kind != "reduce_columns" or "scaled" in kernel.words
        if later and reads_vectors(kernel) and not matching(code.before_wait, "UBLKPF"):
            wrong[kernel] = "nothing asked for"
    none_of(wrong)


BLOCKS = {
    "hidden_layer": 2,
    "gate_layer": 4,
    "both_layers": 2,
    "reduce_rows": 4,
    "reduce_packed_rows": 4,
    "reduce_columns": 3,
    "spatial_gate": 3,
    "spatial_logits": 3,
    "scale": 3,
    "cross_sums": 2,
    "map_terms": 2,
    "input_gradient": 2,
}


# Of doubles half as many threads share an SM.
HALVED = ("hidden_layer", "both_layers", "gate_layer_backward", "both_layers_backward")


def most_registers(kernel) -> int:
    """A thread's registers at most, by the blocks an SM holds of the kernel (__launch_bounds__)."""
    blocks = BLOCKS.get(kernel.kind, 1)
    if kernel.kind == "reduce_columns" and {"packed", "argmax"} <= set(kernel.words):
        blocks = 2
    threads = blocks * THREADS.get(kernel.kind, 256)
    if kernel.kind in HALVED and kernel.dtype == "float64":
        threads //= 2
    return min(255, REGISTERS_OF_SM // threads // 8 * 8)


@each_architecture
@each_kernel
def test_registers_leave_room_for_blocks(usage, kind, architecture):
    none_of(
        {
            kernel: f"{used.registers} registers, at most {most_registers(kernel)} expected"
            for kernel, used in kernels_of(usage, architecture, kind).items()
            if used.registers > most_registers(kernel)
        }
    )


def test_register_table_is_current(usage):
    """As far as the extension has machine code for its columns."""
    text = TABLE.read_text()
    version = re.search(r"Made with nvcc (\S+)", text)[1]
    if version != (built := cbam_cuda.info()["build"]["cuda_version"]):
        pytest.skip(f"the table is of nvcc {version}, the extension of nvcc {built}")
    columns, written = cuda_code.read_table(text)
    shared = {a: of_kernels for a, of_kernels in usage.items() if sm(a) in columns}
    if not shared:
        pytest.skip("the extension has no machine code for any column of the table")
    expected = cuda_code.registers(shared)
    at = [columns.index(sm(a)) for a in shared]
    found = {kernel: [row[i] for i in at] for kernel, row in written.items()}
    if changes := sorted(set(map(str, found.items())) ^ set(map(str, expected.items()))):
        shown = "\n".join(changes)
        pytest.fail(f"{TABLE.name} is not current: {WRITE}\n{shown}", pytrace=False)


# A loop with a way out in its middle, and behind it a slow path that comes back.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/                   {first} ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   LDG.E.128.CONSTANT R8, [R2.64+0x10] ;
        /*0050*/                   FADD R1, R1, R4 ;
        /*0060*/                   FADD R1, R1, R8 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   STG.E [R2.64], R1 ;
        /*0090*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   LDG.E R12, [R2.64] ;
        /*00c0*/                   BRA `(.L_x_3) ;
"""


@pytest.mark.parametrize(("first", "flying"), [("NOP", 2), ("FADD R1, R1, R7", 1)])
def test_the_reading_of_loops(first, flying):
    code = code_of(SASS.format(first=first).splitlines())
    (loop,) = code.main_loops()
    assert [i.address for i in loop] == list(range(0x10, 0x80, 0x10))
    assert len(code.loops) == 1
    assert [i.opcode for i in loop if is_global(i.opcode)] == ["LDG.E.128.CONSTANT"] * 2
    assert cuda_code.loads_in_flight(loop) == flying


# A branch around the wait.
WAITING = """
        /*0000*/               {around} ;
        /*0010*/                   LDG.E R4, [R2.64] ;
        /*0020*/                   ACQBULK ;
        /*0030*/                   PREEXIT ;
.L_x_1:
        /*0040*/                   STG.E [R2.64], R4 ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("around", "expected"),
    [
        ("NOP", {"NOP", "LDG.E"}),
        ("@P0 BRA `(.L_x_1)", {"BRA", "LDG.E", "STG.E", "EXIT"}),
        ("BRA `(.L_x_1)", {"BRA", "STG.E", "EXIT"}),
    ],
)
def test_the_reading_of_what_comes_before_the_wait(around, expected):
    assert set(code_of(WAITING.format(around=around).splitlines()).before_wait) == expected
