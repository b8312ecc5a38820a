"""The installed package: complete, of the version it says, and light to import."""

import importlib
import importlib.metadata
import importlib.resources
import os
import subprocess
import sys

import pytest

import relssl


# An import error here must not hide behind a fallback to another backend.
@pytest.mark.parametrize(
    "name",
    [
        "relssl.functional",
        "relssl.nn",
        "relssl.ops",
        "relssl.queue",
        "relssl.backends.chunked",
        "relssl.backends.cpu",
        "relssl.backends.reference",
        "relssl.kernels",
        "relssl.backends.triton",
        "relssl._cpu",
    ],
)
def test_imports(name):
    if name == "relssl._cpu" and os.environ.get("RELSSL_CPU") == "0":
        pytest.skip("installed without it: RELSSL_CPU=0")
    assert importlib.import_module(name).__name__ == name


def test_version():
    assert relssl.__version__ == importlib.metadata.version("relssl")


def test_typed():
    assert (importlib.resources.files("relssl") / "py.typed").is_file()


def test_public_names_exist():
    assert all(hasattr(relssl, name) for name in relssl.__all__)


def test_import_is_light(tmp_path):
    # Training extras and Triton must neither be needed nor cost time where only a loss is wanted.
    code = "import sys, relssl; print(*{name.split('.')[0] for name in sys.modules})"
    # From an empty folder, so that the source tree cannot stand in for the package.
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    heavy = {"kornia", "torchvision", "tyro", "sklearn", "matplotlib", "tensorboard", "triton"}
    assert not heavy & set(run.stdout.split())
    assert "relssl" in run.stdout.split()
