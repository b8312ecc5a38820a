"""Every barrier, fence and wait of the CUDA kernels is needed, and the emulation sees when one is left out.

Each is removed in turn from a copy of the source: what remains must give other results, or none, for some
schedule.
"""

import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

# What orders threads, copies and products. (Turns at issuing products are for speed alone.)
ORDERS = r"(__syncthreads|meet|cp_async_wait<.*?>|fence_proxy|mbarrier_wait|wgmma_wait<.*?>|await_\w+)\("
FILES = ["lookup_sm80", "lookup_sm90", "combine"]


def sites():
    """File and line number of everything that orders, where it is called; the first barrier is quick."""
    quick = True
    for name in ("lookup_sm90", *(name for name in FILES if name != "lookup_sm90")):
        for number, line in enumerate((emulated.CUDA / f"{name}.cu").read_text().splitlines()):
            code = line.split("//")[0].strip()
            if re.search(ORDERS, code) and "__device__" not in code:
                first = quick and code.startswith("__syncthreads")
                quick = quick and not first
                marks = [] if first else [pytest.mark.slow]
                yield pytest.param(name, number, id=f"{name}-{number + 1}-{code}", marks=marks)


def widths(name):
    """Those that reach all of a file: 512 has warps that share rows."""
    return [None] if name == "combine" else [64, 512]


def mutant(tmp_path, name, number, width):
    """The module with a line's call removed."""
    lines = (emulated.CUDA / f"{name}.cu").read_text().splitlines()
    lines[number] = re.sub(ORDERS + r".*?\);", ";", lines[number].split("//")[0])
    source = tmp_path / f"{name}.cu"
    source.write_text("\n".join(lines) + "\n")
    folder = emulated.build().parent
    changed = f"{name}_{width}.o" if width else f"{name}.o"
    flags = [f"-DRELSSL_DIM={width}"] if width else []
    emulated.compile_to(tmp_path / changed, source, "-O1", *flags)
    module = tmp_path / "_emulated.so"
    emulated.link(module, [tmp_path / changed, *(f for f in folder.glob("*.o") if f.name != changed)])
    return module


def run(module, name, width):
    path = "90" if name == "lookup_sm90" else "80"
    worker = Path(__file__).with_name("emulated_worker.py")
    command = [sys.executable, "-W", "ignore", worker, module, path, str(width or 64)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if run.returncode < 0:  # A product that nobody waited for was written where its sums no longer are.
        return f"caught: died of signal {-run.returncode}"
    return run.stdout or run.stderr


@pytest.mark.parametrize(
    ("name", "width"),
    [
        pytest.param(name, width, marks=[pytest.mark.slow] * ((name, width) != ("lookup_sm90", 64)))
        for name in FILES
        for width in widths(name)
    ],
)
def test_whole_kernels_agree(name, width):
    assert run(emulated.build(), name, width) == "agrees\n"


@pytest.mark.parametrize(("name", "number"), list(sites()))
def test_each_is_needed(tmp_path, name, number):
    for width in widths(name):
        told = run(mutant(tmp_path, name, number, width), name, width)
        if told != "agrees\n":
            break
    assert told.startswith("caught")
