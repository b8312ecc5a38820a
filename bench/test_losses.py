"""Every loss by everyone who can compute it, held to float64, then timed with relssl in turn."""

import time
from statistics import median

import pytest
import torch
from grid import DEFAULT, MORE, SLOW
from machine import DEVICE, available_bytes
from memory import COMPILES, case_memory, measurable, runner
from peers import PEERS, Unfit, find
from timing import alternate
from work import Problem

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
SECONDS = 0.8  # that the rounds of a case and peer may take
PRODUCT = 768 if DEVICE == "cpu" else 8192  # side of the matrices whose product is the yardstick


def parameters() -> list:
    """(case, peer), all peers of a case in a row, so that its inputs are made once."""
    found = []
    for case in DEFAULT + MORE:
        for name in PEERS[case.work]:
            large, slow = case in MORE, name in SLOW.get(case, ())
            if large and slow:
                continue
            marks = [pytest.mark.large] if large or slow else []
            found.append(pytest.param(case, name, id=f"{case}-{name}", marks=marks))
    return found


@pytest.fixture(scope="module")
def problem(request) -> Problem:
    return Problem(request.param, DEVICE)


@pytest.mark.parametrize(("problem", "name"), parameters(), indirect=["problem"])
def test_loss(problem, name, benchmark, results, full):
    case, peer = problem.case, find(problem.case.work, name)
    try:
        needed, free = peer.keeps(case), available_bytes()
        if needed > free:
            raise Unfit(f"{name} would need some {needed / 2**30:,.0f} GiB, and {free / 2**30:,.0f} are free")
        run, ours = runner(problem, name), runner(problem, "relssl")
        value, grads = run()
    except Unfit as why:
        results.absent(case, name, str(why))
        pytest.skip(str(why))
    error = problem.error(value, grads, peer.form, peer.normalises)
    assert error <= TOLERANCE[case.dtype], f"{name} is wrong by {error:.1e}: it is not timed"
    del value, grads

    kind = torch.float32 if DEVICE == "cpu" else problem.q.dtype  # CPUs without bfloat16 would take minutes.
    a = torch.randn(PRODUCT, PRODUCT, device=DEVICE, dtype=kind)
    out = torch.empty_like(a)
    benchmark.group = str(case)
    seconds = alternate(benchmark, DEVICE, ours, run, lambda: torch.mm(a, a, out=out), SECONDS * (1 + full))
    extra = {}
    if name == "relssl cpu":
        extra["of_fma_rate"] = round(case.flop / median(seconds["peer"]) / multiply_adds(), 3)
    if DEVICE == "cuda":
        extra["host_us"] = round(1e6 * host_seconds(run), 1)
    results.timed(case, name, seconds, error, peak(problem, name, run, full), 2 * PRODUCT**3, extra)


def multiply_adds() -> float:
    """The flop rate of multiply-adds in registers, on all of torch's threads: the best of five."""
    from relssl import _cpu

    rates = []
    for _ in range(5):
        began = time.perf_counter()
        flop = _cpu.peak(20_000_000, torch.get_num_threads())
        rates.append(flop / (time.perf_counter() - began))
    return max(rates)


def host_seconds(run) -> float:
    """Of one call's Python, launches and all, while the device is busy elsewhere."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        run()
    taken = time.perf_counter() - began
    torch.cuda.synchronize()
    return taken / 20


def peak(problem: Problem, name: str, run, full: bool) -> int | None:
    """Bytes beyond inputs and queue."""
    case = problem.case
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Whoever compiles does so again in the child, for many seconds.
    quick = name not in COMPILES or case in DEFAULT[:1]
    wanted = case.grad and (full or (quick and case.rows < 1024))
    return case_memory(case, name) if wanted and measurable() else None
