"""Builds cbam_cuda._C with ninja. Everything that is not code generation stands in pyproject.toml.

CBAM_CUDA_BUILD=auto (the default) compiles the CUDA sources where a CUDA toolkit is found, whether
or not there is a GPU; =cuda makes its absence an error; =cpu leaves them out. The toolkit is looked
for in CUDA_HOME, CUDA_PATH and /usr/local/cuda. TORCH_CUDA_ARCH_LIST names the architectures.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

OLDEST_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"
# Machine code for 8.0 also runs on 8.6, 8.7 and 8.9, and nothing here uses what only those have.
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0;10.0+PTX;12.0"
ARCHITECTURE = re.compile(r"\d+\.\d[af]?(\+PTX)?")

# The CPU kernels are compiled once for each of these; csrc/cpu/target.cpp chooses at run time.
CPU_TARGETS = {"baseline": ""}
X86 = platform.machine().lower() in ("x86_64", "amd64")
if X86:
    CPU_TARGETS["avx2"] = "-mavx2 -mfma -mf16c"
    CPU_TARGETS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 "
        "-Wno-maybe-uninitialized"  # g++ 12 warns in its own avx512fintrin.h
    )
PER_TARGET_SOURCES = ("cpu/forward.cpp", "cpu/backward.cpp")


def fail(message: str) -> None:
    """End the build with one line that says what to do."""
    raise SystemExit(f"cbam_cuda: {message}")


def torch_paths() -> tuple[list[str], list[str]]:
    """Include and library folders of the installed torch."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        fail(
            "torch was not found by the build: install torch >= 2.11, then run "
            "`pip install --no-build-isolation .`"
        )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        fail(f"torch >= 2.11 is needed, found {torch.__version__}: run `pip install -U torch`")
    return include_paths(), library_paths()


def pybind11_include() -> str:
    """Include folder of the pybind11 package."""
    try:
        import pybind11
    except ImportError:
        fail("pybind11 was not found by the build: run `pip install pybind11`")
    return pybind11.get_include()


def ninja_path() -> str:
    """The ninja program, of the Python package or of the system."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if not found:
        fail("ninja was not found: run `pip install ninja`")
    return found


def compiler() -> str:
    """The C++ compiler: CXX, or the system's."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    fail("no C++ compiler was found: install g++ >= 11 or set CXX to one")


def host_compiler() -> str:
    """nvcc's flag for the compiler that CXX names, if it is one program; NVCC_CCBIN comes first."""
    wanted = os.environ.get("CXX", "").split()
    named = len(wanted) == 1 and "NVCC_CCBIN" not in os.environ
    return f"-ccbin {quoted(wanted[0])} " if named else ""


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, or None for a build without CUDA."""
    mode = os.environ.get("CBAM_CUDA_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda"):
        fail(f"CBAM_CUDA_BUILD: expected auto, cpu or cuda, got {mode!r}")
    if mode == "cpu":
        return None
    # `which nvcc` may be a wrapper that stands outside its toolkit, so it is not asked.
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        home = Path(folder) if folder else None
        if home and (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return home
    if mode == "cuda":
        fail(
            "CBAM_CUDA_BUILD=cuda, but no CUDA toolkit was found in CUDA_HOME, CUDA_PATH or "
            "/usr/local/cuda: set CUDA_HOME, or CBAM_CUDA_BUILD=cpu to build without CUDA"
        )
    return None


def number_of(arch: str) -> str:
    """``90`` for ``9.0+PTX``."""
    return arch.removesuffix("+PTX").replace(".", "")


def architectures(home: Path) -> str:
    """The CUDA architectures to compile for, as in TORCH_CUDA_ARCH_LIST.

    By default those that the toolkit knows; where it is too old for some, the newest of the others
    also as PTX, which drivers translate for what came later.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").replace(",", ";")
    if names := [arch for arch in given.split(";") if arch]:
        for arch in names:
            if not ARCHITECTURE.fullmatch(arch):
                fail(f"TORCH_CUDA_ARCH_LIST: expected numbers as in '8.0;9.0+PTX', got {arch!r}")
        return ";".join(names)
    wanted = DEFAULT_ARCHITECTURES.split(";")
    known = output_of(home, "--list-gpu-arch").split()
    kept = [arch for arch in wanted if f"compute_{number_of(arch)}" in known]
    if not kept:
        fail(f"{home}: its nvcc compiles for none of {DEFAULT_ARCHITECTURES}; CUDA 12.0 does")
    if kept != wanted:
        kept[-1] = kept[-1].removesuffix("+PTX") + "+PTX"
    return ";".join(kept)


