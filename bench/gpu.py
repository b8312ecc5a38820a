"""Everything that is to be done with a GPU: tests, compute-sanitizer, timings; each under five minutes.

    python bench/gpu.py OUT [--parts tests sanitizer sweep] [--quick]

OUT gets the tests' report, what compute-sanitizer says of the CUDA kernels, relation_loss.json (device,
driver, versions, commit; milliseconds of every peer, peak memory, the matrix rate of the same run) and
table.txt, which is printed last. Each part is guarded: a failure leaves the rest.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median

import torch
from peers import Loss, peers
from torch import Tensor
from torch.nn import functional as F

import relssl

ROOT = Path(__file__).resolve().parent.parent
# The headline, then the rest; a tuned torch.compile takes too long for more than these.
TUNED = [(256, 65_536, 128), (1024, 262_144, 128)]
GRID = itertools.product((256, 1024, 4096, 32), (65_536, 262_144, 1_048_576), (128, 256, 512))
SHAPES = TUNED + [shape for shape in GRID if shape not in TUNED]
OURS = ("triton", "cuda", "cuda sm_90a")
WARM_UP, ROUNDS, LONGEST = 3, 15, 1.0  # rounds, and the seconds after which one side stops
BUDGET = 240  # seconds for all shapes


def inputs(rows: int, size: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, queue = (F.normalize(torch.randn(n, dim, device="cuda"), dim=1) for n in (rows, rows, size))
    return q.to(dtype).requires_grad_(), k.to(dtype), queue.to(dtype)


def step(loss: Loss, q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(q, k, queue)
    return value, torch.autograd.grad(value, q)[0]


def flush(cache: Tensor) -> None:
    """A step of training leaves nothing of the queue in the L2 cache; nor do we."""
    cache.zero_()


def milliseconds(runs: dict, cache: Tensor) -> dict[str, list[float]]:
    """Times on the device of each run, taken in turn, each round with another side first."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    for i in range(WARM_UP + ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if spent[name] > LONGEST and times[name]:
                continue
            flush(cache)
            torch.cuda._sleep(1_000_000)  # Half a millisecond, in which the host gets ahead of the device.
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began = time.perf_counter()
            start.record()
            runs[name]()
            stop.record()
            torch.cuda.synchronize()
            spent[name] += time.perf_counter() - began
            if i >= WARM_UP or spent[name] > LONGEST:
                times[name].append(start.elapsed_time(stop))
    return times


def usable(runs: dict) -> dict:
    """Those that run, after a first call that compiles."""
    good = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
            good[name] = run
        except Exception as error:
            print(f"  {name} left out: {str(error).splitlines()[0]}", flush=True)
    return good


def replayed(loss: Loss, q: Tensor, k: Tensor, queue: Tensor):
    """The step as a CUDA graph, which has no launches to wait for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(loss, q, k, queue)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(loss, q, k, queue)
    return graph.replay


def peak_memory(run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_microseconds(run) -> float:
    """Of one call's Python, launches and all, while the device is busy elsewhere."""
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        run()
    taken = time.perf_counter() - began
    torch.cuda.synchronize()
    return taken / 50 * 1e6


def errors(losses: dict[str, Loss], q: Tensor, k: Tensor, queue: Tensor) -> dict[str, float]:
    """Of each peer's gradient against float64, relative, on 8 rows: nobody wins by being wrong."""
    few, own = q[:8].detach().requires_grad_(), k[:8]
    exact = few.detach().double().requires_grad_()
    bank = queue.double().T
    target = (own.double() @ bank / 0.04).softmax(1)
    value = -(target * (exact @ bank / 0.1).log_softmax(1)).sum(1).mean()
    (expected,) = torch.autograd.grad(value, exact)
    found = {name: step(loss, few, own, queue)[1].double() for name, loss in losses.items()}
    return {name: float((g - expected).norm() / expected.norm()) for name, g in found.items()}


def case(rows: int, size: int, dim: int, dtype: torch.dtype, cache: Tensor) -> dict:
    torch._dynamo.reset()  # which would stop compiling after some shapes
    q, k, queue = inputs(rows, size, dim, dtype)
    losses = peers(queue, rows, tuned=(rows, size, dim) in TUNED)
    # Eager code keeps 20 bytes for a similarity, and has as many again in passing.
    if rows * size * 48 > torch.cuda.mem_get_info()[0]:
        del losses["eager"], losses["torch.compile"]
    runs = usable({name: (lambda loss=loss: step(loss, q, k, queue)) for name, loss in losses.items()})
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    result: dict = {"rows": rows, "size": size, "dim": dim, "dtype": str(dtype).removeprefix("torch.")}
    checked = {n: loss for n, loss in losses.items() if n in runs and n != "torch.compile"}
    result["error"] = errors(checked, q, k, queue) if size <= 262_144 else {}
    result["bytes"] = {name: peak_memory(run) for name, run in runs.items()}
    own = {f"{n}, graph": replayed(losses[n], q, k, queue) for n in OURS if n in runs}
    own["matrix product"] = lambda: a @ a
    result["times"] = milliseconds(runs | own, cache)
    ms = result["ms"] = {name: median(t) for name, t in result["times"].items()}
    result["host_us"] = {name: host_microseconds(runs[name]) for name in OURS if name in runs}
    result["flop_rate"] = {n: 8 * rows * size * dim / ms[f"{n}, graph"] / 1e9 for n in OURS if n in runs}
    result["matrix_rate"] = 2 * 8192**3 / ms["matrix product"] / 1e9
    return result


