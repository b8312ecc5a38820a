"""Tiles for each chip, width and dtype.

The tables hold what Triton 3.5 to 3.8 compiles without spilling registers (docs/kernels.md); the choice
among the tiles that do is not measured yet.
"""

from typing import NamedTuple

INTERPRETER, AMD = 0, 1  # in place of a capability


class Chip(NamedTuple):
    capability: int  # 10 * major + minor, or one of the names above
    processors: int  # streaming multiprocessors
    triton: tuple[int, int] = (3, 7)  # the version that compiles for it; see BY_TRITON_VERSION


WHOLE = 1 << 30


class Tiles(NamedTuple):
    block_m: int  # rows of x
    block_n: int  # rows of the queue
    warps: int
    stages: int  # queue tiles in flight
    # Columns that similarities are summed over at a time; see common.product. The same forward and backward,
    # where p = exp(logit - lse) must be of the logits that lse was of.
    chunk: int = WHOLE
    tma: bool = False  # whether TMA may load the queue (Hopper and later; forward passes)
    specialised: bool = False  # whether the kernel is specialised.py's (Hopper and later; forward passes)


INTERPRETED = Tiles(64, 256, 4, 1)

# Tiles by width, for up to so many columns: float32's, and those of each family of chips for 16-bit rows. In
# the backward pass float16's products are of float32; where that takes other tiles, it has a line of its own.
Table = dict[str, dict[int, Tiles]]

FORWARD: Table = {
    "sm_90": {
        64: Tiles(128, 128, 8, 3, tma=True),
        128: Tiles(128, 128, 8, 3, tma=True),
        256: Tiles(128, 64, 8, 3, tma=True),
        512: Tiles(64, 64, 8, 2, tma=True),
        1024: Tiles(32, 16, 8, 2, tma=True),
    },
    "sm_80": {
        64: Tiles(128, 128, 8, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 64, 8, 3),
        512: Tiles(64, 32, 8, 2),
        1024: Tiles(32, 16, 8, 2),
    },
    "small": {
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 32, 8, 3),
        256: Tiles(64, 32, 8, 3),
        512: Tiles(32, 32, 8, 2),
        1024: Tiles(32, 16, 8, 2, 64),
    },
    "amd": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(128, 32, 8, 2),
        256: Tiles(64, 32, 8, 1),
        512: Tiles(32, 16, 8, 1),
        1024: Tiles(16, 16, 8, 1, 64),
    },
    "fp32": {
        64: Tiles(32, 64, 8, 2),
        128: Tiles(32, 32, 8, 2, 32),
        256: Tiles(16, 32, 8, 2, 64),
        512: Tiles(16, 32, 8, 2, 64),
        1024: Tiles(16, 16, 8, 1, 32),
    },
}

BACKWARD: Table = {
    "sm_90": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(128, 64, 8, 2),
        256: Tiles(128, 32, 8, 2),
        512: Tiles(32, 32, 8, 2),
        1024: Tiles(16, 16, 8, 2),
    },
    "sm_90 fp16": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(128, 32, 8, 2),
        256: Tiles(64, 32, 8, 2),
        512: Tiles(32, 32, 8, 2),
        1024: Tiles(16, 16, 8, 2),
    },
    "sm_80": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 64, 8, 2),
        512: Tiles(32, 32, 8, 2),
        1024: Tiles(16, 16, 8, 2),
    },
    "small": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(16, 16, 8, 2),
        1024: Tiles(16, 16, 8, 1, 64),
    },
    "amd": {
        64: Tiles(64, 64, 8, 2),
        128: Tiles(64, 32, 8, 2),
        256: Tiles(32, 32, 8, 1),
        512: Tiles(16, 16, 8, 1),
        1024: Tiles(16, 16, 8, 1, 64),
    },
    "fp32": {
        64: Tiles(32, 32, 8, 2),
        128: Tiles(16, 32, 8, 2, 32),
        256: Tiles(16, 32, 8, 2, 64),
        512: Tiles(16, 16, 8, 2, 64),
        1024: Tiles(16, 16, 8, 1, 32),
    },
}

BACKWARD_QUEUE: Table = {
    "sm_90": {
        64: Tiles(64, 64, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 64, 8, 2),
        512: Tiles(16, 32, 8, 2),
        1024: Tiles(16, 16, 8, 1),
    },
    "sm_90 fp16": {
        64: Tiles(64, 64, 8, 2),
        128: Tiles(64, 16, 8, 2),
        256: Tiles(16, 32, 8, 2),
        512: Tiles(16, 32, 8, 1),
        1024: Tiles(16, 16, 8, 1),
    },
    "sm_80": {
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 64, 8, 2),
        256: Tiles(16, 32, 8, 2),
        512: Tiles(16, 16, 8, 2),
        1024: Tiles(16, 16, 8, 1),
    },
    "small": {
        64: Tiles(64, 32, 8, 1),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(16, 32, 8, 2),
        512: Tiles(16, 16, 8, 1),
        1024: Tiles(16, 16, 8, 1, 64),
    },
    "amd": {
        64: Tiles(32, 32, 8, 1),
        128: Tiles(32, 32, 8, 1),
        256: Tiles(16, 16, 8, 1),
        512: Tiles(16, 16, 8, 1),
        1024: Tiles(16, 16, 8, 1, 64),
    },
    "fp32": {
        64: Tiles(32, 32, 8, 2),
        128: Tiles(32, 32, 8, 1, 32),
        256: Tiles(16, 32, 8, 1, 64),
        512: Tiles(16, 16, 8, 1, 64),
        1024: Tiles(16, 16, 8, 1, 32),
    },
}

# What a version of Triton that spills with the tables' tiles has instead, by table, chips or dtype, width.
LAST = (3, 8)  # holds for those after it, too
BY_TRITON_VERSION = {
    (3, 6): {
        ("backward", "fp32", 128): Tiles(16, 32, 8, 1, 32),
        ("backward", "sm_100", 512): Tiles(32, 32, 8, 2),
    },
    (3, 8): {
        ("forward", "sm_100", 128): Tiles(128, 64, 8, 3, tma=True),
        ("forward", "sm_100", 256): Tiles(64, 64, 8, 3, tma=True),
        ("backward", "amd", 256): Tiles(32, 16, 8, 1),
    },
}


FORWARD["sm_100"] = FORWARD["sm_90"] | {512: Tiles(64, 32, 8, 3, tma=True)}
BACKWARD["sm_100"] = BACKWARD["sm_90"] | {512: Tiles(64, 32, 8, 2)}
BACKWARD_QUEUE["sm_100"] = BACKWARD_QUEUE["sm_90"] | {256: Tiles(64, 64, 8, 1)}
for _table in (BACKWARD, BACKWARD_QUEUE):
    _table["sm_100 fp16"] = _table["sm_90 fp16"]
# backward_x with SYMMETRIC has a second exponential for each pair, which these tiles leave registers for.
BACKWARD_SYMMETRIC = BACKWARD | {
    "sm_100": BACKWARD["sm_100"] | {256: Tiles(64, 64, 8, 2)},
    "amd": BACKWARD["amd"] | {64: Tiles(64, 32, 8, 2)},
}
