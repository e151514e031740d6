"""What nvcc made of the kernels: registers, instructions and loops, read from the built extension.

Run as a program it rewrites the register table, or prints it without --write.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import cbam_cuda

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc/cuda/REGISTERS.md"
WRITE = ".venv/bin/python tests/cuda_code.py --write"
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
DISASSEMBLED = ARCHITECTURES[1:]  # the first compiles from the loops of the second, but for a ReLU

# What a template argument says, by the place it stands at.
DTYPES = {"f": "float32", "d": "float64", "NS_4HalfE": "float16", "NS_8BFloat16E": "bfloat16"}
ACCESSES = {f"LNS0_6AccessE{i}E": name for i, name in enumerate(("scalar", "vector", "packed"))}
SCALED = {"Lb0E": "", "Lb1E": "scaled"}
ARGMAX = {"Lb0E": "", "Lb1E": "argmax"}
KEPT = {"Lb0E": "inference", "Lb1E": "training"}
SPLITS = {"LNS0_5SplitE0E": "", "LNS0_5SplitE1E": "by pixels"}
ORDER = {"Lb0E": "channels last", "Lb1E": "channels first"}
ACCUMULATOR = {"f": "", "d": ""}  # follows from the dtype
WALKS = {"Li2E": "few samples", "Li8E": ""}
TILES = {"Li16E": "", "Li32E": "large tiles"}
TEMPLATES = {
    "reduce_rows": (DTYPES, SCALED, ARGMAX),
    "reduce_packed_rows": (DTYPES, ARGMAX),
    "reduce_columns": (DTYPES, ACCESSES, SCALED, ARGMAX),
    "resident_forward": (DTYPES, ORDER, KEPT, SPLITS),
    "resident_backward": (DTYPES, ACCESSES, ORDER, SPLITS),
    "hidden_layer": (DTYPES, ACCUMULATOR, WALKS),
    "gate_layer": (DTYPES, ACCUMULATOR, WALKS),
    "both_layers": (DTYPES, ACCUMULATOR, WALKS),
    "spatial_gate": (DTYPES, ACCESSES, ORDER),
    "spatial_logits": (DTYPES,),
    "scale": (DTYPES, ACCESSES, ORDER),
    "cross_sums": (DTYPES, ACCESSES),
    "total_sums": (DTYPES,),
    "map_terms": (DTYPES, ACCESSES, ORDER),
    "stencil": (DTYPES,),
    "gate_layer_backward": (DTYPES, ACCUMULATOR, WALKS),
    "hidden_layer_backward": (DTYPES, ACCUMULATOR, WALKS),
    "both_layers_backward": (DTYPES, ACCUMULATOR, WALKS),
    "input_gradient": (DTYPES, ACCESSES, ORDER),
    "outer_sums": (DTYPES, TILES),
    "vector_sums": (DTYPES,),
}
PROBE = "5probeEv"  # does nothing: it tells whether a build has code for a device
WAIT, START_NEXT = "ACQBULK", "PREEXIT"  # of launches that overlap
FENCE_OF_COPIES = r"FENCE\.VIEW\.ASYNC"  # before a bulk copy writes what was read
ARGUMENT = re.compile(r"L(?:[bi]|NS0_(?:6Access|5Split)E)\d+E|NS_4HalfE|NS_8BFloat16E|[fd]")

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)\s*(.*?)\s*;")
SECTION = re.compile(r"\s*\.section\s+\.text\.(\w+)")
LABEL = re.compile(r"(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


class Kernel(NamedTuple):
    """One instantiation of a kernel; `words` are its template arguments, the dtype first."""

    kind: str
    words: tuple[str, ...]

    @property
    def dtype(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return " ".join((self.kind, *filter(None, self.words)))


def kernel_of(symbol: str) -> Kernel:
    """Read from the mangled name, so that no demangler is needed."""
    match = re.search(r"\d([a-z_]+)_kernelI(\w+)EEvN", symbol)
    if not match or match[1] not in TEMPLATES:
        raise ValueError(f"TEMPLATES in {__file__} does not know the kernel {symbol}")
    arguments = ARGUMENT.findall(match[2])
    # strict: an argument that ARGUMENT does not know must not go unnoticed
    words = (w[a] for w, a in zip(TEMPLATES[match[1]], arguments, strict=True))
    return Kernel(match[1], tuple(words))


class Instruction(NamedTuple):
    guard: str  # "@!P0", or empty
    opcode: str
    operands: str
    address: int


Loop = list[Instruction]


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int


@dataclass
class Code:
    """A kernel's instructions, and its innermost loops that load from global memory."""

    opcodes: Counter[str]
    before_wait: Counter[str]  # those that may run before the wait for the launch before
    loops: list[Loop]

    def x_loops(self) -> list[Loop]:
        """The loops over x of a kernel that reads it in vectors.

        x alone is read 16 bytes at a time: factors, gates, maps and weights come one by one. And
        next to x a loop reads nothing from global memory, as the rest was staged in shared memory.
        """
        return [loop for loop in self.loops if any(is_vector_load(i.opcode) for i in loop)]

    def main_loops(self) -> list[Loop]:
        """All that write, one for each of what may follow the block; of those that only read the
        unrolled one, as others take what unrolling leaves over.
        """
        loops = self.x_loops()
        writing = [loop for loop in loops if any(i.opcode.startswith("STG") for i in loop)]
        return writing or sorted(loops, key=vector_loads)[-1:]


