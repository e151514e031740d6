"""Links against CUDA builds of torch, in .venv-cuda, without a GPU: the oldest and the newest.

Twice with each: the extension as it was built beside the CPU torch of .venv, which must load there
as it is, and built anew with that torch. Each time it must import, have kernels for CPU and CUDA
tensors registered, and pass the tests of the CPU backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from environment import ROOT, requirements

FOLDER = ROOT / ".venv-cuda"
VERSIONS = ("2.11.0", "2.14.1")
# What calls the operators; the rest is about building, plans and measuring.
NAMES = (
    "arguments",
    "backward",
    "compile",
    "convert",
    "convert_halves",
    "derivatives",
    "ending",
    "forward",
    "layers",
    "modules",
    "norm",
    "numerics",
    "parts",
    "tracing",
)
TESTS = [ROOT / f"tests/test_{name}.py" for name in NAMES]
CHECK = """
import torch, cbam_cuda
assert torch.version.cuda, torch.__version__
has = torch._C._dispatch_has_kernel_for_dispatch_key
for operator in cbam_cuda.ops.OPERATORS:
    for key in ("CPU", "CUDA"):
        assert has(f"cbam_cuda::{operator}", key), (operator, key)
facts = cbam_cuda.info()
assert facts["backends"]["cpu"] == "available", facts
assert facts["build"]["cuda_architectures"], facts
print(f"{cbam_cuda.__file__} beside torch {torch.__version__}: {facts['backends']}")
"""


def run(*command: str | Path, **options: object) -> None:
    """A command that must succeed."""
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def make_environment(version: str) -> Path:
    """The interpreter beside such a torch, kept once it is there: that is several gigabytes."""
    folder = FOLDER / version
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        run(python, "-m", "pip", "install", "-q", *requirements(alone=False), f"torch=={version}")
        (folder / ".ready").touch()
    return python


def check_installed(python: Path, what: str) -> None:
    """Import and test what is installed, from a folder where the checkout's package is not seen."""
    print(f"-- {what}", flush=True)
    with tempfile.TemporaryDirectory() as elsewhere:
        run(python, "-c", CHECK, cwd=elsewhere)
        options = ["-q", "-n", "auto", "-k", "cpu", "-p", "no:cacheprovider"]
        run(python, "-m", "pytest", *options, "--rootdir", elsewhere, *TESTS, cwd=elsewhere)


def install(python: Path, built_by: str | Path) -> None:
    """Build a wheel with one interpreter's torch and install it beside another one's."""
    environment = {**os.environ, "CBAM_CUDA_BUILD": "cuda"}
    with tempfile.TemporaryDirectory() as wheels:
        pip = [built_by, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
        run(*pip, "--wheel-dir", wheels, ROOT, env=environment)
        (wheel,) = Path(wheels).glob("*.whl")
        reinstall = ["install", "--quiet", "--no-deps", "--force-reinstall"]
        run(python, "-m", "pip", *reinstall, wheel)


def main() -> int:
    """Both builds with each torch, one after the other."""
    for version in VERSIONS:
        python = make_environment(version)
        install(python, built_by=ROOT / ".venv/bin/python")
        check_installed(python, f"beside torch {version}, built beside the CPU torch")
        install(python, built_by=python)
        check_installed(python, f"beside torch {version}, built beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
