"""Every loss by everyone who can compute it, each beside relssl in turn, and held to float64 before it is timed."""

import pytest
import torch
from grid import DEFAULT, MORE, SLOW
from machine import DEVICE, available_bytes
from memory import case_memory, measurable, runner
from peers import PEERS, Unfit, find
from timing import alternate
from work import Problem

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
SECONDS = 1.0  # that the rounds of a case and peer may take
PRODUCT = 768 if DEVICE == "cpu" else 8192  # side of the matrices whose product is the yardstick


def parameters() -> list:
    """(case, peer), all peers of a case in a row, so that its inputs are made once."""
    found = []
    for case in DEFAULT + MORE:
        for name in PEERS[case.work]:
            slow = case in MORE or name in SLOW.get(case, ())
            marks = [pytest.mark.large] if slow else []
            found.append(pytest.param(case, name, id=f"{case}-{name}", marks=marks))
    return found


@pytest.fixture(scope="module")
def problem(request) -> Problem:
    return Problem(request.param, DEVICE)


@pytest.mark.parametrize(("problem", "name"), parameters(), indirect=["problem"])
def test_loss(problem, name, benchmark, results):
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
    seconds = alternate(benchmark, DEVICE, ours, run, lambda: torch.mm(a, a, out=out), SECONDS)
    results.timed(case, name, seconds, error, peak(problem, name, run), 2 * PRODUCT**3)


def peak(problem: Problem, name: str, run) -> int | None:
    """Bytes beyond inputs and queue."""
    if problem.device == "cpu":
        wanted = measurable() and problem.case.grad and problem.case.rows * problem.case.dim < 2**17
        return case_memory(problem.case, name) if wanted else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
