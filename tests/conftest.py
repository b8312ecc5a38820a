"""What all tests share: the oracle on the import path, a seed per test, and the `gpu` marker."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
os.environ["RELSSL_TUNE"] = "0"  # Tests ignore what has been tuned on this machine.

# --import-mode=importlib leaves sys.path alone; the tests import from these folders.
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests", "bench", "tools")]


@pytest.fixture(autouse=INTERPRETED, scope="session")
def products_rounded_once():
    """Triton's interpreter uses a BLAS whose last digits depend on a row's position in its matrix.

    Those of a matrix instruction do not, and backward relies on it: p = exp(logit - lse) must use the
    logits that lse was computed from.
    """
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        with numpy.errstate(all="ignore"):
            product = numpy.matmul(a.data, b.data, dtype=numpy.float64).astype(d.data.dtype)
            return TensorHandle(product + d.data, d.dtype.scalar)

    patch = pytest.MonkeyPatch()
    patch.setattr(InterpreterBuilder, "create_dot", dot)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_check_of_norms():
    """The first calls of a process also check the norms of rows, which are operations, and may warn."""
    from relssl import unit_norm

    unit_norm.calls_left = 0


@pytest.fixture
def one_thread():
    """For many tiny problems, on which OpenMP's threads would take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a command in this process, in an empty folder: command("info").returncode, stdout, stderr."""
    from relssl.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["relssl", *map(str, arguments)])
        status = message = None
        try:
            main()
        except SystemExit as stop:
            status, message = (stop.code, "") if isinstance(stop.code, int) else (1, stop.code)
        stdout, stderr = capsys.readouterr()
        return SimpleNamespace(returncode=status or 0, stdout=stdout, stderr=stderr + (message or ""))

    return run


@pytest.fixture
def idle(monkeypatch):
    """Makes Triton's backend accept CPU tensors, and only counts its launches: returns the list of them."""
    pytest.importorskip("triton")
    import launch
    from triton.runtime.jit import JITFunction

    from relssl import enqueuing
    from relssl.backends import launching

    def launched(self, *arguments, **options):
        launch.launches.append(())  # Arguments that are kept would be copied by autograd.

    monkeypatch.setattr(launch.backend, "supports", lambda device, dtype, dim: None)
    monkeypatch.setattr(launching, "chip", lambda index: launch.Chip(90, 132))
    monkeypatch.setattr(launching, "with_resident", lambda chip, *rest: chip)
    monkeypatch.setattr(launching, "_cache", {})
    monkeypatch.setattr(launching.Launch, "__call__", launched)
    monkeypatch.setattr(JITFunction, "run", launched)
    monkeypatch.setattr(enqueuing, "_way", lambda *buffers: enqueuing._by_triton)
    return launch.launches


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("RELSSL_REQUIRE_GPU") == "1":
        pytest.fail("RELSSL_REQUIRE_GPU=1, but torch finds no GPU", pytrace=False)
    pytest.skip("needs a GPU")
