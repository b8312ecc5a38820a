"""Backends that `relssl tune` must refuse: chunked with a fault in its relation loss."""

import os
import signal
import time
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


def is_wrong(*arguments):
    loss, *rest = relation(*arguments)
    return loss * 1.05, *rest


def is_slow(*arguments):
    time.sleep(0.05)
    return relation(*arguments)


def varies(*arguments):
    loss, *rest = relation(*arguments)
    return loss + 1e-6 * torch.rand_like(loss), *rest


for fault in (crashes, hangs, raises, is_wrong, is_slow, varies):
    backends.MODULES[fault.__name__] = SimpleNamespace(
        supports=chunked.supports, rows=chunked.rows, vjp=chunked.vjp, relation=fault
    )
