"""Host time of the Triton backend, without a GPU: its kernels compile for one, and a driver that does nothing
launches them.

    python bench/launch.py

Counts all that Python does in a call, for which a GPU would wait; not what the driver itself takes.
"""

import time
from statistics import median
from types import SimpleNamespace

import torch
import triton
from relssl.kernels.heuristics import Chip
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from relssl import backends

kernels = backends.MODULES["triton"]
launches = []


class Idle:
    """A driver for compute capability 9.0 that counts launches."""

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


def microseconds(run, rounds: int = 300) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e6 * median(times[rounds // 10 :])


def main() -> None:
    triton.runtime.driver.set_active(Idle())
    kernels._chip = lambda index: Chip(90, 132)
    q, k, queue = (F.normalize(torch.randn(n, 128), dim=1).bfloat16() for n in (256, 256, 65_536))
    scale = kernels.scales([25.0, 10.0])
    parts = {
        "relation": lambda: kernels.relation(q, k, queue, [10.0, 25.0], "ce", 1 / 256, True),
        "of that, lookup": lambda: kernels.lookup(k, q, queue, scale, None, True),
        "info_nce": lambda: kernels.info_nce(q, k, queue, [5.0], 1 / 256, True),
    }
    for name, run in parts.items():
        run()
        launches.clear()
        run()
        count = len(launches)
        print(f"{name:<16}{microseconds(run):6.1f} us, launches: {count}")


if __name__ == "__main__":
    main()
