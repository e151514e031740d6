"""What ``make gpu`` does before ``python -m benchmarks.gpu`` begins."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import metadata
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


def prepared(tmp_path, requirements, **environment):
    """What .ci/environment.py says that makes .venv for so many requirements, and that .venv."""
    file = tmp_path / ".ci/environment.py"
    file.parent.mkdir()
    shutil.copy(ROOT / ".ci/environment.py", file)
    (tmp_path / "requirements-dev.txt").write_text("\n".join(requirements))
    environment = {**os.environ, **environment}
    command = [sys.executable, file]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stderr, tmp_path / ".venv/bin/python"


WHEEL = {
    "METADATA": "Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}
UNREACHABLE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}


def test_without_network_the_index_is_asked_once(tmp_path):
    """All that is there is used, of the interpreter's environment too, if it is of one."""
    wanted = ["# Build", f"setuptools=={metadata.version('setuptools')}", "torch"]
    wanted += ["not-there==1", "setuptools==0.1", "not-there-either==2"]
    said, python = prepared(tmp_path, wanted, **UNREACHABLE)
    assert said.count("Retrying") == 1
    assert said.splitlines()[-1] == (
        "Going on without what could not be installed: "
        "not-there==1 setuptools==0.1 not-there-either==2"
    )
    code = "import sys, pip, pytest, importlib.util as u; print(u.find_spec('torch').origin)"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == importlib.util.find_spec("torch").origin


def test_packages_that_an_index_lacks_do_not_stop_others(tmp_path):
    """Not even the first."""
    for name in ("one", "two"):
        with zipfile.ZipFile(tmp_path / f"{name}-1-py3-none-any.whl", "w") as wheel:
            for file, text in WHEEL.items():
                wheel.writestr(f"{name}-1.dist-info/{file}", text.format(name=name))
    links = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    wanted = ["setuptools==0", "one==1", "not-there==1", "two==1"]
    said, python = prepared(tmp_path, wanted, **links)
    assert said.splitlines()[-1].endswith(": setuptools==0 not-there==1")
    code = "from importlib.metadata import version as v; print(v('one'), v('two'))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["1", "1"]


def test_environment_beside_a_cuda_build_of_torch(monkeypatch, tmp_path):
    """It has what all others need, and its own torch."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    link = importlib.import_module("cuda_link")
    commands = []
    monkeypatch.setattr(link, "FOLDER", tmp_path)
    monkeypatch.setattr(link.venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(link, "run", lambda *command: commands.append(command))
    oldest, _ = link.VERSIONS
    assert (
        f"OLDEST_TORCH = ({oldest.removesuffix('.0').replace('.', ', ')})"
        in (ROOT / "setup.py").read_text()
    )
    python = link.make_environment(oldest)
    assert link.make_environment(oldest) == python  # and nothing is installed again
    (command,) = commands
    installed = [str(word) for word in command]
    assert installed[0] == str(python)
    assert f"torch=={oldest}" in installed
    assert any(line.startswith("pytest==") for line in installed)
    assert not any(line.startswith("torchvision") for line in installed)


def test_without_hypothesis_only_what_needs_it_is_skipped():
    options = ["-q", "-p", "no:cacheprovider", "tests/test_properties.py", "tests/test_demo.py"]
    missing = "import sys; sys.modules['hypothesis'] = None; import pytest; sys.exit(pytest.main("
    command = [sys.executable, "-c", f"{missing}{[*options, '--collect-only']}))"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "tests/test_demo.py::" in done.stdout
    assert "could not import 'hypothesis'" in done.stdout
