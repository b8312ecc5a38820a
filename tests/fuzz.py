"""Compares random calls of the losses with the oracle: `make fuzz`, not part of the suite.

    python tests/fuzz.py [--backend cpu] [--calls 10000] [--seed 0]

Every call has its own seed, which is printed if it fails; `--calls 1 --seed THAT` repeats it. Shapes,
strides, temperatures, norms and dtype are drawn; on the C++ backend instruction set and threads, and one call
in ten is given a bad argument and must raise a Python exception; of the CUDA kernels, which are emulated, the
kernel, the processors and the schedule.
"""

import argparse
import random
import sys
from time import perf_counter

import checks
import emulated
import torch
from checks import (
    Excluded,
    batch,
    check_clusters,
    check_info_nce,
    check_logsumexp,
    check_nt_xent,
    check_relation,
)
from oracle import unit

from relssl import _cpu
from relssl.functional import queue_logsumexp, relation_loss


def log_uniform(low, high):
    return low * (high / low) ** random.random()


def strided(t):
    """Returns the same values at other strides."""
    layout = random.randrange(4)
    if layout == 0:
        return t
    if layout == 1 and t.dim() > 1:
        return t.mT.contiguous().mT
    junk = torch.nan if t.is_floating_point() else -1
    larger = t.new_full([n + random.randrange(3) for n in t.shape], junk)
    view = larger[tuple(slice(0, n) for n in t.shape)]
    if layout == 2:
        larger = t.new_full([2 * n for n in t.shape], junk)
        view = larger[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def good():
    dtype = random.choice([torch.float32, torch.bfloat16])
    rows, dim = round(log_uniform(1, 200)), round(log_uniform(1, 300))
    size = max(1, round(log_uniform(1, min(20_000, 2e6 / (rows * dim)) + 1)))
    views = random.choice([None, None, 1, 3])
    taus = log_uniform(0.005, 10), log_uniform(0.005, 10)
    check(batch(views, rows, size, dim, dtype, log_uniform(0.01, 1e4)), taus, "cpu")


def good_cuda(module, seed):
    module.seed(seed)
    emulated.install(module, setattr, random.choice([80, 90]), processors=random.choice([1, 2, 3, 7]))
    dtype, dim = random.choice([torch.bfloat16, torch.float16]), random.choice(emulated.WIDTHS)
    rows, size = random.randint(1, 140), random.randint(1, 700)
    most = 100 if dtype == torch.bfloat16 else 3  # larger gradients overflow float16
    inputs = batch(random.choice([None, 1, 3]), rows, size, dim, dtype, log_uniform(0.01, most))
    check(inputs, (log_uniform(0.005, 10), log_uniform(0.005, 10)), "cuda")


def check(inputs, taus, backend):
    q, k, queue = inputs = [strided(t) for t in inputs]
    what, how = random.randrange(6), {"drawn": True}
    if random.random() < 0.4:
        of, size, factor = round(log_uniform(1, 1000)), len(queue), 3 ** random.randrange(35)
        ids = (strided(torch.randint(-1, of, (n,)) * factor) for n in (len(k), size))
        how["excluded"] = Excluded(backend, *ids, random.choice([None, None, random.randint(0, size)]))
    if what < 2:
        check_relation(*inputs, *taus, ("kl", "ce")[what], backend, **how)
    elif what == 2:
        check_info_nce(*inputs, taus[0], backend, **how)
    elif what == 3:
        reduction = random.choice(["mean", "sum", "none"])
        negatives = queue if "excluded" in how else random.choice([None, queue])
        check_nt_xent(q if q.dim() == 2 else q[0], k, negatives, taus[0], backend, reduction, **how)
    elif what == 4:
        shares = ((3 * torch.randn(k.shape)).softmax(1).clamp_min(1e-6) for _ in range(2))  # None is empty.
        p1, p2 = (strided(p.to(k.dtype)) for p in shares)
        check_clusters(p1, p2, taus[0], random.random() < 0.5, backend, drawn=True)
    elif all(how["excluded"].rows if "excluded" in how else [True]):  # An infinite lse cannot be compared.
        some = len(queue) > 1 and "excluded" not in how and random.random() < 0.5
        exclude = torch.randint(-1, len(queue), (len(k),)) if some else None
        check_logsumexp(k, queue, taus[0], backend, exclude, **how)


def bad():
    rows, size, dim = (random.randint(1, 9) for _ in range(3))
    q, k, queue = unit(rows, dim), unit(rows, dim), unit(size, dim)
    wrong = [
        lambda: relation_loss(q[:0], k[:0], queue, backend="cpu"),
        lambda: relation_loss(q, k, queue[:0], backend="cpu"),
        lambda: relation_loss(q, unit(rows, dim + 1), queue, backend="cpu"),
        lambda: relation_loss(q, k, unit(size, dim + 1), backend="cpu"),
        lambda: relation_loss(q.double(), k.double(), queue.double(), backend="cpu"),
        lambda: relation_loss(q.int(), k, queue, backend="cpu"),
        lambda: relation_loss(q, k, queue, student_temperature=-random.random(), backend="cpu"),
        lambda: relation_loss(q, k, queue, teacher_temperature=torch.tensor(torch.nan), backend="cpu"),
        lambda: relation_loss(q[0], k, queue, backend="cpu"),
        lambda: relation_loss(q, None, queue, backend="cpu"),
        lambda: queue_logsumexp(q, queue, 0.1, exclude=torch.full((rows,), size), backend="cpu"),
        lambda: queue_logsumexp(q, queue, 0.1, exclude=torch.zeros(rows + 1, dtype=int), backend="cpu"),
        lambda: queue_logsumexp(q.to("meta"), queue, 0.1, backend="cpu"),
        lambda: _cpu.lse_and_mean(
            (0, dim, rows, 1.0), (0, 0, 0, 1.0), 0, dim, size, dim, False, 0, 0, 0, 0, 0, 1, ""
        ),
        lambda: _cpu.exp2(64, 64, -random.randint(1, 2**62)),
    ]
    call = random.choice(wrong)
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        if not str(error):
            raise AssertionError("an error without a message") from error
    else:
        raise AssertionError("a bad argument went through")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    checks.EMULATED = settings.backend == "cuda"
    module = emulated.load(emulated.build()) if checks.EMULATED else None
    began, failed = perf_counter(), 0
    for seed in range(settings.seed, settings.seed + settings.calls):
        random.seed(seed)
        torch.manual_seed(seed)
        _cpu.use(random.choice(_cpu.instruction_sets()))
        torch.set_num_threads(random.choice([1, 1, 1, 2, 3]))
        try:
            if module:
                good_cuda(module, seed)
            else:
                bad() if random.random() < 0.1 else good()
        except Exception as error:
            failed += 1
            where = "" if module else f", {_cpu.instruction_set()}"
            print(f"seed {seed}{where}: {type(error).__name__}: {error}", flush=True)
        if (seed + 1) % 1000 == 0:
            print(f"{seed + 1 - settings.seed} calls, {perf_counter() - began:.0f} s", flush=True)
    print(f"{settings.calls} calls, {failed} failed, {perf_counter() - began:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
