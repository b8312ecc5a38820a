"""Host cost: what one small relation loss takes, forward and backward, against eager code.

    python bench/host.py        B = 8, K = 64, D = 32 on the CPU, where the work itself is nothing

Both sides run in turn, five calls at a time; the ratio is the median over the turns, with its quartiles.
"""

from statistics import median, quantiles
from time import perf_counter

import eager
import torch
from torch.nn import functional as F

from relssl.functional import relation_loss


def measure(rounds: int = 400, calls: int = 5) -> dict[str, list[float]]:
    """Seconds per call of each side, a value a round."""
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (F.normalize(torch.randn(n, 32, generator=generator), dim=1) for n in (8, 8, 64))
    columns = queue.T.contiguous()
    q.requires_grad_()
    runs = {
        "eager": lambda: eager.relation_loss(q, k, columns).backward(),
        "relssl": lambda: relation_loss(q, k, queue, form="ce").backward(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = perf_counter()
            for _ in range(calls):
                q.grad = None
                run()
            seconds[name].append((perf_counter() - began) / calls)
    return {name: times[rounds // 10 :] for name, times in seconds.items()}


if __name__ == "__main__":
    seconds = measure()
    for name, times in seconds.items():
        print(f"{name:<8}{1e6 * median(times):>8.0f} us")
    ratios = [r / e for e, r in zip(seconds["eager"], seconds["relssl"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    print(f"relssl takes {median(ratios):.2f} times as long as eager (quartiles {low:.2f} to {high:.2f})")
