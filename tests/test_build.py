"""The build: what it says when it cannot go on, what it compiles, what it packs."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import cbam_cuda

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, in an environment that names no toolkit."""
    for name in ("CBAM_CUDA_BUILD", "CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("cbam_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A folder that looks like a CUDA toolkit; its nvcc knows what it is and nothing else."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        "--version) echo 'Cuda compilation tools, release 12.9, V12.9.41' ;;\n"
        "--list-gpu-arch) echo compute_75 compute_80 compute_90 compute_100 compute_120 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def failure(call, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    message = str(stop.value)
    assert message.startswith("cbam_cuda: ")
    assert "\n" not in message
    return message


def test_without_torch(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install --no-build-isolation ." in failure(build.torch_paths)


def test_with_an_old_torch(build, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    message = failure(build.torch_paths)
    assert "torch >= 2.11 is needed, found 2.9.1+cpu" in message
    assert "pip install -U torch" in message


def test_without_pybind11(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "pip install pybind11" in failure(build.pybind11_include)


def test_without_ninja(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", "")
    assert "pip install ninja" in failure(build.ninja_path)


def test_without_a_compiler(build, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "install g++" in failure(build.compiler)


def test_unknown_build_mode(build, monkeypatch):
    monkeypatch.setenv("CBAM_CUDA_BUILD", "rocm")
    assert "CBAM_CUDA_BUILD: expected auto, cpu or cuda, got 'rocm'" in failure(build.cuda_home)


def test_cuda_asked_for_where_there_is_none(build, monkeypatch):
    monkeypatch.setenv("CBAM_CUDA_BUILD", "cuda")
    monkeypatch.setattr(build.Path, "is_file", lambda self: False)
    message = failure(build.cuda_home)
    assert "no CUDA toolkit was found" in message
    assert "set CUDA_HOME, or CBAM_CUDA_BUILD=cpu" in message


def test_modes_decide_about_cuda(build, toolkit, monkeypatch):
    assert build.cuda_home() == toolkit
    monkeypatch.setenv("CBAM_CUDA_BUILD", "cuda")
    assert build.cuda_home() == toolkit
    monkeypatch.setenv("CBAM_CUDA_BUILD", "cpu")
    assert build.cuda_home() is None


def test_compiler_that_fails(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("CBAM_CUDA_BUILD", "cpu")
    ninja_file = build.NinjaFile(tmp_path, tmp_path / "_C.so", "0")
    message = failure(ninja_file.run)
    assert "compilation failed" in message
    assert "CXX names another C++ compiler" in message


def test_architectures(build, toolkit, monkeypatch):
    assert build.architectures(toolkit) == build.DEFAULT_ARCHITECTURES
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert build.gencode(build.architectures(toolkit)) == (
        "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 "
        "-gencode=arch=compute_90,code=compute_90"
    )


def test_architectures_that_an_older_toolkit_knows(build, toolkit):
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace("compute_100 compute_120", ""))
    assert build.architectures(toolkit) == "7.5;8.0;9.0+PTX"
    nvcc.write_text("#!/bin/sh\necho compute_52\n")
    assert "CUDA 12.0 does" in failure(build.architectures, toolkit)


def test_architectures_by_another_name(build, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    assert "expected numbers as in '8.0;9.0+PTX', got 'Hopper'" in failure(
        build.architectures, toolkit
    )


@pytest.mark.parametrize(
    ("given", "flag"),
    [("g++-13", "-ccbin g++-13 -std"), ("ccache g++", "nvcc -std"), ("", "nvcc -std")],
)
def test_nvcc_takes_the_compiler_too(build, toolkit, tmp_path, monkeypatch, given, flag):
    monkeypatch.setattr(build, "compiler", lambda: "c++")
    monkeypatch.setenv("CXX", given)
    text = "\n".join(build.NinjaFile(tmp_path, tmp_path / "_C.so", "0").lines)
    assert flag in text


def test_paths_may_have_any_characters(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CBAM_CUDA_BUILD", "cpu")
    folder = tmp_path / "a b:c$d"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    monkeypatch.setattr(build, "CSRC", folder / "csrc")
    ninja_file = build.NinjaFile(folder / "build", folder / "_C.so", "0")
    ninja_file.lines.append("default " + build.escaped(folder / "build/cpu/target.cpp.o"))
    ninja_file.run()
    assert (folder / "build/cpu/target.cpp.o").exists()


def test_cuda_sources_are_compiled_by_nvcc_and_linked_statically(build, toolkit, tmp_path):
    text = "\n".join(build.NinjaFile(tmp_path, tmp_path / "_C.so", "0").lines)
    sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    assert sources
    for source in sources:
        assert re.search(rf"build \S+\.cu\.o: nvcc {re.escape(str(source))}\n", text)
    assert f"command = {toolkit}/bin/nvcc" in text
    assert "-lcudart_static" in text
    assert "-DCBAM_WITH_CUDA" in text
    assert "-DCBAM_CUDA_VERSION='\"12.9\"'" in text


def test_cpu_build_mentions_no_cuda(build, toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("CBAM_CUDA_BUILD", "cpu")
    text = "\n".join(build.NinjaFile(tmp_path, tmp_path / "_C.so", "0").lines)
    assert not re.search(r"nvcc|cudart|CBAM_WITH_CUDA|\.cu\b", text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_build_with_cuda_loads_without_a_gpu():
    assert cbam_cuda.info()["build"]["cuda_devices"] == []


def test_nothing_is_compiled_for_this_processor_alone(build, tmp_path):
    text = "\n".join(build.NinjaFile(tmp_path, tmp_path / "_C.so", "0").lines)
    assert "native" not in text
    general = next(line for line in text.splitlines() if "-MMD" in line)
    assert "-mavx" not in general


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_targets_share_no_code():
    """A function that two targets both define weakly could be linked from the wrong one."""
    objects = sorted((ROOT / "build").glob(f"{sys.implementation.cache_tag}*/cpu/*.cpp.*.o"))
    assert objects
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True)
        weak = [s for s in symbols.stdout.splitlines() if re.search(r" [WVu] ", s)]
        assert all("DW.ref" in s for s in weak), (path, weak)


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_binary_depends_on_the_stable_abi_alone():
    """No C++ symbol of torch, so that one binary serves every torch from 2.11 on."""
    (module,) = (ROOT / "cbam_cuda").glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(module)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.match(r"_ZNK?(2at|3c10|5torch|5caffe2)", name)]


def download_headers(version: str, folder: Path) -> None:
    """Out of torch's wheel for macOS: the same files, without gigabytes of libraries."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    wheel = ["--platform=macosx_11_0_arm64", "--python-version=3.11", "--only-binary=:all:"]
    briefly = ["--retries=1", "--timeout=15"]  # pip's own patience takes minutes without network
    done = subprocess.run(
        [*pip, *wheel, *briefly, "--no-deps", f"--dest={folder}", f"torch=={version}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"torch {version} cannot be downloaded: {done.stderr.strip()[-200:]}")
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = (name for name in archive.namelist() if name.startswith("torch/include/"))
        archive.extractall(folder, names)
    path.unlink()


@pytest.fixture
def oldest_headers(build) -> Path:
    """The include folder of the oldest torch that the build takes, downloaded once."""
    version = ".".join(map(str, (*build.OLDEST_TORCH, 0)))
    folder = ROOT / f"build/torch-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            download_headers(version, folder)
            (folder / "complete").touch()
    return folder / "torch/include"


@pytest.mark.slow
def test_sources_compile_against_the_oldest_torch(build, oldest_headers, tmp_path, monkeypatch):
    compiler = build.compiler()
    monkeypatch.setattr(build, "compiler", lambda: f"{compiler} -Werror -fsyntax-only")
    monkeypatch.setattr(build, "torch_paths", lambda: ([str(oldest_headers)], []))
    path = tmp_path / "build.ninja"
    path.write_text("\n".join(build.NinjaFile(tmp_path, tmp_path / "_C.so", "0").lines) + "\n")
    objects = [f"{tmp_path}/{source.name}.o" for source in (ROOT / "csrc").glob("*.cpp")]
    done = subprocess.run(
        [build.ninja_path(), "-f", str(path), *objects], capture_output=True, text=True
    )
    assert not done.returncode, done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", ".*")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)], cwd=source, check=True
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_sdist_has_every_source(sdist):
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "cbam_cuda"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".typed"):
                assert path.relative_to(ROOT).as_posix() in packed
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed
    assert not [name for name in packed if name.startswith("tests")]  # nobody could run them


@pytest.fixture
def hasty_compiler(build, tmp_path) -> str:
    """The compiler, without its optimizations: a third of the time."""
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\nexec {build.compiler()} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.slow
def test_wheel_from_the_sdist_works_in_a_clean_environment(sdist, tmp_path, hasty_compiler):
    """Nothing of the checkout is used but the sdist; torch and the build's needs are lent."""
    environment = {**os.environ, "CBAM_CUDA_BUILD": "cpu", "CXX": hasty_compiler}
    environment.pop("PYTHONPATH", None)
    clean = tmp_path / "venv"
    venv.create(clean, with_pip=False)
    python = clean / "bin/python"
    lent = [p for p in sys.path if p.endswith("-packages")]
    (site,) = clean.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(sdist)],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--ignore-installed", str(wheel)],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    code = (
        "import torch, cbam_cuda; assert 'site-packages' in cbam_cuda.__file__; "
        "assert cbam_cuda.info()['build']['cuda_version'] is None; "
        "x = torch.randn(2, 32, 9, 9, requires_grad=True); "
        "m = cbam_cuda.CBAM(32, backend='cpu'); m(x).sum().backward(); print(cbam_cuda.__file__)"
    )
    shown = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(str(clean))
