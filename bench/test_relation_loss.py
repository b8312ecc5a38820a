"""The relation loss on the CPU, forward and backward: relssl's kernel against everything else.

pytest bench/       the table in the end has a row for each shape
"""

import pytest
import torch
from interleave import interleave, ratio
from peers import peers
from torch.nn import functional as F

from relssl import _cpu

# B, K, D, rounds. The yardstick; ReSSL's on ImageNet per GPU; a small and a large one; few rows.
SHAPES = [
    (256, 65_536, 128, 15),
    (32, 131_072, 512, 5),
    (64, 16_384, 128, 21),
    (1024, 65_536, 256, 3),
    (4, 65_536, 128, 15),
]


def inputs(rows: int, size: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Unit-norm queries that want a gradient, keys near them, and a queue."""
    torch.manual_seed(0)
    q = F.normalize(torch.randn(rows, dim), dim=1)
    k = F.normalize(q + 0.5 * torch.randn(rows, dim) / dim**0.5, dim=1)
    queue = F.normalize(torch.randn(size, dim), dim=1)
    return q.to(dtype).requires_grad_(), k.to(dtype), queue.to(dtype)


def gradient(loss, q, k, queue) -> tuple[float, torch.Tensor]:
    value = loss(q, k, queue)
    (grad,) = torch.autograd.grad(value, q)
    return value.item(), grad


def check(losses: dict, q, k, queue) -> None:
    """Nobody wins by being wrong: every peer against float64, on the first rows of the batch."""
    few = q[:4].detach().requires_grad_()
    exact = few.detach().double().requires_grad_()
    wide = queue.double().T
    target = (k[:4].double() @ wide / 0.04).softmax(1)
    expected = -(target * (exact @ wide / 0.1).log_softmax(1)).sum(1).mean()
    expected.backward()
    tolerance = 1e-4 if q.dtype == torch.float32 else 0.1
    for name, loss in losses.items():
        value, grad = gradient(loss, few, k[:4], queue)
        assert abs(value - expected) <= tolerance * expected, name
        assert (grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm(), name


# In bfloat16 once: eager code takes some 20 s a call where the CPU has no instructions for it.
CASES = [(*shape, torch.float32) for shape in SHAPES] + [(256, 65_536, 128, 3, torch.bfloat16)]


@pytest.mark.parametrize(("rows", "size", "dim", "rounds", "dtype"), CASES)
def test_forward_and_backward(rows, size, dim, rounds, dtype, table):
    q, k, queue = inputs(rows, size, dim, dtype)
    losses = peers(queue, rows)
    if dtype == torch.bfloat16:
        del losses["torch.compile"]  # which leaves the products, and so the time, as they are
    check(losses, q, k, queue)
    runs = {n: (lambda loss=loss: gradient(loss, q, k, queue)) for n, loss in losses.items()}
    if dtype == torch.bfloat16:  # against our own float32
        wide = inputs(rows, size, dim, torch.float32)
        runs["cpu float32"] = lambda: gradient(losses["cpu"], *wide)
    # The matrix product and the multiply-adds that say what the machine could do, in the same rounds.
    a, out = torch.randn(2, 2048, 2048), torch.empty(2048, 2048)
    threads = torch.get_num_threads()
    runs |= {
        "torch.mm": lambda: torch.mm(*a, out=out),
        "multiply-adds": lambda: _cpu.peak(20_000_000, threads),
    }
    seconds = interleave(runs, rounds)
    flop = {
        "cpu": 8 * rows * size * dim,
        "torch.mm": 2 * 2048**3,
        "multiply-adds": _cpu.peak(20_000_000, threads),
    }
    rates = {n: [flop[n] / s for s in seconds[n]] for n in flop}
    table.add(
        f"B {rows}, K {size:,}, D {dim}, {str(dtype).removeprefix('torch.')}",
        seconds["cpu"],
        {n: ratio(t, seconds["cpu"]) for n, t in seconds.items() if n not in flop},
        {n: ratio(rates["cpu"], r) for n, r in rates.items() if n != "cpu"},
    )
