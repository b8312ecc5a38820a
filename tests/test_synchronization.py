"""Every barrier, fence and wait of the CUDA kernels is needed, and the emulation detects its absence.

Each of them is removed in turn from a copy of the source. For some schedule, the mutant must then give
different results, or none.
"""

import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

# The calls that order threads, copies and products. (The turns at issuing products are only for speed.)
SYNCS = "__syncthreads|sync_sharing_warps|sync_consumers"
ORDERS = rf"({SYNCS}|cp_async_wait<.*?>|fence_proxy|mbarrier_wait|wgmma_wait<.*?>|await_\w+)\("
KERNELS = ["forward_sm80", "forward_sm90", "combine"]
SHARED = "softmax.h"  # Both forward kernels include it.


def sites():
    """Yields the kernel, file and line number of each such call. Only the first barrier is not slow."""
    quick = True
    for name in ("forward_sm90", *(name for name in KERNELS if name != "forward_sm90")):
        for file in (f"{name}.cu", *([SHARED] if name != "combine" else [])):
            for number, line in enumerate((emulated.CUDA / file).read_text().splitlines()):
                code = line.split("//")[0].strip()
                if re.search(ORDERS, code) and "__device__" not in code:
                    first = quick and code.startswith("__syncthreads")
                    quick = quick and not first
                    marks = [] if first else [pytest.mark.slow]
                    label = f"{name}-{file}-{number + 1}-{code}"
                    yield pytest.param(name, file, number, id=label, marks=marks)


def widths(name):
    """Returns widths that reach all of a kernel's code: at 512 warps share rows."""
    return [None] if name == "combine" else [64, 512]


def mutant(tmp_path, name, file, number, width):
    """Returns the module without the call in a line of a file."""
    source = tmp_path / f"{name}.cu"
    source.write_bytes((emulated.CUDA / source.name).read_bytes())
    lines = (emulated.CUDA / file).read_text().splitlines()
    lines[number] = re.sub(ORDERS + r".*?\);", ";", lines[number].split("//")[0])
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    folder = emulated.build().parent
    changed = f"{name}_{width}.o" if width else f"{name}.o"
    flags = [f"-DRELSSL_DIM={width}"] if width else []
    emulated.compile_to(tmp_path / changed, source, "-O1", *flags)
    module = tmp_path / "_emulated.so"
    emulated.link(module, [tmp_path / changed, *(f for f in folder.glob("*.o") if f.name != changed)])
    return module


def run(module, name, width):
    path = "90" if name == "forward_sm90" else "80"
    worker = Path(__file__).with_name("emulated_worker.py")
    command = [sys.executable, "-W", "ignore", worker, module, path, str(width or 64)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if run.returncode < 0:  # Without a wait, a product was written to sums that no longer existed.
        return f"caught: died of signal {-run.returncode}"
    return run.stdout or run.stderr


@pytest.mark.parametrize(
    ("name", "width"),
    [
        pytest.param(name, width, marks=[pytest.mark.slow] * ((name, width) != ("forward_sm90", 64)))
        for name in KERNELS
        for width in widths(name)
    ],
)
def test_whole_kernels_agree(name, width):
    assert run(emulated.build(), name, width) == "agrees\n"


@pytest.mark.parametrize(("name", "file", "number"), list(sites()))
def test_each_is_needed(tmp_path, name, file, number):
    for width in widths(name):
        output = run(mutant(tmp_path, name, file, number, width), name, width)
        if output != "agrees\n":
            break
    assert output.startswith("caught")
