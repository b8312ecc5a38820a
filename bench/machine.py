"""What a result must say of where it comes from."""

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import relssl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent


def about() -> dict[str, str]:
    """Device, driver, versions, commit and date; all words."""
    told = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _processor(),
        "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "relssl": relssl.__version__,
        # .git does not travel with a source archive; whoever sends one may say.
        "commit": os.environ.get("RELSSL_COMMIT") or _commit(),
        "date": str(date.today()),
    }
    if DEVICE == "cuda":
        import triton

        told["triton"] = triton.__version__
    return {name: value for name, value in told.items() if value}


def available_bytes() -> int:
    """What a peer may still fill."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    """As "AMD EPYC, 2 cores, AVX2": the set of instructions is the one that relssl's kernel uses."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        from relssl import _cpu

        return f"{name}, {os.cpu_count()} cores, {_cpu.instruction_set()}"
    except ImportError:
        return f"{name}, {os.cpu_count()} cores"


def _commit() -> str:
    """The checkout's commit, with a + if files that count are not as committed."""
    commit = _told("git", "rev-parse", "--short", "HEAD")
    changed = _told(
        "git", "status", "--porcelain", "--", "relssl", "kernels", "csrc", "bench/*.py", "setup.py"
    )
    return commit + ("+" if changed else "")


def _told(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""