def is_global(opcode: str) -> bool:
    """Loads and stores of global memory, and generic ones, which may be."""
    return opcode.partition(".")[0] in ("LDG", "STG", "LD", "ST")


def is_vector_load(opcode: str) -> bool:
    return opcode.startswith("LDG.") and ".128" in opcode


def vector_loads(loop: Loop) -> int:
    """How many a turn has."""
    return sum(is_vector_load(i.opcode) for i in loop)


def loads_in_flight(loop: Loop) -> int:
    """How many vector loads are under way at a time: issued, none of their registers named since.

    The loop is gone through twice, as the scheduler may have moved loads to its end.
    """
    flying: list[range] = []
    most = 0
    for i in loop * 2:
        named = {int(n) for n in re.findall(r"\bR(\d+)", i.operands)}
        for number, registers in enumerate(flying):
            if not named.isdisjoint(registers):
                flying = flying[number + 1 :]  # those before it have come as well
                break
        if is_vector_load(i.opcode):
            first = int(re.match(r"R(\d+)", i.operands)[1])
            flying.append(range(first, first + 4))
            most = max(most, len(flying))
    return most


def successors(code: list[Instruction], at: dict[str, int]) -> list[list[int]]:
    """Where control may go from each instruction; calls of functions are taken to return."""
    after = []
    for index, i in enumerate(code):
        kind = i.opcode.partition(".")[0]
        # A CALL to a label instead of a function is ptxas's way to leave a loop now and then.
        target = TARGET.search(i.operands) if kind in ("BRA", "CALL") else None
        jumps = target and (i.opcode == "BRA" or kind == "CALL") and i.operands.startswith("`")
        ends = jumps or kind in ("EXIT", "RET")
        goes_on = (i.guard or not ends) and index + 1 < len(code)
        after.append([index + 1] * goes_on + ([at[target[1]]] if target else []))
    return after


def find_loops(code: list[Instruction], at: dict[str, int]) -> list[frozenset[int]]:
    """The natural loops: for a branch back, all that leads to it without passing its target."""
    after = successors(code, at)
    before: list[list[int]] = [[] for _ in code]
    for index, nexts in enumerate(after):
        for n in nexts:
            before[n].append(index)
    bodies: dict[int, set[int]] = {}
    for latch, nexts in enumerate(after):
        for header in nexts:
            if header > latch:
                continue
            body, open_ends = {header}, [latch]
            while open_ends:
                index = open_ends.pop()
                if index not in body:
                    body.add(index)
                    open_ends += before[index]
            # Where the start of the kernel leads to it as well, the branch closes no loop: it comes
            # back from a slow path behind the kernel's end.
            if 0 not in body or header == 0:
                bodies.setdefault(header, set()).update(body)
    return [frozenset(body) for body in bodies.values()]


def before_wait(code: list[Instruction], at: dict[str, int]) -> Counter[str]:
    """What may run before the wait for the launch before: all of a kernel that has none."""
    after = successors(code, at)
    reached: set[int] = set()
    open_ends = [0]
    while open_ends:
        index = open_ends.pop()
        if index not in reached and code[index].opcode != WAIT:
            reached.add(index)
            open_ends += after[index]
    return Counter(code[index].opcode for index in reached)


def code_of(lines: list[str]) -> Code:
    """From a kernel's lines of nvdisasm."""
    code: list[Instruction] = []
    at: dict[str, int] = {}
    for line in lines:
        if match := INSTRUCTION.match(line):
            guard, opcode, operands = match[2], match[3], match[4]
            code.append(Instruction((guard or "").strip(), opcode, operands, int(match[1], 16)))
        elif match := LABEL.match(line):
            at[match[1]] = len(code)
    reading = [
        body
        for body in find_loops(code, at)
        if any(is_global(code[i].opcode) and code[i].opcode.startswith("LD") for i in body)
    ]
    innermost = [body for body in reading if not any(other < body for other in reading)]
    loops = [[code[i] for i in sorted(body)] for body in innermost]
    return Code(Counter(i.opcode for i in code), before_wait(code, at), loops)


