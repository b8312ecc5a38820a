"""Times several pieces of code against each other: interleaved, in one process, on the same data.

Machines drift and share their cores with others: times from different minutes cannot be compared, ratios of
times taken next to each other can.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def work_before() -> None:
    """Runs a product on all of torch's threads. In a training step a loss follows such work, whose threads
    still spin.
    """
    torch.mm(_FACTOR, _FACTOR)


_FACTOR = torch.ones(512, 512)


class Clock:
    """Keeps the seconds that each of several pieces of code took, on a GPU those of the device.

    On a CPU each call follows other work of torch. On a GPU nothing waits until `seconds` is called: earlier
    work keeps the device busy while the host enqueues the code to be timed, so that launches do not count.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.taken: dict[str, list] = {}

    def time(self, name: str, run: Callable, calls: int = 1) -> None:
        """Times a piece of code once more: the mean of so many calls."""
        if self.device == "cpu":
            took: Any = 0.0
            for _ in range(calls):
                work_before()
                began = time.perf_counter()
                run()
                took += (time.perf_counter() - began) / calls
        else:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            stop.record()
            took = start, stop, calls
        self.taken.setdefault(name, []).append(took)

    def seconds(self) -> dict[str, list[float]]:
        if self.device == "cpu":
            return dict(self.taken)
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(stop) / 1e3 / calls for start, stop, calls in took]
            for name, took in self.taken.items()
        }


def interleave(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each run in each round, on the CPU; every round starts with another run."""
    names, clock = list(runs), Clock()
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            clock.time(name, runs[name])
    return clock.seconds()


def slowdown(peer: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Returns the median of the ratios within each round, the lowest and the highest."""
    ratios = [p / o for p, o in zip(peer, ours, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def alternate(
    benchmark: "BenchmarkFixture",
    device: str,
    ours: Callable,
    peer: Callable,
    between: Callable,
    seconds: float,
) -> dict[str, list[float]]:
    """Returns the seconds of "ours", "peer" and "between", which precedes both: same caches, same threads.

    There are as many rounds as fit into the given seconds, within limits. They are pytest-benchmark's rounds,
    and its statistics are of the peer's seconds for a call: without the work before on a CPU, of the device
    on a GPU.
    """
    clock = Clock(device)
    if device != "cpu":  # The first call may compile.
        ours()
        peer()
    for name, run in {"ours": ours, "peer": peer}.items():
        clock.time(name, run)
    # Short code is called several times on a CPU. On a GPU a second call would find the queue in the cache.
    shortest, most = (0.01, 11) if device == "cpu" else (0.0, 30)
    calls = {name: max(1, int(shortest / took[-1])) for name, took in clock.seconds().items()}
    one_round = sum(calls[name] * took[-1] + 0.02 for name, took in clock.seconds().items())
    clock.taken.clear()

    def before() -> None:
        clock.time("between", between)
        clock.time("ours", ours, calls["ours"])
        clock.time("between", between)

    benchmark.pedantic(
        lambda: clock.time("peer", peer, calls["peer"]),
        setup=before,
        rounds=min(max(round(seconds / one_round), 3), most),
    )
    found = clock.seconds()
    if benchmark.stats:  # None with --benchmark-disable.
        benchmark.stats.iterations = calls["peer"]
        benchmark.stats.stats.data[:] = found["peer"]
    return found
