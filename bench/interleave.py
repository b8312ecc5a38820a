"""Time several pieces of code against each other: in turn, in one process, on the same data.

Machines drift and share their cores with others, so that times taken apart say little; ratios of times taken
next to each other do. Before each run there is a pause: OpenMP's threads go on spinning for some
milliseconds after a parallel loop, on cores that the next side needs.
"""

import time
from collections.abc import Callable
from statistics import median, quantiles


def interleave(runs: dict[str, Callable], rounds: int, pause: float = 0.01) -> dict[str, list[float]]:
    """Seconds of each run, one a round, after a round that warms up; each round starts with another side."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(pause)
            began = time.perf_counter()
            runs[name]()
            taken = time.perf_counter() - began
            if i > 0:
                seconds[name].append(taken)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of times taken in one round: (median, low, high)."""
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return median(ratios), low, high
