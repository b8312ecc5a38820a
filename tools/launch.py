"""Measures the Triton backend's host time without a GPU: a driver that does nothing launches its kernels.

    python tools/launch.py

The time is that of all Python code in a call, without the driver's own. It is printed with the number of
launches: those of Triton, and torch's own operations on the device.
"""

import time
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import triton
from operations import Operations
from relssl.kernels.heuristics import Chip
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from relssl import backends
from relssl.backends import launching
from relssl.functional import info_nce, relation_loss

backend: Any = backends.BACKENDS["triton"]
launches: list[tuple] = []


class Idle:
    """A driver for compute capability 9.0 that only counts launches."""

    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (None, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *arguments: launches.append(arguments)


def launched(run) -> tuple[int, list[str]]:
    """Returns the number of Triton kernels that a call launches, and the names of torch's own operations."""
    launches.clear()
    with Operations(within=True) as own:
        run()
    return len(launches), own.names


def use_idle_driver() -> None:
    """Makes the backend treat tensors of the CPU as those of a Hopper GPU."""
    triton.runtime.driver.set_active(Idle())
    launching.chip = lambda index: Chip(90, 132)  # type: ignore[assignment]
    backend.supports = lambda device, dtype, dim: None


def with_gradient(loss, q, k, queue, **options):
    """Returns a function that calls a loss and its backward pass, with a seed that autograd need not make."""
    q = q.clone().requires_grad_()
    seed = torch.ones(q.shape[0] if options.get("reduction") == "none" else ())

    def run():
        loss(q, k, queue, backend="triton", **options).backward(seed)
        q.grad = None

    return run


def microseconds(run, rounds: int = 300) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e6 * median(times[rounds // 10 :])


def main() -> None:
    use_idle_driver()
    q, k, queue = (F.normalize(torch.randn(n, 128), dim=1).bfloat16() for n in (256, 256, 65_536))
    scale = backend.kernel_scales([25.0, 10.0])
    parts = {
        "relation_loss and backward": with_gradient(relation_loss, q, k, queue),
        "info_nce and backward": with_gradient(info_nce, q, k, queue),
        "relation": lambda: backend.relation(q, k, queue, [10.0, 25.0], "ce", 1 / 256, True),
        "of that, forward": lambda: backend.forward(k, q, queue, scale, None, True),
        "info_nce": lambda: backend.info_nce(q, k, queue, [5.0], 1 / 256, True),
    }
    for name, run in parts.items():
        run()
        ours, own = launched(run)
        print(f"{name:<27}{microseconds(run):6.1f} us, launches: {ours} of Triton, {len(own)} of torch {own}")


if __name__ == "__main__":
    main()
