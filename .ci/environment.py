"""Makes .venv for development: what requirements-dev.txt pins, and a torch.

A torch that the interpreter already has is used as it is, and so is every package that comes with
it, be they of an environment themselves; only what is missing is installed. Without network what is
missing stays missing, which matters where a command needs it. A line that ends with "# alone" comes
without what it depends on: torchvision would replace a torch for the CPU by one for CUDA.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements-dev.txt"
TORCH = "torch==2.13.0"
# Of the first request: pip's own patience, package by package, takes minutes without network.
BRIEFLY = ("--retries", "1", "--timeout", "5")
UNREACHED = "after connection broken"  # what pip says before it tries again


def installed(name: str) -> bool:
    """Whether this interpreter has a distribution of that name."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def wanting(line: str) -> bool:
    """Whether a requirement is missing here: of setuptools also where it is another version.

    The build needs a recent one, whatever the system has.
    """
    name, *pin = re.split(r"[=<>]+", line)
    return not installed(name) or (name == "setuptools" and metadata.version(name) not in pin)


def requirements(alone: bool) -> list[str]:
    """The pinned requirements, a line each: those that come alone, or all others."""
    lines = (line.partition("#") for line in REQUIREMENTS.read_text().splitlines())
    pins = [(line.strip(), comment.strip() == "alone") for line, _, comment in lines]
    return [pin for pin, is_alone in pins if pin and is_alone == alone]


def create(shared: bool) -> None:
    """The environment, with this interpreter's packages where they are shared."""
    # pip may be one of them, and what pip comes from otherwise may be missing.
    with_pip = not (shared and installed("pip"))
    venv.create(FOLDER, system_site_packages=shared, with_pip=with_pip, clear=True)
    if shared and sys.prefix != sys.base_prefix:
        # "System" means the outermost interpreter, not the environment that this one is of.
        (folders, own) = (
            sysconfig.get_paths("venv", vars={"base": base, "platbase": base})
            for base in (sys.prefix, str(FOLDER))
        )
        both = dict.fromkeys([folders["purelib"], folders["platlib"]])
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in both]
        Path(own["purelib"], "shared.pth").write_text("".join(lines))


def install_each(pip: Sequence[str], wanted: Sequence[str], alone: Sequence[str]) -> list[str]:
    """Install one after the other; returns what could not be, all the rest without an index."""
    missing: list[str] = []
    patience: Sequence[str] = BRIEFLY
    for number, line in enumerate(wanted, 1):
        options = [*patience, *(["--no-deps"] if line in alone else [])]
        done = subprocess.run([*pip, *options, line], stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode:
            missing.append(line)
            if UNREACHED in done.stderr:
                return [*missing, *wanted[number:]]
        patience = ()
    return missing


def compile_modules() -> None:
    """On all processors: pip takes one, for half of the time that it needs to install torch.

    Some packages bring files for other versions of Python, which do not compile.
    """
    every_processor = ["-j", "0", "-qq"]
    command = [FOLDER / "bin/python", "-m", "compileall", *every_processor, FOLDER / "lib"]
    subprocess.run([str(part) for part in command])


def main() -> int:
    """Create the environment and fill it."""
    has_torch = installed("torch")
    create(has_torch)
    pip = [str(FOLDER / "bin/python"), "-m", "pip", "install", "--quiet"]
    pip.append("--disable-pip-version-check")
    wanted, alone = requirements(alone=False), requirements(alone=True)
    if not has_torch:
        pip.append("--no-compile")
        done = subprocess.run([*pip, *wanted, TORCH])
        done = done if done.returncode else subprocess.run([*pip, "--no-deps", *alone])
        compile_modules()
        return done.returncode
    if missing := install_each(pip, [line for line in [*wanted, *alone] if wanting(line)], alone):
        print(f"Going on without what could not be installed: {' '.join(missing)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
