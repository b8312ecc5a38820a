"""How the work is cut: the tiles of a launch, and splits of the queue that fill the chip.

Static, so that every process of a run cuts alike and results repeat; `relssl tune` measures instead.
"""

import re
from contextlib import suppress
from functools import cache
from typing import Any

from relssl.kernels.tiles import (
    AMD,
    BACKWARD,
    BACKWARD_QUEUE,
    BACKWARD_SYMMETRIC,
    BY_TRITON_VERSION,
    FORWARD,
    INTERPRETED,
    INTERPRETER,
    LAST,
    Chip,
    Table,
    Tiles,
)

LOG2E = 1.4426950408889634
TINY = 1.1754943508222875e-38  # the smallest normal float32
WORKSPACE = 32 << 20  # bytes that the means of all splits may take, unless one split takes more
MOST_SPLITS = 256  # combine.py holds a row's splits in registers

# Bytes of shared memory that a program may have (CUDA C++ Programming Guide; CDNA 3 ISA).
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "small": 101_376, "amd": 65_536}
RESERVED = 1024  # bytes of it that each program costs beside its own
REGISTERS = 65_536  # of a processor of NVIDIA's, from Ampere on
TENSOR_COLUMNS = 512  # of a processor's tensor memory (Blackwell)


def family(capability: int) -> str:
    """Returns the name of the chips that share a table.

    "small" ones have 100 KiB of shared memory for a program, AMD's have 64.
    """
    if capability == AMD:
        return "amd"
    if capability in (100, 103):
        return "sm_100"
    if capability == 90:
        return "sm_90"
    return "sm_80" if capability == 80 else "small"


def _look_up(name: str, table: Table, chip: Chip, dtype: str, dim: int) -> Tiles:
    if chip.capability == INTERPRETER:
        return INTERPRETED
    chips = family(chip.capability)
    row = next(row for row in (dtype, f"{chips} {dtype}", chips) if row in table)
    widest = next(widest for widest in table[row] if dim <= widest)
    others = BY_TRITON_VERSION.get(min(chip.triton, LAST), {})
    return others.get((name, row, widest), table[row][widest])


def version(triton: str) -> tuple[int, int]:
    """Returns (3, 8) for "3.8.0+git", as a Chip has it."""
    major, minor = triton.split(".")[:2]
    return int(major), int(minor)


def width(dim: int) -> int:
    """Returns the width of a tile: a power of two, and at least 16 for a matrix product."""
    return max(16, bucket(dim))


def log2_scale(scale: float) -> float:
    """Returns 1 / temperature in units of log 2, and never 0: a left-out entry has the similarity -inf."""
    return max(scale * LOG2E, TINY)


def precision(capability: int, *, exact: bool) -> str:
    """Returns that of float32 products. Exact: three of TF32, which keep all digits, or AMD's plain ones."""
    if capability == AMD:
        return "ieee"
    return "tf32x3" if exact else "tf32"


def packs(capability: int) -> bool:
    """Whether float32 is rounded to bfloat16 by NVIDIA's instruction; see common.narrow."""
    return capability not in (INTERPRETER, AMD)


def forward(chip: Chip, dtype: str, dim: int) -> Tiles:
    """Returns the tiles of forward.py, for rows of "bf16", "fp16" or "fp32"."""
    return _look_up("forward", FORWARD, chip, dtype, dim)


def backward(chip: Chip, dtype: str, dim: int, symmetric: bool = False) -> Tiles:
    """Returns the tiles of backward_x."""
    return _look_up("backward", BACKWARD_SYMMETRIC if symmetric else BACKWARD, chip, dtype, dim)


def backward_queue(chip: Chip, dtype: str, dim: int) -> Tiles:
    """Returns the tiles of backward_queue."""
    return _look_up("backward_queue", BACKWARD_QUEUE, chip, dtype, dim)


def with_ids(tiles: Tiles) -> Tiles:
    """Returns smaller tiles for kernels that compare ids, 64-bit numbers, which would spill otherwise."""
    if tiles.block_n > 16:
        return tiles._replace(block_n=tiles.block_n // 2)
    return tiles._replace(block_m=max(16, tiles.block_m // 2))


def shared_memory(chip: Chip, dtype: str, dim: int, tiles: Tiles) -> int:
    """Returns the least bytes that a forward pass takes, for rows of x and the tiles that are in flight."""
    more = {"sm_90": 0, "sm_100": 0 if tiles.specialised else 1}.get(family(chip.capability), -1)
    flying = tiles.stages + more if tiles.stages > 1 else 1
    return (tiles.block_m + flying * tiles.block_n) * width(dim) * (4 if dtype == "fp32" else 2)


def _specialised(chip: Chip, dtype: str, dim: int) -> Tiles:
    if chip.capability == INTERPRETER:
        return INTERPRETED._replace(specialised=True)
    chips = family(chip.capability)
    if chips not in ("sm_90", "sm_100"):
        raise ValueError("specialised warps need Hopper or a data centre's Blackwell")
    if dtype == "fp32" or dim not in (64, 128):
        raise ValueError(f"specialised warps take 16-bit rows of 64 or 128, not {dtype} of {dim}")
    if chips == "sm_100" and dtype == "fp16":
        raise ValueError("Triton compiles no specialised warps for Blackwell with fp16's running maximum")
    return Tiles(128, 128, 8 if chips == "sm_100" else 4, 3, tma=True, specialised=True)


def variant(name: str, chip: Chip, dtype: str, dim: int) -> Tiles:
    """Returns the tiles that a name stands for in a forward pass.

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
    """Returns what to try beside the default of a forward pass, the most promising first."""
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
    """Returns the power of two that n is rounded up to: choices are made for all sizes in between."""
    return 1 << (n - 1).bit_length()


def combine(chip: Chip, dim: int, splits: int) -> tuple[dict[str, Any], int]:
    """Returns the constants of combine.py: all splits at once, as many columns of their means as fit the
    registers; and warps.

    Chips for consumers are slow at float64, which every warp of a program computes for itself: two do.
    """
    count, warps = max(2, bucket(splits)), 2 if family(chip.capability) == "small" else 8
    return {"DIM": dim, "S": count, "BLOCK_D": min(width(dim), 1024 * warps // count)}, warps


def resident(chip: Chip, warps: int, registers: int, shared: int, columns: int = 0) -> int:
    """Returns how many programs a processor runs at once.

    Registers are handed out to warps by 256, from four equal parts. Where they are not counted it is one.

    Args:
        registers: of a thread; 0 if they are not counted.
        shared: bytes of shared memory of a program.
        columns: of tensor memory (Blackwell) of a program.
    """
    chips = family(chip.capability)
    if chip.capability == INTERPRETER or chips == "amd" or not registers:
        return 1
    registers_per_warp = -(-32 * registers // 256) * 256
    fitting = 4 * (REGISTERS // 4 // registers_per_warp) // warps
    fitting = min(fitting, (48 if chips == "small" else 64) // warps)
    fitting = min(fitting, (SHARED[chips] + RESERVED) // (shared + RESERVED))
    return max(1, min(fitting, TENSOR_COLUMNS // columns) if columns else fitting)


@cache
def split_queue(rows: int, size: int, dim: int, tiles: Tiles, chip: Chip) -> tuple[int, int]:
    """Returns in how many splits to cut the queue, and how many of its rows are in each: whole tiles.

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
