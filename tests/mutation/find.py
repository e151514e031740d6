"""What can be broken in the kernels: each barrier, each comparison with a limit, each clamp."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emulator.build import CSRC

FOLDERS = ("cuda/kernels", "cuda/primitives")
# Where a limit that is known to the compiler guards no memory, beside the definitions of constants.
CONSTANT_LIMITS = ("for ", "static_assert")
BINDS_LESS = re.compile(r"[;,?]|&&|\|\||(?<!:):(?!:)")  # than a comparison
ARGUMENT = re.compile(",")
BARRIERS = (
    "__syncthreads",
    "__syncwarp",
    "__threadfence",
    "block.team.barrier",
    "block.team.open",
    "wait_for_chunk",
    "loads.wait",
    "of.wait",
    "publish_inits",
    "hand_over_rows",
    "hand_over_to_bulk_copies",
    "arrive_expecting",
    "arrive_after_copies",
)


@dataclass(frozen=True)
class Mutant:
    path: str  # below csrc
    kind: str  # "barrier" or "bound"
    line: int
    key: str  # of no other one; the same after a change elsewhere in the file
    text: str  # of the whole file

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.key.partition(': ')[2]}"


def sources() -> list[Path]:
    """The files that are broken."""
    return [
        path
        for folder in FOLDERS
        for path in sorted((CSRC / folder).iterdir())
        if path.suffix in (".cu", ".cuh")
    ]


def operand(code: str, start: int, end: re.Pattern[str]) -> str:
    """What stands from `start` on, up to `end` or the parenthesis around it."""
    depth = 0
    for at in range(start, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth < 0 or (not depth and end.match(code, at)):
            return code[start:at]
    return code[start:]


def inside(word: str, code: str, at: int) -> bool:
    """Whether `at` is inside the parentheses behind the last of these words."""
    start, depth = code.rfind(word, 0, at), 0
    for character in code[max(start, 0) + len(word) : at]:
        depth += (character == "(") - (character == ")")
        if not depth:
            return False
    return start >= 0


def guards_nothing(code: str, at: int) -> bool:
    """Whether a limit there that is known to the compiler guards no memory."""
    statement = code[max(code.rfind(end, 0, at) for end in ";{}") + 1 : at]
    return "constexpr " in statement or any(inside(word, code, at) for word in CONSTANT_LIMITS)


def weakened(code: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and replacement of every comparison with a limit of the problem."""
    for found in re.finditer(r" (<|<=|>=)\s", code):
        start, end, sign = found.start(1), found.end(1), found[1]
        limit = operand(code, end, BINDS_LESS)
        names = re.findall(r"[A-Za-z_]\w*", limit)
        constant = all(re.match(r"k[A-Z]", name) for name in names)
        if sign == ">=":
            zero = limit.strip() == "0"
            yield (start, end + len(limit.rstrip()), ">= -1") if zero else (start, end, ">")
        elif not (constant and guards_nothing(code, start)):
            yield start, end, "<=" if sign == "<" else "<= 1 +"


def unclamped(code: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and replacement of every smaller of two, by each of them alone."""
    for found in re.finditer(r"\bmin\(", code):
        one = operand(code, found.end(), ARGUMENT)
        other = operand(code, found.end() + len(one) + 1, ARGUMENT)
        end = found.end() + len(one) + 1 + len(other) + 1
        for kept in (one, other):
            yield found.start(), end, f"({kept.strip()})"


def emulated(text: str) -> str:
    """The same, with spaces for what the preprocessor reads, and for what only nvcc compiles."""
    # Of each condition around a line: where the emulator's branch is, or that it is about others.
    branches: list[str] = []
    lines = []
    for line in text.splitlines(keepends=True):
        if line.startswith("#if"):
            about = "CBAM_EMULATED" in line
            negated = "!defined(CBAM_EMULATED)" in line
            branches.append("last" if negated else "this" if about else "any")
        elif line.startswith(("#else", "#elif")):
            if branches[-1] == "this":
                branches[-1] = "past"
            elif branches[-1] == "last" and line.startswith("#else"):
                branches[-1] = "this"
        elif line.startswith("#endif"):
            branches.pop()
        left_out = line.startswith("#") or not {*branches} <= {"this", "any"}
        lines.append(re.sub(r"[^\n]", " ", line) if left_out else line)
    return "".join(lines)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All of one file."""
    text, name = path.read_text(), path.relative_to(CSRC).as_posix()
    # Of the same length, without comments.
    code = re.sub(r"//[^\n]*", lambda s: " " * len(s[0]), emulated(text))

    def line_at(whole: str, at: int) -> str:
        return " ".join(whole[whole.rfind("\n", 0, at) + 1 :].partition("\n")[0].split())

    def mutant(kind: str, start: int, what: str, changed: str) -> Mutant:
        return Mutant(name, kind, text.count("\n", 0, start) + 1, f"{path.name}: {what}", changed)

    calls = re.finditer(rf"(?<!void )\b({'|'.join(BARRIERS)})\([^;{{]*\);", code)
    for number, found in enumerate(calls, 1):
        start, before = found.start(), code[: found.start()].rstrip()
        what = f"barrier {number}, {found[1]} after {line_at(before, len(before))}"
        yield mutant("barrier", start, what, f"{text[:start]};{text[found.end() :]}")
    seen: Counter[str] = Counter()  # of what is changed in the same way elsewhere in the file
    for start, end, new in (*weakened(code), *unclamped(code)):
        changed = text[:start] + new + text[end:]
        what = f"{line_at(text, start)} -> {line_at(changed, start)}"
        seen[what] += 1
        again = f" (number {seen[what]})" if seen[what] > 1 else ""
        yield mutant("bound", start, what + again, changed)


def all_mutants() -> list[Mutant]:
    return [mutant for path in sources() for mutant in mutants_of(path)]
