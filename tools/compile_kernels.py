"""Compiles the Triton kernels that the tests of a GPU launch, on all cores, without launching any:

    python -P tools/compile_kernels.py [--capability 90] [--processes 16]

Otherwise a test compiles the kernels that it is the first to need, one after the other, which takes most of
its time. A kernel that is missing here is compiled there.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Job = tuple[str, tuple, str]  # dtype; views, B, K and D; which of the tests' checks


def jobs() -> list[Job]:
    """Returns the shapes of the tests, the widest first: they take longest."""
    from test_gpu import LARGE_LOGITS, PUBLISHED, WIDTHS
    from test_losses import LARGE, PAIRS, SHAPES  # type: ignore[attr-defined]  # of tests/, not of bench/

    shapes = [*SHAPES, LARGE, (None, *PUBLISHED), *((None, *LARGE_LOGITS, d) for d in WIDTHS["triton"])]
    dtypes, checks = ("float32", "bfloat16", "float16"), ("relation", "info_nce", "logsumexp")
    found = [(dtype, s, c) for s in shapes for dtype in dtypes for c in checks]
    found += [(dtype, (None, *s), "nt_xent") for s in PAIRS for dtype in dtypes]
    return sorted(found, key=lambda job: -job[1][-1])


def compile_all(job: Job, capability: int, processors: int) -> int:
    """Returns the number of launches of the losses of one shape, with all their gradients."""
    import checks
    import torch
    import triton
    from launch import Idle, backend, launches
    from oracle import evaluate
    from relssl.kernels.heuristics import Chip, version
    from triton.backends.compiler import GPUTarget

    from relssl.backends import launching

    class Driver(Idle):
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    launching.chip = lambda index: Chip(capability, processors, version(triton.__version__))  # type: ignore[assignment]
    backend.supports = lambda *arguments: None
    checks.device = lambda backend: "cpu"
    # Nothing is computed, so there is nothing to compare.
    checks.agree = lambda ours, formula, inputs, cotangents, *rest: evaluate(ours, inputs, cotangents)
    dtype, shape, check = job
    launches.clear()
    q, k, queue = checks.batch(*shape, getattr(torch, dtype))
    if check == "logsumexp":
        checks.check_logsumexp(k, queue, 0.1, "triton")
    elif check == "nt_xent":
        checks.check_nt_xent(q, k, queue if len(queue) else None, 0.3, "triton", "mean")
    elif check == "info_nce":
        checks.check_info_nce(q, k, queue, 0.2, "triton")
    else:
        checks.check_relation(q, k, queue, 0.1, 0.04, "kl", "triton")
        checks.check_relation(q, k, queue, 0.1, 0.04, "ce", "triton")
    return len(launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, help="10 * major + minor; default: this GPU's")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / name) for name in ("tests", "tools", "bench")]
    import torch

    capability, processors = options.capability, 132
    if not capability:
        gpu = torch.cuda.get_device_properties()
        capability, processors = 10 * gpu.major + gpu.minor, gpu.multi_processor_count
    began, todo = time.monotonic(), jobs()
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=fresh) as pool:
        counts = list(pool.map(partial(compile_all, capability=capability, processors=processors), todo))
    print(f"compiled for {sum(counts)} launches of {len(todo)} losses in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
