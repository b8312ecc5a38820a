"""The origin of a result: device, versions and commit; and the rates that bound the device."""

import os
import platform
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from timing import Clock

import relssl
from relssl import trial, tuned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent


def about(device: str = DEVICE) -> dict[str, str]:
    """Returns device (of this type, cpu or cuda), driver, versions, commit and date."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "relssl": relssl.__version__,
        # A source archive has no .git.
        "commit": os.environ.get("RELSSL_COMMIT") or commit(),
        "date": str(date.today()),
    }
    if device == "cuda":
        import triton

        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["triton"] = triton.__version__
    return {name: value for name, value in found.items() if value}


def available_bytes() -> int:
    """Returns the memory that a peer may still allocate."""
    if DEVICE == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _processor() -> str:
    """For example "AMD EPYC, 2 cores, avx2", with the instruction set of relssl's kernel."""
    name = f"{tuned.processor()}, {os.cpu_count()} cores"
    try:
        from relssl import _cpu  # type: ignore[attr-defined]

        return f"{name}, {_cpu.instruction_set()}"
    except ImportError:
        return name


def commit() -> str:
    """Returns the checkout's commit, with a + if files that matter are not as committed."""
    name = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output(
        "git", "status", "--porcelain", "--", "relssl", "kernels", "csrc", "bench/*.py", "setup.py"
    )
    return name + ("+" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def matrix_product(dtype: torch.dtype) -> tuple[Callable, int]:
    """Returns a product of matrices that is large enough to reach the full rate, and its flop."""
    return trial.matrix_product(dtype, DEVICE)


def limits() -> dict[str, float]:
    """Returns the rates that bound the work: flop of products, bytes read and exponentials a second.

    Products are in float32, on a GPU in bfloat16. A GPU's exponentials are not measured, but computed: 16 a
    clock and multiprocessor.
    """
    product, flop = matrix_product(torch.bfloat16)
    far = torch.ones(2**26, device=DEVICE)  # 256 MiB, more than caches hold
    rates = {
        "matmul": flop / _seconds(product),
        "bandwidth": 4 * far.numel() / _seconds(far.sum),
    }
    if DEVICE == "cpu":
        near = torch.zeros(2**17)  # In the cache.
        out = torch.empty_like(near)
        rates["exponentials"] = near.numel() / _seconds(lambda: torch.exp(near, out=out))
    else:
        about = torch.cuda.get_device_properties(0)
        if clock := getattr(about, "clock_rate", 0):  # kHz
            rates["exponentials"] = 16e3 * clock * about.multi_processor_count
    return {name: float(f"{rate:.3g}") for name, rate in rates.items()}


def _seconds(run: Callable) -> float:
    """Returns the seconds of a call: the best of ten rounds of at least 10 ms."""
    clock = Clock(DEVICE)
    clock.time("warm", run)
    calls = max(1, int(0.01 / clock.seconds()["warm"][0]))
    for _ in range(10):
        clock.time("run", run, calls)
    return min(clock.seconds()["run"])
