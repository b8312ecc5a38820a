"""Time several pieces of code against each other: in turn, in one process, on the same data.

Machines drift and share their cores with others, so that times taken apart say little; ratios of times taken
next to each other do.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

PAUSE = 0.01  # seconds; OpenMP's threads go on spinning for some milliseconds after a parallel loop.


class Clock:
    """Keeps the seconds that each of several pieces of code took: those of the device, where that is a GPU.

    On a GPU nothing waits until `seconds` is asked for: work enqueued before keeps the device busy while the
    host enqueues what is timed, so that launches do not count.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.taken: dict[str, list] = {}

    def time(self, name: str, run: Callable, calls: int = 1) -> None:
        """One more time of a piece of code, the mean of so many calls."""
        if self.device == "cpu":
            time.sleep(PAUSE)
            began = time.perf_counter()
            for _ in range(calls):
                run()
            took: object = (time.perf_counter() - began) / calls
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
    """Seconds of each run, one a round, on the CPU, after a warm-up; each round starts with another run."""
    names, clock = list(runs), Clock()
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            clock.time(name, runs[name])
    return clock.seconds()


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Of times taken in one round: the median of their ratios, the lowest and the highest."""
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def alternate(
    benchmark, device: str, ours: Callable, peer: Callable, between: Callable, seconds: float
) -> dict[str, list[float]]:
    """Seconds of "ours", "peer" and "between", which comes before each of the two: same caches, same threads.

    In so many rounds as take the given seconds, within limits. The rounds are those of pytest-benchmark,
    whose statistics get the peer's seconds.
    """
    clock = Clock(device)
    if device != "cpu":  # There whoever was not called before compiles within the first call.
        ours()
        peer()
    for name, run in {"ours": ours, "peer": peer}.items():
        clock.time(name, run)
    # What is short is called several times: on a CPU a first call after a pause says little. On a GPU there
    # is no pause, and a second call would find the queue in the cache.
    shortest, most = (0.01, 11) if device == "cpu" else (0.0, 30)
    calls = {name: max(1, int(shortest / took[-1])) for name, took in clock.seconds().items()}
    round_ = sum(calls[name] * took[-1] + 0.02 for name, took in clock.seconds().items())
    clock.taken.clear()

    def before() -> None:
        clock.time("between", between)
        clock.time("ours", ours, calls["ours"])
        clock.time("between", between)

    benchmark.pedantic(
        lambda: clock.time("peer", peer, calls["peer"]),
        setup=before,
        rounds=min(max(round(seconds / round_), 3), most),
    )
    found = clock.seconds()
    if benchmark.stats:  # Not with --benchmark-disable.
        benchmark.stats.stats.data[:] = found["peer"]
    return found
