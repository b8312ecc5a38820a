"""Measures the peak memory of code on the CPU: what a child process needs beyond what it already has.

    python bench/memory.py      the relation loss at up to a million queue rows, by relssl and by eager code

Resident memory counts every allocation, of torch, BLAS and relssl's kernels. Linux keeps its high-water mark
(VmHWM in /proc/self/status) and resets it on request. Children are forked from a server that has imported
everything and computed nothing, so that each starts at once and with a clean heap.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from work import Case

COMPILES = ("torch.compile", "liger-kernel", "cut-cross-entropy")  # Their warm-up must have the same size.


def measurable() -> bool:
    """Returns whether this system has the /proc files that the measurement needs."""
    return os.access("/proc/self/clear_refs", os.W_OK) and os.access("/proc/self/status", os.R_OK)


def case_memory(case: Case, name: str) -> int:
    """Returns the bytes that a peer needs on the CPU beyond inputs and queue.

    Raises:
        RuntimeError: the peer fails.
    """
    small = case if name in COMPILES else replace(case, rows=8, size=min(case.size, 1024))
    setup = "from peers import runner\nfrom work import Case, Problem\n"
    for variable, each in {"run": case, "small": small}.items():
        setup += f"{variable} = runner(Problem(Case(**{asdict(each)}), 'cpu'), {name!r})\n"
    return peak_extra_memory("result = run()", setup=setup, warm_up="small()")


def peak_extra_memory(statement: str, *, setup: str = "", warm_up: str = "") -> int:
    """Returns the bytes by which `statement` raises the peak of a fresh process's resident memory.

    `setup` makes the inputs; `warm_up` runs the same code at a small size, so that thread pools and lazily
    loaded libraries do not count. Memory that both have freed may be used again uncounted: keep their
    temporaries small. What statement leaves behind, such as gradients, counts.

    Raises:
        RuntimeError: the code fails.
    """
    server = _server()
    assert server.stdin and server.stdout
    print(json.dumps([setup, warm_up, statement]), file=server.stdin, flush=True)
    answer = json.loads(server.stdout.readline())
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


@cache
def _server() -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import memory; memory._serve()",
    ]
    # Not in the source folder, which would shadow the package. It ends with its standard input.
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, cwd=tempfile.gettempdir(), text=True, stdin=pipe, stdout=pipe)
    atexit.register(server.communicate)  # Closes its input.
    return server


def _serve() -> None:
    # Everything that a child may import.
    import peers  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Output of the code must not mix with the answers.
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                answer: int | str = _measure(*json.loads(line))
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer_text = pipe.read()
        os.waitpid(child, 0)
        print(answer_text or json.dumps("the process was killed"), file=out, flush=True)


def _measure(setup: str, warm_up: str, statement: str) -> int:
    import ctypes

    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed tensors go back to the system at once.
    scope: dict = {}
    exec(setup, scope)
    exec(warm_up, scope)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from what is resident now
    before = _status("VmRSS")
    exec(statement, scope)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


if __name__ == "__main__":
    for size in (2**17, 2**20):
        for code in ("relssl cpu", "relssl chunked", "eager"):
            if code == "eager" and size == 2**20:
                continue  # some 5 GiB
            mib = case_memory(Case("relation", 256, size, 128), code) / 2**20
            print(f"B = 256, K = {size:>9,}: {code:14} {mib:9,.1f} MiB")
