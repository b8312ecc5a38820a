"""Does a module of emulated kernels agree with the formulas? A process holds but one of a name, hence this.

    python emulated_worker.py MODULE CAPABILITY WIDTH

Prints "agrees", or "caught" and what went wrong under one of the schedules.
"""

import sys

import emulated
import torch
from torch.nn import functional as F

from relssl.functional import queue_logsumexp, relation_loss

file, path, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module = emulated.load(file)
cuda = emulated.install(module, setattr, path, processors=1)  # one split: more tiles than are in flight
torch.set_num_threads(1)
torch.manual_seed(0)


def results(dtype):
    """Pairs of what should be equal. Queue rows grow, so that the maximum moves."""
    x = F.normalize(torch.randn(20, width), dim=1).to(dtype)
    queue = (F.normalize(torch.randn(700, width), dim=1) * torch.linspace(1, 3, 700)[:, None]).to(dtype)
    teacher = x.double() @ queue.double().T / 0.1
    student = teacher.flip(0).log_softmax(1)
    lse, mean = queue_logsumexp(x, queue, 0.1, backend="cuda")
    yield lse, teacher.logsumexp(1)
    yield mean, teacher.softmax(1) @ queue.double()
    how = {"student_temperature": 0.1, "teacher_temperature": 0.1, "reduction": "none"}
    loss = relation_loss(x.flip(0), x, queue, backend="cuda", **how)  # of which the student has no mean
    yield loss, (teacher.softmax(1) * (teacher.log_softmax(1) - student)).sum(1)
    if dtype == torch.bfloat16:  # else a running maximum would mend what the first sweep got wrong
        stats, _ = cuda.forward(x, x[:0], queue, cuda.kernel_scales([10.0, 10.0]), None, True)
        yield stats[0], torch.zeros(())


for seed in range(8):
    module.seed(seed)
    for dtype in torch.bfloat16, torch.float16:
        try:
            off = max(float((got - want).abs().max().nan_to_num(1e9)) for got, want in results(dtype))
        except RuntimeError as error:
            sys.exit(print(f"caught under seed {seed}:", error))
        if off > 5e-2:
            sys.exit(print(f"caught under seed {seed}: off by", off))
print("agrees")
