"""Makes .venv for development: what requirements-dev.txt pins, and a torch.

A torch that the interpreter already has is used as it is, and so is every package that comes with
it; only what is missing is installed. Without network what is missing stays missing, which matters
where a command needs it. What PINNED_ALONE lists comes without what it depends on: torchvision
would replace a torch for the CPU by one for CUDA.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements-dev.txt"
TORCH = "torch==2.13.0"
PINNED_ALONE = ("timm==1.0.31", "torchvision==0.28.0")  # a contestant of the benchmarks


def installed(name: str) -> bool:
    """Whether this interpreter has a distribution of that name."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def requirements() -> list[str]:
    """The pinned requirements, a line each."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line]


def name_of(requirement: str) -> str:
    """Without its version."""
    return re.split(r"[=<>]", requirement)[0]


def main() -> int:
    """Create the environment and fill it."""
    has_torch = installed("torch")
    venv.create(FOLDER, system_site_packages=has_torch, with_pip=True, clear=True)
    wanted = requirements()
    if has_torch:
        # setuptools is pinned because the build needs a recent one, whatever the system has.
        names = [(name_of(line), line) for line in wanted]
        wanted = [line for name, line in names if name == "setuptools" or not installed(name)]
    else:
        wanted.append(TORCH)
    alone = [line for line in PINNED_ALONE if not (has_torch and installed(name_of(line)))]
    pip = [str(FOLDER / "bin/python"), "-m", "pip", "install", "--quiet"]
    missing = [line for line in alone if subprocess.run([*pip, "--no-deps", line]).returncode]
    if has_torch:
        missing += [line for line in wanted if subprocess.run([*pip, line]).returncode]
    elif code := subprocess.run([*pip, *wanted]).returncode:
        return code
    if missing:
        print(f"Going on without what could not be installed: {' '.join(missing)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
