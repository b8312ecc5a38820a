"""Times every loss by every peer that computes it, alternating with relssl, after a check against float64."""

import time
from statistics import median

import pytest
import torch
from grid import DEFAULT, MORE, SLOW
from machine import DEVICE, available_bytes, matrix_product
from memory import COMPILES, case_memory, measurable
from peers import GRAPH, PEERS, Unsupported, find, runner
from timing import alternate
from work import Problem

from relssl.trial import peak_memory

# In 16 bits the error of eager code is up to 2 %, that of a gradient without the queue 4 %.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.03}
SECONDS = 0.8  # that the rounds of a case and peer may take


def parameters() -> list:
    """Returns (case, peer), all peers of a case in a row, so that its inputs are made once."""
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
        needed, free = peer.memory(case), available_bytes()
        if needed > free:
            gib = f"{needed / 2**30:,.0f} GiB, and {free / 2**30:,.0f} are free"
            raise Unsupported(f"{name} would need some {gib}")
        run, ours = runner(problem, name), runner(problem, "relssl")
        value, grads = run()
        error = problem.error(value, grads, peer.form, peer.normalises)
        assert error <= TOLERANCE[case.dtype], f"an error of {error:.1e}: not timed"
    except Unsupported as why:
        results.absent(case, name, str(why))
        pytest.skip(str(why))
    except Exception as why:
        results.absent(case, name, f"failed: {str(why).splitlines()[0]}")
        raise
    del value, grads

    fma = multiply_adds() if name == "relssl cpu" else 0.0
    between, flop = matrix_product(problem.q.dtype)
    benchmark.group, benchmark.name = str(case), name
    seconds = alternate(benchmark, DEVICE, ours, run, between, SECONDS * (1 + full))
    extra = {}
    if fma:
        rate = case.flop / median(seconds["peer"])
        extra["of_fma_rate"] = round(rate / max(fma, multiply_adds()), 3)
    if DEVICE == "cuda":
        extra["host_us"] = round(1e6 * host_seconds(run), 1)
    entry = results.timed(case, name, seconds, error, peak(problem, name, run, full), flop, extra)
    benchmark.extra_info.update(entry)


def multiply_adds() -> float:
    """Returns the flop rate of multiply-adds in registers on all of torch's threads, the best of five."""
    from relssl import _cpu  # type: ignore[attr-defined]

    rates = []
    for _ in range(5):
        began = time.perf_counter()
        flop = _cpu.peak(20_000_000, torch.get_num_threads())
        rates.append(flop / (time.perf_counter() - began))
    return max(rates)


def host_seconds(run) -> float:
    """Returns the seconds that a call's Python and launches take, without waiting for the device."""
    torch.cuda.synchronize()
    began, calls = time.perf_counter(), 0
    while calls < 20 and time.perf_counter() - began < 0.2:
        run()
        calls += 1
    taken = time.perf_counter() - began
    torch.cuda.synchronize()
    return taken / calls


def peak(problem: Problem, name: str, run, full: bool) -> int | None:
    """Returns the peak of bytes beyond inputs and queue, if it can be measured."""
    case = problem.case
    if name.endswith(GRAPH):  # Its memory was allocated with the graph.
        return None
    if DEVICE == "cuda":
        return peak_memory(run, DEVICE)
    # Code that is compiled is compiled again in the child, for many seconds.
    quick = name not in COMPILES or case in DEFAULT[:1]
    wanted = case.grad and (full or (quick and case.rows < 1024))
    return case_memory(case, name) if wanted and measurable() else None
