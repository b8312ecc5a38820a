"""Backends that `relssl tune` must refuse: chunked with a fault in its relation loss."""

import os
import signal
import sys
import time
from threading import Thread
from types import SimpleNamespace

import torch

from relssl import backends
from relssl.backends import chunked

relation = chunked.relation


def crashes(*arguments):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(*arguments):
    time.sleep(1000)


def raises(*arguments):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nwith more lines")


def stays(*arguments):
    """Ends, and does not: a thread goes on."""
    Thread(target=time.sleep, args=(1000,)).start()
    sys.exit()


def is_wrong_in_the_mean(q, k, queue, scale, form, weight, want_grad):
    loss, entropy, grad_q, *rest = relation(q, k, queue, scale, form, weight, want_grad)
    return (loss if weight is None else 2 * loss), entropy, grad_q, *rest


def is_wrong(*arguments):
    loss, *rest = relation(*arguments)
    return loss * 1.05, *rest


def is_slow(*arguments):
    time.sleep(0.05)
    return relation(*arguments)


def varies(*arguments):
    loss, *rest = relation(*arguments)
    return loss + 1e-6 * torch.rand_like(loss), *rest


for fault in (crashes, hangs, stays, raises, is_wrong, is_wrong_in_the_mean, is_slow, varies):
    backends.MODULES[fault.__name__] = SimpleNamespace(
        supports=chunked.supports, rows=chunked.rows, vjp=chunked.vjp, relation=fault
    )
