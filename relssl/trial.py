"""One candidate of `relssl tune`, in a process of its own: verified against float64, then timed.

tune.py starts it. The task comes as a line of JSON on standard input, and the verdict goes as one to standard
output: {"errors": [one for each shape]} or {"refused": reason}. Then every line {"shape": index, "baseline":
name} is answered by a line of figures.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from math import log
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relssl import dispatch
from relssl.backends import reference
from relssl.functional import info_nce, relation_loss

STUDENT, TEACHER = 0.1, 0.04  # temperatures [ReSSL]
# B, K and both temperatures: tiles that are not filled; logits that exp cannot hold; one row of each.
ODD = [(37, 1017, STUDENT, TEACHER), (5, 130, 0.005, 0.005), (1, 1, STUDENT, TEACHER)]
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-10}
CHECKED = 16  # rows from either end of a large batch that are compared
SECONDS, FEWEST, MOST = 2.0, 5, 50  # for timing one shape, and the rounds within
SLOW = 5  # After two rounds that take so many times as long as the baseline, no more are taken.


class Refused(Exception):
    """Why a candidate is not to be chosen."""


# ------------------------------------------------------------------------------------------ verification


def batch(rows: int, queue: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm q, k [rows, D] and queue [queue, D], each q near its k."""
    draw = torch.Generator(device).manual_seed(0)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, dim, device=device, generator=draw), dim=1)

    k = unit(rows)
    q = F.normalize(k + unit(rows) / 2, dim=1)
    return q.to(dtype), k.to(dtype), unit(queue).to(dtype)


