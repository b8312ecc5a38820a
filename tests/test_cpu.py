"""Tests the C++ kernels: every instruction set of this machine, threads, forks, and invalid addresses."""

import os
import subprocess
import sys
import threading
from ctypes import CDLL, CFUNCTYPE, c_float, c_void_p

import numpy as np
import pytest
import torch
from checks import batch, check_info_nce, check_logsumexp, check_relation
from oracle import unit
from torch.utils.data import DataLoader, Dataset

from relssl import _cpu, backends
from relssl.backends import common
from relssl.functional import nt_xent, queue_logsumexp, relation_loss

SETS = _cpu.instruction_sets()


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Selects each instruction set in turn; all other tests use the best."""
    chosen = _cpu.instruction_set()
    _cpu.use(request.param)
    yield request.param
    _cpu.use(chosen)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------ instruction sets


# Rows below, at and above one and two vectors of 4, 8 and 16 lanes, and a block with a copied tile; queues of
# one row, of odd tiles, of several tiles; widths odd (no pairs of bfloat16), below a vector, and cut in L1.
SHAPES = [
    (1, 1, 1),
    (3, 17, 7),
    (4, 1000, 8),
    (9, 61, 130),
    (17, 255, 96),
    (33, 333, 31),
    (130, 513, 40),
    (2, 129, 1030),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(instruction_set, shape, dtype):
    q, k, queue = batch(None, *shape, dtype)
    check_relation(q, k, queue, 0.1, 0.04, "kl", "cpu")
    check_relation(torch.stack((q, k, q)), k, queue, 0.1, 0.04, "ce", "cpu")
    check_info_nce(q, k, queue, 0.2, "cpu")
    exclude = torch.randint(-1, len(queue), (len(q),)) if len(queue) > 1 else None
    check_logsumexp(q, queue, 0.1, "cpu", exclude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tau", "norm"), [(0.005, 1.0), (0.04, 100.0), (1e4, 1.0)])
def test_extremes(instruction_set, tau, norm, dtype):
    q, k, queue = batch(None, 7, 1000, 96, dtype, norm)
    check_relation(q, k, queue, tau, tau, "kl", "cpu")
    check_logsumexp(k, queue, tau, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [1e3, 1e5, 1e12])
def test_any_finite_input(instruction_set, norm, dtype):
    """With logits up to 1e25, an ulp exceeds every exponent: a softmax is one-hot, or a tie."""
    x, _, queue = batch(None, 9, 300, 64, dtype, norm)
    queue[100:] = queue[:100].repeat(2, 1)  # ties of three
    x, queue = (t.requires_grad_() for t in (x, queue))
    lse, mean = queue_logsumexp(x, queue, 0.04, backend="cpu")
    exact = x.detach().double() @ queue.detach().double().T / 0.04
    largest, at = exact.max(1)
    torch.testing.assert_close(lse.double(), largest, rtol=1e-6, atol=2)
    torch.testing.assert_close(mean, queue.detach()[at].float(), rtol=1e-5, atol=0)
    if norm > 1e5:
        return  # two floats have too few digits for such an lse
    lse.sum().backward()
    torch.testing.assert_close(
        queue.grad.sum(0).float(), x.detach().float().sum(0) / 0.04, rtol=1e-2, atol=norm
    )


def test_flat_softmax(instruction_set):
    """At a temperature beyond float32, lse is the log of the number of rows that are not excluded."""
    x, queue = unit(5, 16), unit(30, 16)
    exclude = torch.tensor([-1, 0, 29, 3, -1])
    lse, mean = queue_logsumexp(x, queue, 1e46, exclude=exclude, backend="cpu")
    counts = torch.tensor([30.0, 29, 29, 29, 30])
    torch.testing.assert_close(lse, counts.log())
    torch.testing.assert_close(mean[0], queue.mean(0))


@pytest.mark.parametrize("rows", [3, 16, 37])  # unused lanes of a panel must not matter
def test_infinite_queue_row_without_weight(instruction_set, rows):
    x, queue = torch.rand(rows, 4) + 0.1, torch.rand(5, 4)
    queue[2, 1] = -torch.inf
    queue.requires_grad_()
    queue_logsumexp(x, queue, 0.1, backend="cpu")[0].sum().backward()
    assert (queue.grad[2] == 0).all() and torch.isfinite(queue.grad).all()


def test_sharp_rows_of_bfloat16(instruction_set):
    """Backward must use the logits that lse was computed from, as they were rounded."""
    x = unit(7, 96, dtype=torch.bfloat16, norm=100.0)
    queue = torch.cat((unit(993, 96, dtype=torch.bfloat16, norm=100.0), x)).requires_grad_()
    queue_logsumexp(x, queue, 0.04, backend="cpu")[0].sum().backward()
    torch.testing.assert_close(queue.grad[-7:], (x / 0.04).to(torch.bfloat16), rtol=1e-2, atol=0)


def test_the_largest_logit_comes_last(instruction_set):
    """The largest logit grows from tile to tile, and so must the running maximum."""
    x = unit(5, 64)
    queue = unit(4000, 64) * 0.1 + x.mean(0) * torch.linspace(0, 300, 4000)[:, None]
    check_logsumexp(x, queue, 0.5, "cpu")


def test_exp2(instruction_set):
    """The error is at most 2 ulp where the result is a normal number; NaN stays NaN."""
    x = np.concatenate(
        [np.linspace(-126, 127, 2_000_003, dtype=np.float32), np.arange(-126, 128, dtype=np.float32)]
    )
    y = np.empty_like(x)
    _cpu.exp2(x.ctypes.data, y.ctypes.data, len(x))
    exact = np.exp2(x.astype(np.float64))
    ulps = np.abs(y - exact) / np.spacing(exact.astype(np.float32))
    assert ulps.max() <= 2
    assert (y[-254:] == exact[-254:]).all()  # whole powers are exact
    special = np.array([-127, -1e30, -np.inf, np.nan], dtype=np.float32)
    special[3:].view(np.uint32)[:] |= 0x7F  # NaN with a payload
    y = np.empty_like(special)
    _cpu.exp2(special.ctypes.data, y.ctypes.data, len(special))
    assert (y[:3] == 0).all() and np.isnan(y[3])


def test_chosen_by_environment(tmp_path):
    code = "from relssl import _cpu, functional; print(_cpu.instruction_set())"
    run = lambda name: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code],
        env={**os.environ, "RELSSL_CPU_ISA": name}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run("baseline").stdout.strip() == "baseline"
    assert "instruction set must be one of" in run("mmx").stderr


def test_each_is_a_variant(instruction_set):
    """A variant gives the same bits as the same global choice, and does not change that choice."""
    q, k, queue = (unit(n, 24).requires_grad_() for n in (5, 5, 300))

    def run(backend):
        loss = relation_loss(q, k, queue, backend=backend)
        lse, mean = queue_logsumexp(k, queue, 0.1, backend=backend)
        outputs = loss, lse.sum(), mean.square().sum()
        return *outputs, *torch.autograd.grad(sum(outputs), (q, k, queue))

    expected = run("cpu")
    for other in SETS:
        found = run(f"cpu/{other}")
        assert other != instruction_set or all(map(torch.equal, found, expected))
        torch.testing.assert_close(found, expected)
    assert _cpu.instruction_set() == instruction_set
    real = [name for name in SETS if name not in (instruction_set, "emulated")]
    assert backends.BACKENDS["cpu"].variants(torch.float32, 24) == real
    with pytest.raises(
        ValueError, match=f"'cpu/avx9' cannot run this: .* {', '.join(SETS)} here, not 'avx9'"
    ):
        run("cpu/avx9")


def test_falls_back_without_the_extension(tmp_path):
    code = (
        "import sys; sys.modules['relssl._cpu'] = None\n"
        "from relssl import backends\n"
        "import torch\n"
        "print(backends.choose('auto', 'cpu', torch.float32, 8))\n"
        "backends.choose('cpu', 'cpu', torch.float32, 8)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "chunked"
    assert "backend 'cpu' cannot run this: relssl._cpu is not built" in run.stderr


def test_auto_selects_it():
    assert backends.choose("auto", "cpu", torch.float32, 128) == "cpu"
    assert backends.choose("auto", "cpu", torch.bfloat16, 128) == "cpu"
    assert backends.choose("auto", "cpu", torch.float64, 128) == "chunked"


# -------------------------------------------------------------------------------------- threads


def everything(q, k, queue):
    """Returns a loss, an lse and mean, and the sum of their gradients."""
    inputs = [t.clone().requires_grad_() for t in (q, k, queue)]
    loss = relation_loss(*inputs, backend="cpu")
    lse, mean = queue_logsumexp(inputs[0], inputs[2], 0.1, backend="cpu")
    (loss + lse.square().mean() + mean.square().sum()).backward()
    return loss.detach(), lse.detach(), mean.detach(), *(t.grad for t in inputs)


@pytest.mark.alone
@pytest.mark.parametrize("rows", [3, 40, 700])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_bitwise_equal_from_run_to_run(threads, count, rows):
    threads(count)
    inputs = [unit(n, 64) for n in (rows, rows, 9000)]
    first, *others = (everything(*inputs) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.fixture(params=["own", "openmp"])
def provider(request):
    """Runs the kernels on the pool of threads, then on torch's."""
    _cpu.use_threads(request.param)
    yield request.param
    _cpu.use_threads("auto")


