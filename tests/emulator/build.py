"""Builds the CUDA sources for the emulator, as shared libraries under build/emulator.

plain: as fast as it gets; asan: with address and undefined-behaviour sanitizers, to be loaded with
LD_PRELOAD=libasan; race: kernels call the race detector on every access.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parent.parent
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build/emulator"

KINDS = ("plain", "asan", "race")
RACE_SOURCES = (
    "access.cpp",
    "clocks.cpp",
    "races.cpp",
    "shadow.cpp",
    "spans.cpp",
    "vector_clock.cpp",
)

SANITIZERS = "-fsanitize=address,undefined"
# Other dtypes take the same branches, and a build of all of them takes long.
FLOAT32, AND_FLOAT16 = "-DCBAM_DTYPES=1", "-DCBAM_DTYPES=2"
KERNEL_FLAGS = {
    "plain": "-O1",
    "asan": f"-O1 -fno-omit-frame-pointer {SANITIZERS} -fno-sanitize-recover=undefined {FLOAT32}",
    # What is instrumented calls our functions: libtsan is not linked.
    "race": f"-O1 -fsanitize=thread --param tsan-instrument-func-entry-exit=0 {AND_FLOAT16}",
}
HOST_FLAGS = {
    "plain": "-O1",
    "asan": KERNEL_FLAGS["asan"],
    "race": "-O2 -DCBAM_EMULATOR_RACE",
}
LINK_FLAGS = {"plain": "", "asan": SANITIZERS, "race": ""}

BACKEND = "libcbam_emulated.so"
CATALOGUE = "libcatalogue.so"


def load_setup() -> ModuleType:
    """setup.py, which knows the compiler and torch's folders."""
    spec = importlib.util.spec_from_file_location("cbam_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library(kind: str, name: str = BACKEND) -> Path:
    """Where a built library stands."""
    return OUTPUT / kind / name


def emulator_sources(kind: str) -> list[Path]:
    """The emulator's own; those of the race detector for its build alone."""
    sources = sorted(EMULATOR.glob("*.cpp"))
    return [path for path in sources if kind == "race" or path.name not in RACE_SOURCES]


def kernel_sources() -> list[Path]:
    """What nvcc compiles in a real build, but for the enumeration of devices."""
    return [path for path in sorted((CSRC / "cuda").rglob("*.cu")) if path.name != "device.cu"]


def backend_sources() -> list[Path]:
    """Host code that sees torch."""
    return [
        *sorted((CSRC / "cuda").glob("*.cpp")),
        CSRC / "arguments.cpp",
        *sorted((EMULATOR / "backend").glob("*.cpp")),
    ]


class NinjaFile:
    """One kind of build: what it compiles and links, as ninja reads it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.folder = OUTPUT / kind
        self.setup = load_setup()
        self.lines = [f"builddir = {self.folder}"]
        common = (
            "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-strict-aliasing -g1 "
            f"-Wall -Wno-unknown-pragmas -DCBAM_EMULATED -I{EMULATOR}/include -I{CSRC}"
        )
        compile_ = f"{self.setup.compiler()} {common} $flags -MMD -MF $out.d -c"
        self.rule("kernel", f"{compile_} {KERNEL_FLAGS[kind]} -x c++ $in -o $out")
        self.rule("host", f"{compile_} {HOST_FLAGS[kind]} $in -o $out")
        link = f"{self.setup.compiler()} -shared $in {LINK_FLAGS[kind]} $flags -o $out.part"
        # Whole or not at all: another process may load the library meanwhile.
        self.lines += ["rule link", f"  command = {link} && mv $out.part $out"]
        self.emulator = [self.compile("host", path) for path in emulator_sources(kind)]

    def rule(self, name: str, command: str) -> None:
        """A compilation."""
        self.lines += [f"rule {name}", f"  command = {command}", "  depfile = $out.d"]
        self.lines += ["  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: str = "") -> str:
        """One object."""
        output = f"{self.folder}/{source.relative_to(ROOT)}.o"
        self.lines += [f"build {output}: {rule} {source}", f"  flags = {flags}"]
        return output

    def link(self, name: str, objects: list[str], flags: str = "") -> None:
        """One library, with the emulator inside."""
        # The emulator first: of a template that kernels instantiate too, it must get the copy that
        # is not instrumented.
        inputs = " ".join([*self.emulator, *objects])
        self.lines += [f"build {library(self.kind, name)}: link {inputs}", f"  flags = {flags}"]

    def backend(self) -> None:
        """The CUDA backend, behind the same operators as the real one."""
        includes, libraries = self.setup.torch_paths()
        flags = " ".join(
            [
                f"-DTORCH_TARGET_VERSION={self.setup.TORCH_TARGET_VERSION}",
                *(f"-isystem {folder}" for folder in includes),
            ]
        )
        objects = [self.compile("kernel", path) for path in kernel_sources()]
        objects += [self.compile("host", path, flags) for path in backend_sources()]
        search = " ".join(f"-L{folder}" for folder in libraries)
        self.link(BACKEND, objects, f"{search} -ltorch_cpu -lc10")

    def catalogue(self) -> None:
        """Kernels with known mistakes; needs no torch."""
        sources = sorted(EMULATOR.glob("catalogue*.cu"))
        self.link(CATALOGUE, [self.compile("kernel", path) for path in sources])

    def run(self, name: str, jobs: int) -> None:
        """Build the library, or say what the compiler said."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.ninja"
        path.write_text("\n".join(self.lines) + "\n")
        command = [self.setup.ninja_path(), "-f", str(path), "-j", str(jobs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)


def asan_environment() -> dict[str, str]:
    """What a Python process needs to load a library of the asan kind."""
    compiler = load_setup().compiler()
    # libstdc++ as well: the sanitizer wraps what throws, and looks for it when it starts.
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [*compiler.split(), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in names
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def build(kind: str, name: str = BACKEND, jobs: int | None = None) -> Path:
    """Build one library of one kind where it is out of date; safe from several processes."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja_file = NinjaFile(kind)
        if name == CATALOGUE:
            ninja_file.catalogue()
        else:
            ninja_file.backend()
        ninja_file.run(name, jobs or int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)))
    return library(kind, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="kind", help=", ".join(KINDS))
    parser.add_argument("--catalogue", action="store_true", help="the kernels with mistakes")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one a core)")
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"unknown kind: {', '.join(sorted(unknown))}")
    for kind in given.kinds or KINDS:
        print(build(kind, CATALOGUE if given.catalogue else BACKEND, given.jobs))


if __name__ == "__main__":
    main()
