"""The messages of builds that fail. (All other tests rely on a build that works.)"""

import ensurepip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("ninja", "pybind11", "setuptools"):
    pytest.importorskip(name, reason="building needs it")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Settings of builds that share object files, with a compiler that accepts only the baseline."""
    folder = tmp_path_factory.mktemp("quick")
    script = folder / "c++"
    script.write_text('#!/bin/sh\ncase "$*" in *-mavx*) exit 1;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return {"temp": folder / "temp", "CXX": str(script), "CXXFLAGS": "-O0"}


def build(tmp_path, temp=None, command="build_ext", **environment):
    command = [sys.executable, "setup.py", "-q", command, "--build-temp", str(temp or tmp_path / "temp")]
    return subprocess.run(
        [*command, "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_no_compiler(tmp_path):
    run = build(tmp_path, CXX="no-such-compiler")
    assert run.returncode == 1
    assert "no C++ compiler (no-such-compiler) was found" in run.stderr
    assert "RELSSL_CPU=0" in run.stderr and "Traceback" not in run.stderr


def test_excluded(tmp_path):
    run = build(tmp_path, CXX="no-such-compiler", RELSSL_CPU="0")
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("_cpu*"))


def test_a_build_leaves_out_earlier_files(tmp_path):
    library, module = (tmp_path / "lib/relssl" / name for name in ("_cuda.so", "removed.py"))
    library.parent.mkdir(parents=True)
    library.touch(), module.touch()
    run = build(tmp_path, command="build", RELSSL_CPU="0", RELSSL_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert not library.exists() and not module.exists() and (tmp_path / "lib/relssl/nn.py").exists()


# ------------------------------------------------------------------- without build isolation

OLD = next((Path(ensurepip.__file__).parent / "_bundled").glob("setuptools-*.whl"), None)  # of Python < 3.12


def with_old_setuptools(tmp_path, *command, **environment):
    """Runs setup.py with Python's own setuptools (65.5 of Python 3.11) as the only package."""
    if OLD is None:
        pytest.skip("this Python has no setuptools")
    return subprocess.run(
        [sys.executable, "-S", "setup.py", "-q", *command],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "RELSSL_CUDA": "0", **environment, "PYTHONPATH": str(OLD)},
    )  # fmt: skip


def test_metadata_with_an_old_setuptools(tmp_path):
    run = with_old_setuptools(tmp_path, "egg_info", "--egg-base", tmp_path, RELSSL_CPU="0")
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "relssl.egg-info/PKG-INFO").read_text().splitlines()
    assert {"Name: relssl", "Version: 0.1.0", "License: MIT"} <= set(lines)


def test_metadata_without_a_deprecation(tmp_path):
    command = "setup.py", "-q", "egg_info", "--egg-base", tmp_path
    run = subprocess.run([sys.executable, "-W", "error", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "\nLicense: MIT\n" in (tmp_path / "relssl.egg-info/PKG-INFO").read_text()


def test_missing_build_tools_are_named(tmp_path):
    run = with_old_setuptools(tmp_path, "build_ext", "--build-lib", tmp_path)
    needs = "relssl: building needs ninja, pybind11, which "
    assert run.returncode == 1 and run.stderr.startswith(needs) and len(run.stderr.splitlines()) == 1
    assert run.stderr.endswith("Run pip install 'ninja' 'pybind11', or leave out --no-build-isolation.\n")
    run = with_old_setuptools(tmp_path, "dist_info", "--output-dir", tmp_path, RELSSL_CPU="0")
    assert run.returncode == 1 and run.stderr.startswith("relssl: building needs wheel, which ")


# ------------------------------------------------------------------------------------------------ CUDA


def toolkit(folder, compiles):
    """Creates an imitation of nvcc with its toolkit."""
    for name in ("bin/nvcc", "lib64/libcudart_static.a", "include/cuda_runtime_api.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        f'#!/bin/sh\necho "#$ TOP={folder}" >&2\ncase "$*" in *--dryrun*) exit 0;; esac\n{compiles}\n'
    )
    nvcc.chmod(0o755)
    return str(folder)


def record(tmp_path):
    return (tmp_path / "lib/relssl/_build_info.py").read_text()


def test_cuda_asked_for_without_nvcc(tmp_path):
    run = build(tmp_path, RELSSL_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"))
    assert run.returncode == 1
    assert "RELSSL_CUDA=1, but no working nvcc" in run.stderr and "CUDA_HOME" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("build")
def test_cuda_excluded(tmp_path, quick):
    run = build(tmp_path, RELSSL_CUDA="0", **quick)
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.rglob("_cpu*.so")) and not list(tmp_path.rglob("_cuda*"))
    assert "RELSSL_CUDA=0" in record(tmp_path)


@pytest.mark.xdist_group("build")
@pytest.mark.slow
def test_a_failing_nvcc_leaves_the_rest(tmp_path, quick):
    home = toolkit(tmp_path / "cuda", compiles="echo no such luck >&2; exit 1")
    run = build(tmp_path, RELSSL_CUDA="auto", CUDA_HOME=home, **quick)
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.rglob("_cpu*.so")) and not list(tmp_path.rglob("_cuda*.so"))
    assert "nvcc failed" in record(tmp_path) and "nvcc failed" in run.stderr
    run = build(tmp_path, RELSSL_CUDA="1", CUDA_HOME=home, **quick)
    assert run.returncode == 1 and "compiling the CUDA kernels failed" in run.stderr
    assert "no such luck" in run.stdout + run.stderr and "Traceback" not in run.stderr


def test_unknown_mode(tmp_path):
    run = build(tmp_path, RELSSL_CUDA="yes", RELSSL_CPU="0")
    assert run.returncode == 1 and "RELSSL_CUDA must be auto, 0 or 1; got 'yes'" in run.stderr
    assert "Traceback" not in run.stderr


def test_unknown_architecture(tmp_path):
    home = toolkit(tmp_path / "cuda", compiles="exit 0")
    run = build(tmp_path, CUDA_HOME=home, RELSSL_CPU="0", RELSSL_CUDA_ARCHS="80;ampere")
    assert run.returncode == 1 and "got 'ampere' in it" in run.stderr and "Traceback" not in run.stderr


# --------------------------------------------------------------------------------------------- checks


def test_pre_commit_runs_the_tested_ruff():
    (pinned,) = re.findall(r"(?m)^ruff==(.+)$", (ROOT / "constraints.txt").read_text())
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
