"""`relssl info`: what is installed, and which backend would be chosen."""

import platform

import numpy
import torch

from relssl import backends, tuned
from relssl.backends import cpu, cuda
from relssl.version import __version__


def _instruction_sets() -> str:
    if cpu._cpu is None:
        return cpu._missing
    others = [name for name in cpu._cpu.instruction_sets() if name != cpu._cpu.instruction_set()]
    threads = {"openmp": "torch's OpenMP threads", "own": "a pool of their own"}[cpu._cpu.threads()]
    return (
        f"C++ kernels for {cpu._cpu.instruction_set()} (RELSSL_CPU_ISA could choose {', '.join(others)})"
        f" on {threads}"
    )


def _cuda_kernels() -> str:
    if cuda._cuda is None:
        return cuda.missing
    reason = cuda._missing(0)
    return f"kernels built for {cuda._cuda.architectures} with {cuda.built_with()}" + (
        f" (cannot run here: {reason})" if reason else ""
    )


def _opt_in(name: str) -> str | None:
    return None if name in backends.DEFAULTS else "only where relssl tune chose it"


def _choices(device: str) -> list[str]:
    record = tuned.record(device)
    lines = [f"  {record['environment']}"]
    for dtype, dim, rows, queue, backend in record["choices"]:
        lines.append(f"    {dtype}, D {dim}, {rows:,} rows, a queue of {queue:,}: {backend}")
    return lines if len(lines) > 1 else [*lines, "    none: the defaults below apply"]


def report() -> str:
    """Lists versions, backends and, by device and dtype, the choice of "auto" and why not the others."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    lines = [
        f"relssl {__version__}, Python {platform.python_version()} on {platform.machine()}",
        f"torch {torch.__version__}, triton {triton_version}, numpy {numpy.__version__}",
        f"CPU threads {torch.get_num_threads()}, {_instruction_sets()}",
        f"GPU {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none found by torch'}",
        f"CUDA C++ {_cuda_kernels()}",
        "",
        "backends:",
    ]
    for name in backends.BACKENDS:
        about = (backends.BACKENDS[name].__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:<12}{about}")
    lines += ["", f"choices of relssl tune ({tuned.path()}):"]
    for device in devices:
        lines += _choices(device)
    lines += ["", 'backend="auto" elsewhere, at D = 128:']
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            chosen = backends.choose("auto", device, dtype, 128)
            refused = [
                f"{name}: {reason}"
                for name in backends.BACKENDS
                if (reason := backends.BACKENDS[name].supports(device, dtype, 128) or _opt_in(name))
            ]
            dtype_name = str(dtype).removeprefix("torch.")
            lines.append(f"  {device:<6}{dtype_name:<10}{chosen}" + "".join(f"  ({r})" for r in refused))
    return "\n".join(lines)
