"""Backends that `relssl tune` must refuse: chunked with a fault."""

import os
import signal
import sys
import time
from threading import Thread

import torch

from relssl import backends
from relssl.backends.chunked import Chunked


class Crashes(Chunked):
    def relation(self, *arguments):
        os.kill(os.getpid(), signal.SIGSEGV)


class Hangs(Chunked):
    def relation(self, *arguments):
        time.sleep(1000)


class Raises(Chunked):
    def relation(self, *arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nwith more lines")


class Stays(Chunked):
    """Ends, but leaves a thread that goes on."""

    def relation(self, *arguments):
        Thread(target=time.sleep, args=(1000,)).start()
        sys.exit()


class IsWrongInTheMean(Chunked):
    def relation(self, q, k, queue, scale, form, weight, *others):
        loss, *rest = super().relation(q, k, queue, scale, form, weight, *others)
        return (loss if weight is None else 2 * loss), *rest


class IgnoresIds(Chunked):
    def lse_and_mean(self, x, queue, scale, num_first, exclude, want_mean):
        by_index = exclude if exclude is None or exclude.queue_ids is None else None
        return super().lse_and_mean(x, queue, scale, num_first, by_index, want_mean)


class IsWrong(Chunked):
    def relation(self, *arguments):
        loss, *rest = super().relation(*arguments)
        return loss * 1.05, *rest


class IsSlow(Chunked):
    def relation(self, *arguments):
        time.sleep(0.05)
        return super().relation(*arguments)


class Varies(Chunked):
    def relation(self, *arguments):
        loss, *rest = super().relation(*arguments)
        return loss + 1e-6 * torch.rand_like(loss), *rest


backends.BACKENDS |= {
    "crashes": Crashes(),
    "hangs": Hangs(),
    "stays": Stays(),
    "raises": Raises(),
    "is_wrong": IsWrong(),
    "is_wrong_in_the_mean": IsWrongInTheMean(),
    "ignores_ids": IgnoresIds(),
    "is_slow": IsSlow(),
    "varies": Varies(),
}
