"""What the build says where it cannot go on. (That it works is what every other test stands on.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="building needs it")
ROOT = Path(__file__).parents[1]


def build(tmp_path, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [*command, "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_no_compiler(tmp_path):
    run = build(tmp_path, CXX="no-such-compiler")
    assert run.returncode == 1
    assert "no C++ compiler (no-such-compiler) was found" in run.stderr
    assert "RELSSL_CPU=0" in run.stderr and "Traceback" not in run.stderr


def test_left_out(tmp_path):
    run = build(tmp_path, CXX="no-such-compiler", RELSSL_CPU="0")
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("_cpu*"))
