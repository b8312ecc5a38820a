"""The installed package is complete, has the right version, and imports quickly."""

import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import relssl

ROOT = Path(__file__).resolve().parents[1]


# A fallback to another backend must not hide an import error.
@pytest.mark.parametrize(
    "name",
    [
        "relssl.functional",
        "relssl.nn",
        "relssl.ops",
        "relssl.queue",
        "relssl.backends.chunked",
        "relssl.backends.cpu",
        "relssl.backends.cuda",
        "relssl.backends.reference",
        "relssl.kernels",
        "relssl.backends.triton",
        "relssl._cpu",
        "relssl._cuda",
    ],
)
def test_imports(name):
    if name == "relssl._cpu" and os.environ.get("RELSSL_CPU") == "0":
        pytest.skip("installed without it: RELSSL_CPU=0")
    if name == "relssl._cuda":
        built = importlib.import_module("relssl._build_info").CUDA
        if not built.startswith("for "):
            pytest.skip(f"installed without it: {built}")
    assert importlib.import_module(name).__name__ == name


def test_the_cuda_extension_needs_no_cuda_library(tmp_path):
    """It can be imported without a GPU, a driver and a toolkit."""
    file = importlib.util.find_spec("relssl._cuda")
    if file is None:
        pytest.skip("installed without it")
    run = subprocess.run(["ldd", file.origin], capture_output=True, text=True, check=True)
    assert "cuda" not in run.stdout.replace(file.origin, "")


def test_the_source_folder_does_not_stand_in_for_the_package():
    """Neither in this process nor in those that multiprocessing starts, which inherit the path."""
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]


def test_python_m_pytest_tests_the_installed_package():
    tests = "test_imports[relssl.kernels]", "test_the_source_folder_does_not_stand_in_for_the_package"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    run = subprocess.run(
        [*command, *(f"tests/test_install.py::{name}" for name in tests)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and "2 passed" in run.stdout, run.stdout + run.stderr


def test_version():
    assert relssl.__version__ == importlib.metadata.version("relssl")


def test_typed():
    assert (importlib.resources.files("relssl") / "py.typed").is_file()


def test_public_names_exist():
    assert all(hasattr(relssl, name) for name in relssl.__all__)


def test_import_is_light(tmp_path):
    # Importing a loss must neither need nor load the training extras and Triton.
    code = (
        "import sys, relssl.tuned as t; print(len(t._choices), *{name.split('.')[0] for name in sys.modules})"
    )
    # The folder is empty, so that Python cannot import the source tree instead of the package.
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    heavy = {"torchvision", "tyro", "sklearn", "matplotlib", "tensorboard", "triton"}
    choices, *modules = run.stdout.split()
    assert not heavy & set(modules)
    assert "relssl" in modules
    assert choices == "0", "the choices of relssl tune are read at the first call"