def line(r: dict) -> str:
    ms, own = r["ms"], r["ms"]["triton"]
    cells = [f"{r['rows']:>5} {r['size']:>9,} {r['dim']:>4} {own:8.3f} {ms['triton, graph']:8.3f}"]
    split = next((n for n in ms if n.startswith("attention in")), "")
    for peer in ("eager", "torch.compile", "attention", split, "chunked", *OURS[1:]):
        cells.append(f"{ms[peer] / own:7.2f}" if peer in ms else "      -")
    for name in OURS:
        rate = r["flop_rate"].get(name)
        cells.append(f"{rate / r['matrix_rate']:6.2f}" if rate else "     -")
    cells.append(f"{r['bytes']['triton'] / 2**20:6.1f}")
    cells.append(
        f"{r['error'].get('triton', float('nan')):8.1e} {r['error'].get('eager', float('nan')):8.1e}"
    )
    return " ".join(cells)


# Milliseconds are Triton's, peers multiples of them; "of mm" and what follows are parts of the matrix rate.
NAMES = ("B", "K", "D", "ms", "graph", "eager", "compile", "attn", "split", "chunked", "sm_80", "sm_90a")
NAMES += ("of mm", "sm_80", "sm_90a", "MiB", "error", "eager's")
WIDTHS = (5, 9, 4, 8, 8, *7 * [7], *3 * [6], 6, 8, 8)
HEAD = " ".join(f"{name:>{w}}" for name, w in zip(NAMES, WIDTHS, strict=True))


def machine() -> dict:
    def told(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "driver": told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "relssl": relssl.__version__,
        "commit": os.environ.get("RELSSL_COMMIT") or told("git", "rev-parse", "--short", "HEAD"),
        "date": str(date.today()),
    }


def tests(out: Path) -> str:
    """Of the installed package (-P: never of the source folder); what is new first."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "--maxfail=40"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    names = ("test_gpu.py", "test_cuda.py", "test_triton.py", "test_losses.py")
    command += [str(ROOT / "tests" / name) for name in names]
    environment = os.environ | {"RELSSL_REQUIRE_GPU": "1"}
    with open(out / "tests.txt", "w") as report:
        subprocess.run(command, env=environment, stdout=report, stderr=subprocess.STDOUT, timeout=300)
    return (out / "tests.txt").read_text().strip().splitlines()[-1]


# A few rows and tiles of each width, by both kernels and on both paths of the exponent.
SANITIZED = """
import os, sys, torch
from relssl.functional import info_nce, relation_loss
os.environ["RELSSL_CUDA_KERNEL"] = sys.argv[1]
for dim in 64, 128, 256, 512:
    for dtype in torch.bfloat16, torch.float16:
        q, k, queue = (torch.randn(n, dim, device="cuda", dtype=dtype) for n in (70, 70, 1000))
        q = torch.nn.functional.normalize(q, dim=1).requires_grad_()
        relation_loss(q, k, queue, backend="cuda").backward()
        info_nce(q, k, queue, backend="cuda").backward()
torch.cuda.synchronize()
"""


def sanitized(out: Path) -> Iterator[str]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        yield "compute-sanitizer is not here"
        return
    for kernel, kind in itertools.product(("sm_80", "sm_90a"), ("memcheck", "racecheck")):
        with open(out / f"{kind}-{kernel}.txt", "w") as report:
            command = [tool, "--tool", kind, sys.executable, "-P", "-c", SANITIZED, kernel]
            subprocess.run(command, stdout=report, stderr=subprocess.STDOUT, timeout=60)
        last = (out / f"{kind}-{kernel}.txt").read_text().strip().splitlines()[-1:]
        yield f"{kind}, {kernel}: {' '.join(last)}"


def sweep(out: Path, about: dict, quick: bool) -> Iterator[str]:
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    results: list[dict] = []
    yield HEAD
    began = time.perf_counter()
    for rows, size, dim in TUNED if quick else SHAPES:
        if time.perf_counter() - began > BUDGET:
            yield "the rest was left out for want of time"
            return
        try:
            results.append(case(rows, size, dim, torch.bfloat16, cache))
            yield line(results[-1])
            gc.collect()
            torch.cuda.empty_cache()
        except Exception:
            yield f"{rows} {size} {dim} failed: {traceback.format_exc(limit=-2)}"
        (out / "relation_loss.json").write_text(json.dumps({**about, "results": results}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="*", default=["tests", "sanitizer", "sweep"])
    parser.add_argument("--quick", action="store_true", help="time two shapes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = []

    def told(text: str) -> None:
        report.append(text)
        print(text, flush=True)
        (options.out / "table.txt").write_text("\n".join(report) + "\n")

    about = machine()
    told(str(about))
    parts = {
        "tests": lambda: [tests(options.out)],
        "sanitizer": lambda: sanitized(options.out),
        "sweep": lambda: sweep(options.out, about, options.quick),
    }
    for name in options.parts:
        try:
            for text in parts[name]():
                told(text)
        except Exception:
            told(traceback.format_exc(limit=-2))


if __name__ == "__main__":
    main()
