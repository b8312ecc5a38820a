"""How to cut the work: tiles for each chip, width and dtype, and splits of the queue that fill the chip.

Static, so that every process of a run cuts alike and results repeat; `relssl tune` measures instead. The
tables hold what Triton 3.5 to 3.8 compiles without spilling registers (docs/kernels.md); their choice among
that awaits a measurement.
"""

import re
from contextlib import suppress
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
OF_A_VERSION = {
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

# Bytes of shared memory that a program may have (CUDA C++ Programming Guide; CDNA 3 ISA).
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "small": 101_376, "amd": 65_536}
RESERVED = 1024  # bytes of it that each program costs beside its own
REGISTERS = 65_536  # of a processor of NVIDIA's, from Ampere on
TENSOR_COLUMNS = 512  # of a processor's tensor memory (Blackwell)


def family(capability: int) -> str:
    """Chips that share a table. "small" have 100 KiB of shared memory for a program; AMD's have 64."""
    if capability == AMD:
        return "amd"
    if capability in (100, 103):
        return "sm_100"
    if capability == 90:
        return "sm_90"
    return "sm_80" if capability == 80 else "small"


def _line(name: str, table: Table, chip: Chip, dtype: str, dim: int) -> Tiles:
    if chip.capability == INTERPRETER:
        return INTERPRETED
    of = family(chip.capability)
    row = next(row for row in (dtype, f"{of} {dtype}", of) if row in table)
    widest = next(widest for widest in table[row] if dim <= widest)
    others = OF_A_VERSION.get(min(chip.triton, LAST), {})
    return others.get((name, row, widest), table[row][widest])


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


def packs(capability: int) -> bool:
    """Whether float32 is rounded to bfloat16 by NVIDIA's instruction; see pieces.narrow."""
    return capability not in (INTERPRETER, AMD)


def forward(chip: Chip, dtype: str, dim: int) -> Tiles:
    """Of lookup.py, for rows of "bf16", "fp16" or "fp32"."""
    return _line("forward", FORWARD, chip, dtype, dim)


def backward(chip: Chip, dtype: str, dim: int) -> Tiles:
    """Of vjp_x."""
    return _line("backward", BACKWARD, chip, dtype, dim)


def backward_queue(chip: Chip, dtype: str, dim: int) -> Tiles:
    """Of vjp_queue."""
    return _line("backward_queue", BACKWARD_QUEUE, chip, dtype, dim)


def shared_memory(chip: Chip, dtype: str, dim: int, tiles: Tiles) -> int:
    """Bytes that a forward pass takes at the least, for rows of x and the tiles that are in flight."""
    more = {"sm_90": 0, "sm_100": 0 if tiles.specialised else 1}.get(family(chip.capability), -1)
    flying = tiles.stages + more if tiles.stages > 1 else 1
    return (tiles.block_m + flying * tiles.block_n) * width(dim) * (4 if dtype == "fp32" else 2)


def _specialised(chip: Chip, dtype: str, dim: int) -> Tiles:
    if chip.capability == INTERPRETER:
        return INTERPRETED._replace(specialised=True)
    of = family(chip.capability)
    if of not in ("sm_90", "sm_100"):
        raise ValueError("specialised warps need Hopper or a data centre's Blackwell")
    if dtype == "fp32" or dim not in (64, 128):
        raise ValueError(f"specialised warps take 16-bit rows of 64 or 128, not {dtype} of {dim}")
    if of == "sm_100" and dtype == "fp16":
        raise ValueError("Triton compiles no specialised warps for Blackwell with fp16's running maximum")
    return Tiles(128, 128, 8 if of == "sm_100" else 4, 3, tma=True, specialised=True)