def with_gradients(run: Callable, tensors: tuple[Tensor, ...], cotangents: list[Tensor]) -> list[Tensor]:
    """Returns the results of run(*tensors), and the gradients of the tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = run(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [g.to(o) for g, o in zip(cotangents, outputs, strict=True)])
    return [*(o.detach() for o in outputs), *grads]


def check_budget(
    ours: Callable,
    formula: Callable,
    tensors: tuple[Tensor, ...],
    cotangents: list[Tensor],
    scales: list[float],
    rows: Tensor | None = None,
) -> tuple[float, list[Tensor]]:
    """Returns the largest relative error of ours(*tensors) and its gradients, and these.

    Raises Refused if one is over the budget,

        |got - exact| <= 2 |eager - exact| + floor * max(|exact|, scale)

    where formula(*tensors) is `exact` in float64 and `eager` in the tensors' own dtype, or if a second call
    gives other bits.

    rows: those of the first tensor that formula is given and that are compared; by default all.
    """
    dtype, worst = tensors[0].dtype, 0.0
    got = with_gradients(ours, tensors, cotangents)
    if not all(map(torch.equal, got, with_gradients(ours, tensors, cotangents))):
        raise Refused("a second call gives other results")
    compared = got
    if rows is not None:
        cotangents = [g[rows] for g in cotangents]
        compared, tensors = [t[rows] for t in got], (tensors[0][rows], *tensors[1:])
    eager = with_gradients(lambda *t: formula(*t, dtype), tensors, cotangents)
    precise = tuple(t.double() for t in tensors)
    exact = with_gradients(lambda *t: formula(*t, torch.float64), precise, cotangents)
    for ours_, eager_, exact_, scale in zip(compared, eager, exact, scales, strict=True):
        error = (ours_.double() - exact_).norm()
        bound = 2 * (eager_.double() - exact_).norm() + FLOOR[dtype] * exact_.norm().clamp(min=scale)
        if not error <= bound:  # nor NaN
            raise Refused(f"wrong: an error of {error:.1e}, where {bound:.1e} is allowed")
        worst = max(worst, float(error / exact_.norm().clamp(min=1e-12)))
    return worst, got


def verify(backend: str, device: str, dtype: torch.dtype, dim: int, shapes: list) -> list[float]:
    """Returns the largest relative error of loss and grad_q at each shape [rows of q and k, queue rows].

    Every loss and gradient is held to the budget at odd sizes, the relation loss and its gradient for q at
    the shapes; Refused where one is over it.
    """
    for rows, size, tau_s, tau_t in ODD:
        tensors = batch(rows, size, dim, dtype, device)
        for form, reduction in (("kl", "none"), ("ce", "mean")):
            check_relation(backend, tensors, tau_s, tau_t, form, reduction)
        check_info_nce(backend, tensors, tau_s)
        check_logsumexp(backend, tensors[1:], tau_t)
    return [check_shape(backend, batch(max(1, rows // 2), size, dim, dtype, device)) for rows, size in shapes]


def reduced(rows: Tensor, reduction: str) -> Tensor:
    return rows.mean() if reduction == "mean" else rows


def check_relation(
    backend: str, tensors: tuple[Tensor, ...], tau_s: float, tau_t: float, form: str, reduction: str
) -> None:
    """Checks the loss and its gradients for q, k and the queue; and without gradients, by other kernels."""
    (rows, size), (c_s, c_t) = (len(t) for t in tensors[1:]), (1 / tau_s, 1 / tau_t)
    g = weights(tensors[0], rows) if reduction == "none" else weights(tensors[0])
    norm = float(g.norm())
    scales = [(c_s + c_t + log(size)) * rows**0.5, c_s * norm, c_t * norm, (c_s + c_t) * norm]

    def ours(q: Tensor, k: Tensor, queue: Tensor) -> list[Tensor]:
        how: Any = {"form": form, "reduction": reduction, "backend": backend}
        how |= {"student_temperature": tau_s, "teacher_temperature": tau_t}
        loss: Any = relation_loss(q, k, queue, **how)
        return [loss]

    def formula(q: Tensor, k: Tensor, queue: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return [reduced(reference.relation(q, k, queue, tau_s, tau_t, form, dtype)[0], reduction)]

    check_budget(ours, formula, tensors, [g], scales)
    q, k, queue = (t.double() for t in tensors)
    (loss,), (expected,) = ours(*tensors), formula(q, k, queue, torch.float64)
    if not (loss - expected).norm() <= 2 * FLOOR[tensors[0].dtype] * expected.norm().clamp(min=scales[0]):
        raise Refused("wrong without a gradient")


def check_info_nce(backend: str, tensors: tuple[Tensor, ...], tau: float) -> None:
    """Checks the mean loss and its gradients for q, k and the queue."""
    c, g = 1 / tau, weights(tensors[0])
    norm = float(g.norm())
    check_budget(
        lambda q, k, queue: [info_nce(q, k, queue, temperature=tau, backend=backend)],
        lambda q, k, queue, dtype: [reference.info_nce(q, k, queue, tau, dtype).mean()],
        tensors, [g], [2 * c + log(len(tensors[2]) + 1), c * norm, c * norm, c * norm],
    )  # fmt: skip


def check_logsumexp(backend: str, tensors: tuple[Tensor, ...], tau: float) -> None:
    """Checks lse and mean with excluded rows, and their gradients for x and the queue."""
    (rows, dim), size, c = tensors[0].shape, len(tensors[1]), 1 / tau
    of_rows, of_queue = (torch.arange(n, device=tensors[0].device) for n in (rows, size))
    g, g_mean = weights(tensors[0], rows), weights(tensors[0], rows, dim)
    norm = float(g.norm() + g_mean.norm())
    by_index, by_ids = (of_rows % size, None, None), (of_rows % 3, of_queue % 5, of_rows.new_tensor(size - 1))
    for exclude in (by_index, by_ids) if size > 5 else ((),):
        check_budget(
            lambda x, queue, exclude=exclude: dispatch.logsumexp(x, queue, tau, backend, exclude),
            lambda x, queue, dtype, exclude=exclude: reference.logsumexp(x, queue, tau, dtype, exclude),
            tensors, [g, g_mean], [(c + log(size)) * rows**0.5, rows**0.5, c * norm, (c + 1) * norm],
        )  # fmt: skip


def check_shape(backend: str, tensors: tuple[Tensor, ...]) -> float:
    """Returns the error of the rows' loss and gradient of q, at either end; checks the mean against them."""
    q, k, queue = tensors
    ends = torch.arange(len(q), device=q.device)
    ends = torch.cat((ends[:CHECKED], ends[CHECKED:][-CHECKED:]))
    c, root, one = 1 / STUDENT + 1 / TEACHER, len(ends) ** 0.5, torch.ones((), device=q.device)
    error, (rows, grads) = check_budget(
        lambda q: [relation_loss(q, k, queue, reduction="none", backend=backend)],
        lambda q, dtype: [reference.relation(q, k[ends], queue, STUDENT, TEACHER, "kl", dtype)[0]],
        (q,), [one.expand(len(q))], [(c + log(len(queue))) * root, root / STUDENT], ends,
    )  # fmt: skip
    mean, grad = with_gradients(lambda q: [relation_loss(q, k, queue, backend=backend)], (q,), [one])
    floor = FLOOR[q.dtype]
    for got, expected in ((mean, rows.mean()), (grad * len(q), grads)):
        if not (got - expected).norm() <= floor * expected.norm().clamp(min=floor):
            raise Refused("wrong: the mean loss is not that of the rows")
    return error


