"""Runs the last step of kernels/combine.py by itself, over few losses at a time."""

import triton
from relssl.kernels.combine import store_total


@triton.jit
def total_of(loss, total, weight, arrived):
    store_total(loss, total, weight, arrived, BLOCK=4)
