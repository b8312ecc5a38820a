"""How to cut the work: tiles for each chip, width and dtype, and splits of the queue that fill the chip.

Static, so that every process of a run cuts alike and results repeat; RELSSL_AUTOTUNE=1 measures instead
(autotune.py). The tables hold what Triton 3.5 to 3.8 compiles without spilling registers (docs/kernels.md);
their choice among that awaits a measurement.
"""

from functools import cache
from typing import Any, NamedTuple

LOG2E = 1.4426950408889634
TINY = 1.1754943508222875e-38  # the smallest normal float32
WORKSPACE = 32 << 20  # bytes that the means of all splits may take, unless one split takes more
MOST_SPLITS = 256  # combine.py holds a row's splits in registers
INTERPRETER, AMD = 0, 1  # where a capability stands


class Chip(NamedTuple):
    capability: int  # 10 * major + minor, or one of the names above
    processors: int  # streaming multiprocessors
    triton: tuple[int, int] = (3, 7)  # the version that compiles for it; see OF_A_VERSION


WHOLE = 1 << 30


class Tiles(NamedTuple):
    block_m: int  # rows of x
    block_n: int  # rows of the queue
    warps: int
    stages: int  # queue tiles in flight
    # Columns that similarities are summed over at a time; see pieces.product. The same forward and backward,
    # where p = exp(logit - lse) must be of the logits that lse was of.
    chunk: int = WHOLE
    tma: bool = False  # whether the copy engine may fetch the queue (Hopper and later; forward passes)


INTERPRETED = Tiles(64, 256, 4, 1)

# For each family of chips: its tiles by width, for up to so many columns.
Table = dict[str, dict[int, Tiles]]

FORWARD_16: Table = {
    "sm_90": {
        64: Tiles(128, 128, 8, 3, tma=True),
        128: Tiles(128, 128, 8, 3, tma=True),
        256: Tiles(128, 64, 8, 3, tma=True),
        512: Tiles(64, 32, 8, 3, tma=True),
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
        256: Tiles(64, 32, 8, 2),
        512: Tiles(32, 16, 8, 2),
        1024: Tiles(16, 16, 8, 1, 64),
    },
}
FORWARD_32 = {
    64: Tiles(32, 64, 8, 2),
    128: Tiles(32, 32, 8, 2, 32),
    256: Tiles(16, 32, 8, 2, 64),
    512: Tiles(16, 32, 8, 2, 64),
    1024: Tiles(16, 16, 8, 1, 32),
}

BACKWARD_16: Table = {
    "sm_90": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(128, 32, 8, 2),
        256: Tiles(64, 32, 8, 2),
        512: Tiles(32, 32, 8, 2),
        1024: Tiles(16, 16, 8, 2),
    },
    "sm_80": {
        64: Tiles(64, 64, 8, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 64, 8, 2),
        512: Tiles(32, 32, 8, 2),
        1024: Tiles(16, 16, 8, 2),
    },
    "small": {
        64: Tiles(64, 64, 8, 2),
        128: Tiles(64, 32, 8, 2),
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
}
BACKWARD_32 = {
    64: Tiles(32, 32, 8, 2),
    128: Tiles(16, 32, 8, 2, 32),
    256: Tiles(16, 32, 8, 2, 64),
    512: Tiles(16, 16, 8, 2, 64),
    1024: Tiles(16, 16, 8, 1, 32),
}