def gencode(archs: str) -> str:
    """nvcc's flags for a list like ``8.0;9.0+PTX``."""
    flags = []
    for arch in archs.split(";"):
        number = number_of(arch)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def nvcc_version(home: Path) -> str:
    """The toolkit's version, like ``13.0``."""
    return output_of(home, "--version").split("release ")[1].split(",")[0]


def output_of(home: Path, option: str) -> str:
    """What the toolkit's nvcc prints."""
    command = [str(home / "bin/nvcc"), option]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def quoted(text: object) -> str:
    """A word of a command in a ninja file."""
    return shlex.quote(str(text)).replace("$", "$$")


def escaped(path: object) -> str:
    """A path where a ninja file lists paths."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class NinjaFile:
    """The build as ninja reads it: rules, one edge an object, one link."""

    def __init__(self, folder: Path, output: Path, version: str) -> None:
        self.folder = folder
        self.objects: list[str] = []
        self.lines = [f"builddir = {str(folder).replace('$', '$$')}"]
        cuda = cuda_home()
        kernels = list((CSRC / "cuda").rglob("*.cu")) if cuda else []
        self.write_rules(cuda, version)
        # The longest first, so that none is left when everything else is done.
        for source in sorted(kernels, key=lambda path: -path.stat().st_size):
            self.compile("nvcc", source)
        plain = [*CSRC.glob("*.cpp"), CSRC / "cpu/target.cpp", *CSRC.glob("cuda/*.cpp")]
        for source in sorted(plain):
            self.compile("cxx", source)
        for name, flags in CPU_TARGETS.items():
            for source in PER_TARGET_SOURCES:
                self.compile("cxx", CSRC / source, name, f"-O3 -DCBAM_CPU_TARGET={name} {flags}")
        objects = " ".join(map(escaped, self.objects))
        self.lines.append(f"build {escaped(output)}: link {objects}")

    def write_rules(self, cuda: Path | None, version: str) -> None:
        """Compilers, flags and libraries."""
        includes, libraries = torch_paths()
        system = [*includes, pybind11_include(), sysconfig.get_paths()["include"]]
        if cuda:
            system.append(str(cuda / "include"))
        flags = [
            "-std=c++17 -O2 -g0 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-psabi",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f"-DCBAM_VERSION='\"{version}\"'",
            f"-I{quoted(CSRC)}",
            *(f"-isystem {quoted(folder)}" for folder in reversed(system)),
        ]
        if X86:
            flags.append("-DCBAM_X86_TARGETS")
        link = [*(f"-L{quoted(folder)}" for folder in libraries), "-ltorch_cpu -lc10"]
        if cuda:
            archs = architectures(cuda)
            defines = [
                "-DCBAM_WITH_CUDA",
                f"-DCBAM_CUDA_VERSION='\"{nvcc_version(cuda)}\"'",
                f"-DCBAM_CUDA_ARCHITECTURES='\"{archs}\"'",
            ]
            flags += defines
            link.append(f"-L{quoted(cuda)}/lib64 -lcudart_static -ldl -lrt -lpthread")
            self.rule(
                "nvcc",
                f"{quoted(cuda)}/bin/nvcc {host_compiler()}-std=c++17 -O3 "
                "-Xcompiler -fPIC,-fvisibility=hidden,-Wall "
                f"-I{quoted(CSRC)} {' '.join(defines)} {gencode(archs)} "
                "-MD -MF $out.d -c $in -o $out",
            )
        self.rule("cxx", f"{compiler()} {' '.join(flags)} $extra -MMD -MF $out.d -c $in -o $out")
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        self.rule("link", f"{compiler()} {shared} $in {' '.join(link)} -o $out", depfile=False)

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        """One rule; compilations say which headers they read."""
        self.lines += [f"rule {name}", f"  command = {command}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, label: str = "", extra: str = "") -> None:
        """One object; `label` tells apart those of the same source."""
        name = source.relative_to(CSRC).as_posix() + (f".{label}" if label else "") + ".o"
        self.objects.append(str(self.folder / name))
        edge = f"build {escaped(self.objects[-1])}: {rule} {escaped(source)}"
        self.lines += [edge, f"  extra = {extra}"]

    def run(self) -> None:
        """Write build.ninja and run it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "build.ninja"
        path.write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([ninja_path(), "-f", str(path), *jobs]).returncode:
            fail(
                "compilation failed, see the first error above; CBAM_CUDA_BUILD=cpu builds "
                "without CUDA, CXX names another C++ compiler, NVCC_CCBIN one for nvcc"
            )


class BuildExtension(build_ext):
    """build_ext that hands the one extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` where setuptools expects it."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp: an editable install throws that away, and with it what need not be redone.
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{platform.machine()}"
        NinjaFile(folder, output, self.distribution.get_version()).run()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("cbam_cuda._C", sources=[])],
        cmdclass={"build_ext": BuildExtension},
    )
