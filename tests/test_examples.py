"""The examples run; `make demo` runs the longer one."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_loss_of_a_loop_of_ones_own_falls(one_thread, capsys):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    own_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_loop)
    losses = own_loop.main()
    assert losses[-1] < losses[0] / 2
    assert len(capsys.readouterr().out.splitlines()) == len(losses)