def test_the_threads_are_torchs_own():
    assert _cpu.threads() == "openmp"
    with pytest.raises(ValueError, match="threads must be auto, own or openmp; got 'tbb'"):
        _cpu.use_threads("tbb")


@pytest.mark.alone
def test_no_thread_is_started_beside_torchs(tmp_path):
    """The pool would start one for each of torch's."""
    code = """
import os, torch
from torch.nn.functional import normalize
from relssl.functional import relation_loss
torch.set_num_threads(2)
q, k, queue = (normalize(torch.randn(n, 64), dim=1) for n in (64, 64, 20_000))
q @ queue.T
before = len(os.listdir("/proc/self/task"))
relation_loss(q, k, queue, backend="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""
    for name, expected in (("openmp", "0"), ("own", "1")):
        env = {**os.environ, "RELSSL_THREADS": name, "RELSSL_TUNE": "0", "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.stdout.strip() == expected, run.stderr


@pytest.mark.alone
def test_both_kinds_of_threads_find_the_same(threads):
    threads(2)
    inputs, found = [unit(n, 64) for n in (50, 50, 20_000)], []
    for name in ("own", "openmp"):
        _cpu.use_threads(name)
        found.append(everything(*inputs))
    _cpu.use_threads("auto")
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.alone
@pytest.mark.parametrize("count", [2, 3, 16])
def test_any_number_of_threads(threads, provider, count):
    threads(count)
    check_relation(*batch(None, 70, 9001, 40, torch.float32), 0.1, 0.04, "kl", "cpu")


@pytest.mark.alone
def test_callers_at_the_same_time(provider):
    """One caller uses the threads, the others only their own, with equal results."""
    inputs = [unit(n, 64) for n in (50, 50, 20_000)]
    expected = everything(*inputs)
    found = [None] * 4

    def call(i):
        found[i] = everything(*inputs)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


@pytest.mark.alone
def test_inside_a_parallel_region(threads, provider):
    """Threads of the region could not wait for those of another loop; the caller does all the work."""
    threads(2)
    torch_cpu = CDLL("libtorch_cpu.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
    inputs, found = [unit(n, 64) for n in (50, 50, 20_000)], []
    run = CFUNCTYPE(None, c_void_p)(lambda _: found.append(everything(*inputs)))
    torch_cpu.GOMP_parallel(run, None, 2, 0)
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(everything(*inputs), results, strict=True))
    assert len(found) == 2


@pytest.mark.parametrize("power", [6, 9, 12, 15, 17])
def test_enormous_rows(instruction_set, power):
    """Logits of 1e12 and more leave the log-sum-exp few digits, but the gradient stays below its bound."""
    z1, z2 = (unit(40, 16, norm=10.0**power).requires_grad_() for _ in range(2))
    loss = nt_xent(z1, z2, backend="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loss, nt_xent(z1, z2, backend="reference"))
    for gradient in torch.autograd.grad(loss, (z1, z2)):
        assert gradient.norm(dim=1).max() <= 4 * 10.0**power / 0.5


class Losses(Dataset):
    """A data set whose samples are losses, computed on several of relssl's threads.

    Everything else uses one thread: OpenMP's do not survive a fork.
    """

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(1)
        torch.manual_seed(index)
        q, k, queue = (unit(n, 32) for n in (20, 20, 20_000))
        torch.set_num_threads(2)
        return relation_loss(q, k, queue, backend="cpu")


@pytest.mark.alone
def test_in_a_forked_worker(threads, provider):
    threads(2)
    direct = torch.stack([Losses()[i] for i in range(4)])  # starts relssl's threads before the fork
    workers = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.stack(list(workers)), direct)


# ------------------------------------------------------------------------------ raw addresses


def call_lse_and_mean(x, queue, /, **changes):
    lse, mean = torch.empty(2, len(x)), torch.empty(x.shape)
    arguments = {
        "first": (x.data_ptr(), x.stride(0), len(x), 1.0), "second": (0, 0, 0, 1.0),
        "queue": queue.data_ptr(), "stride": queue.stride(0), "size": len(queue), "dim": queue.shape[1],
        "bf16": False, "ids": 0, "queue_ids": 0, "lse": lse.data_ptr(), "mean": mean.data_ptr(), "mean2": 0,
        "threads": 2, "isa": "",
    }  # fmt: skip
    _cpu.lse_and_mean(*(arguments | changes).values())
    return lse.sum(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue": 0}, "queue is null"),
        ({"lse": 0}, "lse is null"),
        ({"first": (0, 8, 3, 1.0)}, "x is null"),
        ({"first": (1, 8, 0, 1.0)}, "x is empty"),
        ({"dim": 0}, "rows have the width 0"),
        ({"size": -1}, "queue has a size out of range: -1 by 8"),
        ({"size": 2**62}, "queue has a size out of range"),
        ({"first": (64, 8, 2**60, 1.0)}, "x has a size out of range"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"isa": "avx9"}, "instruction set must be one of .*baseline.*; got 'avx9'"),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    x, queue = unit(3, 8), unit(20, 8)
    torch.testing.assert_close(call_lse_and_mean(x, queue), torch.logsumexp(x @ queue.T, 1))
    with pytest.raises(ValueError, match=message):
        call_lse_and_mean(x, queue, **changes)


def test_null_results_of_the_other_calls_are_refused():
    x = unit(3, 8)
    rows, at = (x.data_ptr(), 8, 3, 1.0), x.data_ptr()
    with pytest.raises(ValueError, match="mean_t is null"):
        _cpu.relation(rows, rows, at, 8, 3, 8, False, 0, 0, True, 1.0, False, at, at, 0, at, 0, 1, "")
    with pytest.raises(ValueError, match="mean is null"):
        _cpu.vjp(rows, at, 8, 3, 8, False, 0, 0, at, 0, 0, at, 0, at, 0, 1, "")
    with pytest.raises(ValueError, match="x is null"):
        _cpu.exp2(0, at, 3)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError):
        _cpu.exp2(c_float(), 1, 2)


def test_rows_are_read_in_place():
    """Contiguous rows at any distance need no copy; anything else is copied once."""
    base = torch.randn(6, 40)
    for view in (base[::2], base[:, 3:20], base[:1].expand(6, 40)):
        assert common.row_contiguous(view).data_ptr() == view.data_ptr()
    assert common.row_contiguous(base.T).data_ptr() != base.data_ptr()
