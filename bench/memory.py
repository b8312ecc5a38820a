"""Peak memory of a piece of code on the CPU: what a child process needs beyond what it already has.

    python bench/memory.py      relation_loss at a million queue rows, beside eager code

Resident memory is what the system sees, whoever allocated it: torch, BLAS or a kernel of ours. Linux
keeps its high-water mark (VmHWM in /proc/self/status) and resets it on request.
"""

import json
import os
import subprocess
import sys
import tempfile

_CHILD = """
import json, sys
setup, warm_up, statement = json.load(sys.stdin)
scope = {}
exec(setup, scope)
exec(warm_up, scope)

def status(name):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts again from what is resident now
before = status("VmRSS")
exec(statement, scope)
print(status("VmHWM") - before)
"""


def measurable() -> bool:
    """Whether this system has the /proc files that the measurement needs."""
    return os.access("/proc/self/clear_refs", os.W_OK) and os.access("/proc/self/status", os.R_OK)


def peak_extra_memory(statement: str, *, setup: str = "", warm_up: str = "") -> int:
    """Bytes by which `statement` raises the resident memory of a fresh Python process at its peak.

    `setup` makes the inputs, `warm_up` runs the same code small, so that thread pools and lazily
    loaded libraries are not counted. What setup and warm_up freed may be used again uncounted:
    keep their temporaries small. What statement leaves behind, such as gradients, counts.

    Raises subprocess.CalledProcessError if the code fails; its message is on stderr.
    """
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps([setup, warm_up, statement]),
        cwd=tempfile.gettempdir(),  # never the source folder, which would stand in for the package
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(child.stdout.split()[-1])


RELATION = """
import sys, torch
from relssl.functional import relation_loss
sys.path.insert(0, {folder!r})
import eager

def inputs(B, K, D=128):
    q, k, queue = (torch.empty(n, D).normal_() for n in (B, B, K))
    for rows in (q, k, *queue.split(4096)):
        rows /= rows.norm(dim=1, keepdim=True)
    return q.requires_grad_(), k, queue

def run_relssl(q, k, queue):
    relation_loss(q, k, queue).backward()

def run_chunked(q, k, queue):
    relation_loss(q, k, queue, backend="chunked").backward()

def run_eager(q, k, queue):
    eager.relation_loss(q, k, queue.T).backward()

small, large = inputs(8, 1024), inputs({rows}, {size})
"""


def relation_memory(rows: int, size: int, code: str = "relssl") -> int:
    """Bytes that a forward and backward of the relation loss needs, D = 128, float32.

    code is "relssl" (the default backend), "chunked" or "eager" (bench/eager.py).
    """
    setup = RELATION.format(folder=os.path.dirname(os.path.abspath(__file__)), rows=rows, size=size)
    return peak_extra_memory(f"run_{code}(*large)", setup=setup, warm_up=f"run_{code}(*small)")


if __name__ == "__main__":
    for size in (2**17, 2**20):
        for code in ("relssl", "chunked", "eager"):
            if code == "eager" and size == 2**20:
                continue  # some 5 GiB
            mib = relation_memory(256, size, code) / 2**20
            print(f"B = 256, K = {size:>9,}: {code:7} {mib:9,.1f} MiB")
