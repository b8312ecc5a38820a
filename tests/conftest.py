"""What all tests share: the oracle on the import path, a seed per test, and the `gpu` marker."""

import os
import sys
from pathlib import Path

import pytest
import torch

# --import-mode=importlib leaves sys.path alone; helpers (oracle.py) lie beside the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For many tiny problems: waking OpenMP's threads would take ten times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("RELSSL_REQUIRE_GPU") == "1":
        pytest.fail("RELSSL_REQUIRE_GPU=1, but torch finds no GPU", pytrace=False)
    pytest.skip("needs a GPU")