QUEUE_16: Table = {
    "sm_90": {
        64: Tiles(64, 64, 8, 2),
        128: Tiles(64, 16, 8, 2),
        256: Tiles(16, 32, 8, 2),
        512: Tiles(16, 32, 8, 1),
        1024: Tiles(16, 16, 8, 1),
    },
    "sm_80": {
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(16, 32, 8, 1),
        512: Tiles(16, 16, 8, 1),
        1024: Tiles(16, 16, 8, 1),
    },
    "small": {
        64: Tiles(64, 32, 8, 1),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(16, 32, 8, 1),
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
}
QUEUE_32 = {
    64: Tiles(32, 32, 8, 2),
    128: Tiles(32, 32, 8, 1, 32),
    256: Tiles(16, 32, 8, 1, 64),
    512: Tiles(16, 16, 8, 1, 64),
    1024: Tiles(16, 16, 8, 1, 32),
}

# What a version of Triton that spills with the tables' tiles has instead, by table, chips or dtype, width.
LAST = (3, 8)  # holds for those after it, too
OF_A_VERSION = {
    (3, 6): {("backward", "float32", 128): Tiles(16, 32, 8, 1, 32)},
    (3, 8): {
        ("forward", "sm_100", 128): Tiles(128, 64, 8, 3, tma=True),
        ("forward", "sm_100", 256): Tiles(64, 64, 8, 3, tma=True),
        ("backward", "amd", 256): Tiles(32, 16, 8, 1),
    },
}


def family(capability: int) -> str:
    """Chips that share a table. "small" have 100 KiB of shared memory for a program; AMD's have 64."""
    if capability == AMD:
        return "amd"
    if capability in (100, 103):
        return "sm_100"
    if capability == 90:
        return "sm_90"
    return "sm_80" if capability == 80 else "small"


for _table in (FORWARD_16, BACKWARD_16, QUEUE_16):
    _table["sm_100"] = _table["sm_90"]


def _line(name: str, of_16: Table, of_32: dict[int, Tiles], chip: Chip, itemsize: int, dim: int) -> Tiles:
    if chip.capability == INTERPRETER:
        return INTERPRETED
    rows = "float32" if itemsize == 4 else family(chip.capability)
    table = of_32 if itemsize == 4 else of_16[rows]
    widest = next(widest for widest in table if dim <= widest)
    others = OF_A_VERSION.get(min(chip.triton, LAST), {})
    return others.get((name, rows, widest), table[widest])


def version(triton: str) -> tuple[int, int]:
    """3.8 of "3.8.0+git": what a Chip has."""
    major, minor = triton.split(".")[:2]
    return int(major), int(minor)


def width(dim: int) -> int:
    """Of a tile: a power of two, and at least 16 for a matrix product."""
    return max(16, bucket(dim))


def log2_scale(scale: float) -> float:
    """1 / temperature in units of log 2, and never 0: a left-out entry has the similarity -inf."""
    return max(scale * LOG2E, TINY)


def precision(capability: int, *, exact: bool) -> str:
    """Of float32 products. Exact are three TF32 products that keep all digits, or AMD's plain ones."""
    if capability == AMD:
        return "ieee"
    return "tf32x3" if exact else "tf32"


def forward(chip: Chip, itemsize: int, dim: int) -> Tiles:
    """Of lookup.py."""
    return _line("forward", FORWARD_16, FORWARD_32, chip, itemsize, dim)


def backward(chip: Chip, itemsize: int, dim: int) -> Tiles:
    """Of vjp_x."""
    return _line("backward", BACKWARD_16, BACKWARD_32, chip, itemsize, dim)


def backward_queue(chip: Chip, itemsize: int, dim: int) -> Tiles:
    """Of vjp_queue."""
    return _line("backward_queue", QUEUE_16, QUEUE_32, chip, itemsize, dim)


def candidates(tiles: Tiles) -> list[Tiles]:
    """What autotuning tries beside the default of a forward pass."""
    tried = [tiles]
    for m in {tiles.block_m, max(16, tiles.block_m // 2)}:
        for n in {max(16, tiles.block_n // 2), tiles.block_n, tiles.block_n * 2}:
            for warps in (4, 8):
                tried += [tiles._replace(block_m=m, block_n=n, warps=warps, stages=s) for s in (2, 3, 4)]
    return list(dict.fromkeys(tried))


def bucket(n: int) -> int:
    """The power of two that n is rounded up to: choices are made for all sizes in between."""
    return 1 << (n - 1).bit_length()


def combine(dim: int, splits: int) -> tuple[dict[str, Any], int]:
    """Of combine.py: all splits at once, as many columns of their means as fit the registers; and warps."""
    count = max(2, bucket(splits))
    return {"DIM": dim, "S": count, "BLOCK_D": min(width(dim), 8192 // count)}, 8


@cache
def splits(rows: int, size: int, dim: int, tiles: Tiles, chip: Chip) -> tuple[int, int]:
    """In how many ranges to cut the queue, and how many of its rows are in each: whole tiles.

    The time is that of waves of programs, one on each processor, which take as long as they have tiles; the
    fewest splits that come within 5 % of the least are taken, since each leaves its means to be merged.
    """
    blocks = -(-rows // tiles.block_m)
    count = -(-size // tiles.block_n)
    most = max(1, min(count, MOST_SPLITS, WORKSPACE // (4 * rows * dim)))
    times = {}
    for wanted in range(1, most + 1):
        step = -(-count // wanted)
        number = -(-count // step)
        times[number] = -(-blocks * number // chip.processors) * step, step
    least = min(times.values())[0]
    number, step = next((n, step) for n, (time, step) in times.items() if time <= 1.05 * least)
    return number, step * tiles.block_n