def variant(name: str, chip: Chip, dtype: str, dim: int) -> Tiles:
    """The tiles that a name stands for in a forward pass.

    "" is the table's line, "64x64x4x3" are other tiles (rows of x, rows of the queue, warps, stages),
    "specialised" is specialised.py with its own tiles and "specialised 128x128x4x3" with others.

    Raises ValueError with the reason why not.
    """
    form = re.fullmatch(r"(specialised)?(?:(?:^|(?<=d) )(\d+)x(\d+)x(\d+)x(\d+))?", name)
    if form is None:
        forms = "'', '64x64x4x3', 'specialised' or 'specialised 128x128x4x3'"
        raise ValueError(f"a variant is one of {forms}, not {name!r}")
    tiles = (_specialised if form[1] else forward)(chip, dtype, dim)
    if not form[2]:
        return tiles
    m, n, warps, stages = sizes = [int(size) for size in form.groups()[1:]]
    powers = 0 not in sizes and all(size == bucket(size) for size in (m, n, warps))
    if not powers or min(m, n) < 16 or max(m, n) > 256 or warps > 16 or stages > 8:
        allowed = "tiles are powers of 2 from 16 to 256, warps such to 16, stages 1 to 8"
        raise ValueError(f"{allowed}, not {name!r}")
    tiles = tiles._replace(block_m=m, block_n=n, warps=warps, stages=stages)
    if tiles.specialised and chip.capability == 90 and warps != 4:
        raise ValueError(f"for Hopper Triton specialises warps in kernels of 4 alone, not {name!r}")
    if chip.capability != INTERPRETER:
        most, needed = SHARED[family(chip.capability)], shared_memory(chip, dtype, dim, tiles)
        if needed > most:
            raise ValueError(f"{name!r} takes {needed:,} bytes of shared memory, and a program has {most:,}")
    return tiles


def variants(chip: Chip, dtype: str, dim: int) -> list[str]:
    """What to try beside the default of a forward pass, the most promising first."""
    default = forward(chip, dtype, dim)
    names = ["specialised"]
    with suppress(ValueError):
        own = variant("specialised", chip, dtype, dim)
        names.append(f"specialised {own.block_m}x{own.block_n // 2}x{own.warps}x{own.stages}")
    m, n, warps, stages = default[:4]
    for in_flight in dict.fromkeys((stages, 3, 2, 4)):
        for rows, of_rows in ((m, warps), (m // 2, 4), (m // 2, warps), (m, 4)):
            for columns in (n, n // 2, 2 * n):
                # A thread's float32 sums and similarities: more than these spill.
                if rows * (width(dim) + columns) <= 160 * 32 * of_rows:
                    names.append(f"{rows}x{columns}x{of_rows}x{in_flight}")

    def differs(name: str) -> bool:
        try:
            return variant(name, chip, dtype, dim) != default
        except ValueError:
            return False

    return list(filter(differs, dict.fromkeys(names)))[:16]


def bucket(n: int) -> int:
    """The power of two that n is rounded up to: choices are made for all sizes in between."""
    return 1 << (n - 1).bit_length()


def combine(chip: Chip, dim: int, splits: int) -> tuple[dict[str, Any], int]:
    """Of combine.py: all splits at once, as many columns of their means as fit the registers; and warps.

    Chips for consumers are slow at float64, which every warp of a program computes for itself: two do.
    """
    count, warps = max(2, bucket(splits)), 2 if family(chip.capability) == "small" else 8
    return {"DIM": dim, "S": count, "BLOCK_D": min(width(dim), 1024 * warps // count)}, warps


def resident(chip: Chip, warps: int, registers: int, shared: int, columns: int = 0) -> int:
    """How many programs a processor runs at once: by registers of a thread, bytes and columns of a program.

    Registers are handed out to warps by 256, from four equal parts. Where nobody counted them it is one.
    """
    of = family(chip.capability)
    if chip.capability == INTERPRETER or of == "amd" or not registers:
        return 1
    of_a_warp = -(-32 * registers // 256) * 256
    fitting = 4 * (REGISTERS // 4 // of_a_warp) // warps
    fitting = min(fitting, (48 if of == "small" else 64) // warps)
    fitting = min(fitting, (SHARED[of] + RESERVED) // (shared + RESERVED))
    return max(1, min(fitting, TENSOR_COLUMNS // columns) if columns else fitting)


@cache
def splits(rows: int, size: int, dim: int, tiles: Tiles, chip: Chip) -> tuple[int, int]:
    """In how many ranges to cut the queue, and how many of its rows are in each: whole tiles.

    The time is that of waves of programs, one on each of chip.processors (multiplied by what is resident on
    each, where that is more than one), which take as long as they have tiles; the fewest splits that come
    within 5 % of the least are taken, since each leaves its means to be merged.
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