def parse_sass(text: str) -> dict[Kernel, Code]:
    """Every kernel of nvdisasm's listing."""
    sections: dict[Kernel, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := SECTION.match(line):
            is_probe = match[1].endswith(PROBE)
            lines = [] if is_probe else sections.setdefault(kernel_of(match[1]), [])
        lines.append(line)
    return {kernel: code_of(lines) for kernel, lines in sections.items()}


def parse_usage(text: str) -> dict[Kernel, Usage]:
    """Every kernel of cuobjdump's -res-usage."""
    found = (m for m in USAGE.finditer(text) if not m[1].endswith(PROBE))
    return {kernel_of(m[1]): Usage(int(m[2]), int(m[3]), int(m[4])) for m in found}


def find_tool(name: str) -> str | None:
    """A program of the packages that requirements-dev.txt pins, else of the toolkit."""
    try:
        for file in metadata.files(f"nvidia-cuda-{name}") or ():
            if file.name == name:
                return str(file.locate())
    except metadata.PackageNotFoundError:
        pass
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / name).is_file():
            return str(Path(home) / "bin" / name)
    return None


def why_not() -> str | None:
    """Why the built code cannot be read here; None if it can."""
    if not cbam_cuda.info()["build"]["cuda_architectures"]:
        return "the extension was built without CUDA"
    missing = [name for name in ("cuobjdump", "nvdisasm") if not find_tool(name)]
    return f"no {' and no '.join(missing)}" if missing else None


def built_for() -> list[str]:
    """The architectures of ARCHITECTURES that the extension has machine code for."""
    built = cbam_cuda.info()["build"]["cuda_architectures"]
    return [a for a in ARCHITECTURES if a in built or f"{a}+PTX" in built]


def output_of(tool: str, *arguments: str | Path, folder: Path | None = None) -> str:
    return subprocess.run(
        [find_tool(tool), *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def sm(architecture: str) -> str:
    return f"sm_{architecture.replace('.', '')}"


def extension() -> str:
    (path,) = (ROOT / "cbam_cuda").glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}")
    return str(path)


def read_usage(architecture: str) -> dict[Kernel, Usage]:
    listing = output_of("cuobjdump", "-arch", sm(architecture), "-res-usage", extension())
    return parse_usage(listing)


def read_sass(folder: Path) -> dict[str, dict[Kernel, Code]]:
    """As cuobjdump -sass, without the encodings that it always prints: two thirds of the time."""
    output_of("cuobjdump", "-xelf", "all", extension(), folder=folder)
    chosen = [a for a in built_for() if a in DISASSEMBLED]
    cubins = [(a, path) for a in chosen for path in folder.glob(f"*.{sm(a)}.cubin")]
    code: dict[str, dict[Kernel, Code]] = {a: {} for a in chosen}
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        listings = pool.map(lambda cubin: output_of("nvdisasm", "-c", "-ndf", cubin[1]), cubins)
        for (a, _), text in zip(cubins, listings, strict=True):
            code[a].update(parse_sass(text))
    return code


def registers(usage: dict[str, dict[Kernel, Usage]]) -> dict[str, list[int]]:
    """Kernel -> what it takes on each architecture."""
    kernels = {kernel for of_kernel in usage.values() for kernel in of_kernel}
    return {str(k): [usage[a][k].registers for a in usage] for k in sorted(kernels, key=str)}


def read_table(text: str) -> tuple[list[str], dict[str, list[int]]]:
    """The architectures of a written table, and what kernels take there."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    (_, *columns), _, *kernels = rows
    return columns, {kernel: [int(count) for count in counts] for kernel, *counts in kernels}


def table_text(usage: dict[str, dict[Kernel, Usage]], version: str) -> str:
    """The whole of REGISTERS.md."""
    lines = [
        "# Registers of the kernels",
        "",
        "Registers of a thread, by kernel and architecture, as nvcc allots them. Shared memory is",
        "dynamic throughout: the planner (`plan.cpp`) says how much a launch takes.",
        "",
        f"Made with nvcc {version} from the built extension, with which `tests/test_cuda_code.py`",
        f"compares it; `{WRITE}` rewrites it.",
        "",
        " | ".join(("| kernel", *map(sm, usage))) + " |",
        "| --- |" + " ---: |" * len(usage),
        *(f"| {kernel} | {' | '.join(map(str, of))} |" for kernel, of in registers(usage).items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"cuda_code: {reason}")
    usage = {a: read_usage(a) for a in built_for()}
    text = table_text(usage, cbam_cuda.info()["build"]["cuda_version"])
    if options.write:
        TABLE.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
