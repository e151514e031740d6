"""What ``make gpu`` does before ``python -m benchmarks.gpu`` begins."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "requirements-dev.txt",
    ".ci/environment.py",
    "csrc/one.cu",
    "setup.py",
    "pyproject.toml",
    "cbam_cuda/version.py",
)
# Stands for every Python: notes what it is asked for; the environment takes its time.
PYTHON = """#!/bin/sh
echo "$TORCH_CUDA_ARCH_LIST: $@" >> {log}
if [ "$1" = .ci/environment.py ]; then sleep 2.2; fi
echo 9.0
"""


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_time_counts_from_the_first_command(tmp_path):
    """Not from when all is installed and built."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    log, python = tmp_path / "log", tmp_path / ".venv/bin/python"
    for file in (*map(tmp_path.joinpath, SOURCES), python):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)
    before = int(time.time())
    environment = {n: v for n, v in os.environ.items() if n not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "gpu", f"PYTHON={python}", "GPU_OPTIONS=--only tests"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    made, asked, built, informed, ran = log.read_text().splitlines()
    assert made == ": .ci/environment.py"
    assert asked == ": -m benchmarks.gpu.architecture"
    assert built.startswith("9.0: -m pip install")
    assert informed == "9.0: -m cbam_cuda"
    options = ran.split()
    assert options[1:4] == ["-m", "benchmarks.gpu", "--since"]
    assert before <= int(options[4]) <= before + 1
    assert options[5:] == ["--only", "tests"]