def weights(like: Tensor, *shape: int) -> Tensor:
    """Uneven positive and negative cotangents that every dtype holds exactly."""
    draw = torch.Generator(like.device).manual_seed(1)
    return torch.randn(shape, device=like.device, generator=draw).bfloat16().float()


# ------------------------------------------------------------------------------------------------ timing


def matrix_product(dtype: torch.dtype, device: str) -> tuple[Callable[[], Tensor], int]:
    """Returns a product that reaches the full rate, the yardstick, and its flop.

    On a CPU it is of float32, whatever the dtype: without instructions for 16 bits it would take seconds.
    """
    side = 768 if device == "cpu" else 8192 if dtype.itemsize == 2 else 4096
    a = torch.randn(side, side, device=device, dtype=torch.float32 if device == "cpu" else dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2 * side**3


def lap(run: Callable, device: str, calls: int = 1) -> Any:
    """Returns a time of so many calls that `seconds` reads: on a GPU nothing waits for them here."""
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) / calls
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    return start, stop


def seconds(laps: list) -> list[float]:
    if isinstance(laps[0], float):
        return laps
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in laps]


def figures(backend: str, baseline: str, device: str, dtype: torch.dtype, dim: int, shape: list) -> dict:
    """Seconds of the relation loss with its gradient of q, by the candidate and by the baseline in turn.

    Before each a large matrix product empties the caches, and on a GPU gives the host time to launch what is
    timed, so that launches do not count. Returns medians, the ratio to the baseline and its range, the part
    of the product's flop rate that 8 B K D flop make, and the bytes of memory that a call takes.
    """
    rows, size = shape
    q, k, queue = batch(max(1, rows // 2), size, dim, dtype, device)
    q.requires_grad_()

    def step(name: str) -> Callable:
        return lambda: torch.autograd.grad(relation_loss(q, k, queue, backend=name), q)

    between, flop = matrix_product(dtype, device)
    runs = {"own": step(backend), "baseline": step(baseline)}
    memory = peak_memory(runs["own"], device)
    first = {}
    for name, run in runs.items():
        run()
        (first[name],) = seconds([lap(run, device)])
    calls = {name: max(1, int(0.005 / took)) for name, took in first.items()}
    laps: dict[str, list] = {"between": [], "own": [], "baseline": []}
    until = time.perf_counter() + SECONDS
    while len(laps["own"]) < FEWEST or (time.perf_counter() < until and len(laps["own"]) < MOST):
        for name, run in runs.items():
            laps["between"].append(lap(between, device))
            laps[name].append(lap(run, device, calls[name]))
        if len(laps["own"]) == 2 and first["own"] > SLOW * first["baseline"]:
            break
    taken = {name: seconds(those) for name, those in laps.items()}
    ratios = [own / base for own, base in zip(taken["own"], taken["baseline"], strict=True)]
    own, rate = median(taken["own"]), flop / median(taken["between"])
    return {
        "seconds": own, "ratio": median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "matmul_rate": rate, "of_matmul": 8 * len(q) * size * dim / own / rate, "memory": memory,
    }  # fmt: skip


def peak_memory(run: Callable, device: str) -> int | None:
    """Returns the bytes that a call adds to memory; None where the system does not report them."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # What was freed would be used again uncounted.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # The high-water mark starts again from what is resident now.
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):  # not Linux, or not glibc
        run()
        return None


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


# --------------------------------------------------------------------------------------------- the process


def serve(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    task = json.loads(next(lines))
    backend, device, dim = task["backend"], task["device"], task["dim"]
    dtype = getattr(torch, task["dtype"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Others are verified at the same time.
    try:
        for name in task["import"]:
            importlib.import_module(name)
        errors = verify(backend, device, dtype, dim, task["shapes"])
    except Refused as reason:
        yield {"refused": str(reason)}
        return
    except Exception as error:
        yield {"refused": in_a_line(error)}
        return
    if device == "cuda":
        torch.cuda.empty_cache()  # Others are still at it.
    yield {"errors": errors}
    torch.set_num_threads(threads)
    for line in lines:
        wanted = json.loads(line)
        shape = task["shapes"][wanted["shape"]]
        try:
            yield figures(backend, wanted["baseline"], device, dtype, dim, shape)
        except Exception as error:
            yield {"refused": in_a_line(error)}


def in_a_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What the code prints must not stand among the answers.
    for answer in serve(iter(sys.stdin)):
        print(json.dumps(answer), file=out, flush=True)
