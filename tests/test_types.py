"""Tests what mypy accepts and refuses of code that uses the installed package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

USER = """
import torch

from relssl import FeatureQueue
from relssl.functional import relation_loss
from relssl.nn import RelationLoss

q, k, queue = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), FeatureQueue(16, 8)
relation_loss(q, k, queue).backward()
loss, entropy = relation_loss(q, k, queue, form="ce", return_entropy=True)
loss.backward()
float(entropy)
"""
WRONG_USER = """
import torch

from relssl.functional import relation_loss

q = torch.randn(4, 8)
relation_loss(q, q, q, form="js")
relation_loss(q, q, q, return_entropy=True).backward()
"""
WRONG_BACKEND = """
import torch
from torch import Tensor

from relssl.backends.base import Backend


class Mine(Backend):
    def supports(self, device: str, dtype: torch.dtype, dim: int) -> None:
        return None

    def lse_and_mean(self, x: Tensor, queue: Tensor, scale: float) -> Tensor:
        return x @ queue.T


class Incomplete(Backend):
    def supports(self, device: str, dtype: torch.dtype, dim: int) -> None:
        return None


Incomplete()
"""


(OWN_BACKEND,) = re.findall(
    "```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "backends.md").read_text(), re.S
)
CODE = {
    "user": USER, "wrong_user": WRONG_USER, "wrong_backend": WRONG_BACKEND, "own_backend": OWN_BACKEND,
}  # fmt: skip


def test_mypy_results(tmp_path):
    for name, code in CODE.items():
        (tmp_path / f"{name}.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "."]
    # From an empty folder, so that the source tree cannot stand in for the package.
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = re.findall(r"^(\w+)\.py:\d+: error: .*\[([\w-]+)\]$", run.stdout, re.M)
    assert sorted(set(found)) == [
        ("wrong_backend", "abstract"),
        ("wrong_backend", "override"),
        ("wrong_user", "attr-defined"),
        ("wrong_user", "call-overload"),
    ], run.stdout
