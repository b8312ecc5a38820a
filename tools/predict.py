"""Predicts the part of the tensor cores' rate that the forward kernels reach, from machine code alone:

    python tools/predict.py [--capability 90] [--dim 128] [--dtype bf16] [--json]

prints a table in Markdown: Triton kernels of the default tables, and those of the CUDA C++ extension where it
is built. With --json, it writes those for bfloat16 to bench/results instead, and `make figures` then writes
docs/kernels.md and docs/cuda.md from them.

Both bounds follow from the instructions of the loop over the queue's tiles, the nominal rates below and the
number of blocks that a multiprocessor holds. At best, all of a tile's work overlaps, and the busiest pipe
decides. At worst, a warp does one thing after the other, without a product in flight beside its exponentials,
and only other warps hide that (simulation.py). Left out are memory beyond the multiprocessor, bank conflicts,
clocks that drop under load, multiprocessors without work in the last wave, and code outside the loop.
"""

import argparse
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cuda_resources
import tables
from sass import Instruction, loops
from simulation import Step, Work, simulate

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
CAPABILITIES = (80, 90, 100)
DIMS = (64, 128, 256, 512)


# ------------------------------------------------------------------------------------------------ the chips


class Chip(NamedTuple):
    # Dense 16-bit flop per clock by instruction, from the data sheets: A100, H100 and B200 do 312, 989 and
    # 2,250 Tflop/s on 108, 132 and 148 multiprocessors at 1.41, 1.83 and 1.85 GHz. Of that, Hopper's mma.sync
    # does some 63 % (Luo et al. 2024, arXiv:2402.13499).
    tensor: dict[str, int]
    fma: int  # float32 results per clock
    shared: int  # bytes of shared memory


# A multiprocessor by the CUDA C++ Programming Guide, where no other source is named.
CHIPS = {
    80: Chip({"HMMA": 2048}, 64, 164 << 10),
    90: Chip({"HGMMA": 4096, "HMMA": 2576}, 128, 228 << 10),
    100: Chip({"UTCHMMA": 8192}, 128, 228 << 10),
}
REGISTERS, THREADS, BLOCKS = 65_536, 2048, 32
RESERVED = 1024  # bytes of shared memory of each block that the system uses
COLUMNS = 512  # of tensor memory (PTX ISA)
XU, ALU = 16, 64  # results per clock: special functions; integers and logic
BANDWIDTH = 128  # bytes of shared memory per clock
LATENCY = 60  # assumed clocks until warps continue after a chain of products, a barrier or a turn

# The pipe of an instruction, beside its issue slot. By Nsight Compute's documentation the XU converts, but
# the ALU does packed conversions (F2FP).
PIPES = {
    "xu": "MUFU F2F F2I I2F",
    "alu": "F2FP LOP3 SHF PRMT IADD3 VIADD LEA SEL ISETP IMNMX VIMNMX FSEL FSETP FMNMX PLOP3",
    "fma": "FADD FMUL FFMA FHADD IMAD HADD2 HMUL2 HFMA2",
}
PIPE_OF = {instruction: pipe for pipe, names in PIPES.items() for instruction in names.split()}


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def occupancy(chip: Chip, registers: int, shared: int, warps: int, columns: int = 0) -> int:
    """Returns the number of blocks that a multiprocessor holds.

    Args:
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
        columns: of tensor memory, of a block.
    """
    quarter = REGISTERS // 4 // round_up(32 * registers, 256)  # warps
    limits = [4 * quarter // round_up(warps, 4), chip.shared // (round_up(shared, 128) + RESERVED)]
    limits += [THREADS // (32 * warps), COLUMNS // columns if columns else BLOCKS, BLOCKS]
    return min(limits)


# --------------------------------------------------------------------------------------------- the products


class Kernel(NamedTuple):
    capability: int
    name: str
    dim: int
    block_m: int
    block_n: int
    warps: int  # that compute
    others: int  # warps that fetch
    registers: int
    shared: int  # bytes
    columns: int  # of tensor memory
    loop: list[Instruction]  # a pass through the one over tiles

    @property
    def groups(self) -> int:
        """Groups of four warps that compute (simulation.py)."""
        return self.warps // 4

    @property
    def flop(self) -> int:
        """Flop of the two products of a tile."""
        return 4 * self.block_m * self.block_n * self.dim

    @property
    def blocks(self) -> int:
        warps = self.warps + self.others
        return occupancy(CHIPS[self.capability], self.registers, self.shared, warps, self.columns)


def with_loop(kernel: Kernel, listing: str) -> Kernel:
    """Returns the kernel with its main loop: the shortest that multiplies a whole tile.

    (The loop with a running maximum does all that the one with a fixed shift does, and more.)

    Raises:
        ValueError: there is no such loop.
    """
    for loop in loops(listing):
        whole = kernel._replace(loop=loop)
        if whole.groups * round(sum(product(each, whole)[0] for each in loop)) >= kernel.flop:
            return whole
    raise ValueError(
        f"{kernel.name} for sm_{kernel.capability} has no loop that multiplies a tile of {kernel.flop} flop"
    )


def product(instruction: Instruction, kernel: Kernel) -> tuple[float, float]:
    """Returns the flop of an instruction of four warps, and the bytes of shared memory that it reads."""
    if not instruction.multiplies:
        return 0, 0
    if found := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)\S* R\d+, (gdesc)?", instruction.text):
        m, n, k = map(int, found.groups()[:3])
        return 2 * m * n * k, 2 * n * k + (2 * m * k if found[4] else 0)
    if found := re.match(r"(?:@\S+ )?HMMA\.(16)(8)(8|16)\.", instruction.text):
        m, n, k = map(int, found.groups())
        return 4 * 2 * m * n * k, 0
    # tcgen05's shape is in a register, and one thread issues it for the block: each gets an equal part.
    m, n, d = kernel.block_m, kernel.block_n, kernel.dim
    products = [each.text for each in kernel.loop if each.multiplies]
    in_shared = not any("UTCHMMA tmem" in text for text in products)  # p
    read = 2 * d * (m + n) + 2 * d * n + (2 * m * n if in_shared else 0)
    parts = len(products) * kernel.groups
    return kernel.flop / parts, read / parts


def clocks(instruction: Instruction, kernel: Kernel) -> float:
    """Returns the clocks of an instruction of four warps: the tensor cores', or shared memory's if more."""
    flop, read = product(instruction, kernel)
    rate: float = CHIPS[kernel.capability].tensor.get(instruction.name, 0)
    if not rate:
        raise ValueError(f"the rate of {instruction.name} on sm_{kernel.capability} is not known")
    if instruction.name == "UTCHMMA" and kernel.block_m < 128:
        rate /= 2  # 64 rows take as long as 128
    return max(flop / rate, read / BANDWIDTH)


def touched(instruction: Instruction, kernel: Kernel) -> float:
    """Returns the bytes of shared memory that an instruction of four warps reads or writes."""
    name, text = instruction.name, instruction.text
    if name in ("LDSM", "STSM"):
        matrices = re.search(r"88\.([24])\b", text)
        return 4 * 128 * (int(matrices[1]) if matrices else 1)
    if name in ("LDS", "STS", "LDGSTS"):
        bits = re.search(r"\.(64|128)\b", text)
        return 128 * (int(bits[1]) if bits else 32) // 8
    return product(instruction, kernel)[1]


# ---------------------------------------------------------------------------------------------- the bounds


def work(loop: list[Instruction], kernel: Kernel) -> Work:
    """Returns the clocks on each pipe of four warps, one on each quarter of the multiprocessor."""
    rates = {"xu": XU, "alu": ALU, "fma": CHIPS[kernel.capability].fma}
    counts = Counter(PIPE_OF.get(each.name) for each in loop)
    found = {pipe: 128 * counts[pipe] / rate for pipe, rate in rates.items()}
    found["issue"] = len(loop)
    found["shared"] = sum(touched(each, kernel) for each in loop) / BANDWIDTH
    found["alone"] = sum(each.stall for each in loop)
    return found


def steps(kernel: Kernel) -> list[Step]:
    """Returns the steps of four warps for a tile, in the order of the code, one after the other."""
    found: list[Step] = []
    passed: list[Instruction] = []
    pending = 0.0
    turns = any("BAR.ARV" in each.text for each in kernel.loop)
    for each in kernel.loop:
        then: list[Step] = []
        if each.multiplies:
            pending += clocks(each, kernel)
            if "gsb0" in each.text:  # the last of a chain
                then, pending = [{"tensor": pending}, {"alone": LATENCY}], 0.0
        elif step := barrier(each.text, turns):
            then = [step, {"alone": LATENCY}] if step != "pass" else [step]
        if not each.multiplies:
            passed.append(each)
        if then:
            found += [work(passed, kernel), *then]
            passed = []
    found.append(work(passed, kernel))
    # Chains of other instructions have neither such a mark nor turns.
    return [{"tensor": pending}, {"alone": LATENCY}, *found] if pending else found


def barrier(text: str, turns: bool) -> str:
    """Returns the step that an instruction stands for, "" if it is no barrier of several groups."""
    if "BAR.ARV" in text:
        return "pass"
    threads = re.search(r"BAR\.SYNC.*, 0x([0-9a-f]+)", text)
    if "BAR.SYNC" not in text or (threads and int(threads[1], 16) < 256):
        return ""
    return "take" if turns and threads else "barrier"


class Prediction(NamedTuple):
    clocks: Work  # of a block's tile on each pipe; "alone" is of one warp
    worst: float  # part of the tensor cores' rate
    best: float


def predict(kernel: Kernel) -> Prediction:
    loop, groups, blocks = kernel.loop, kernel.groups, kernel.blocks
    own = work(loop, kernel)
    products = sum(clocks(each, kernel) for each in loop if each.multiplies)
    pipes = {pipe: groups * taken for pipe, taken in {"tensor": products, **own}.items()}
    if kernel.others or any(each.name == "UTMALDG" for each in loop):  # TMA writes the tile
        pipes["shared"] += 2 * kernel.block_n * kernel.dim / BANDWIDTH
    busiest = max(taken for pipe, taken in pipes.items() if pipe != "alone")
    ideal = kernel.flop / max(CHIPS[kernel.capability].tensor.values())
    worst = simulate(steps(kernel), groups, blocks) / blocks
    best = max(busiest, own["alone"] / blocks)
    return Prediction({**pipes, "alone": own["alone"]}, ideal / worst, ideal / best)


# --------------------------------------------------------------------------------------------- the kernels


def triton_kernel(capability: int, dim: int, dtype: str) -> Kernel:
    """Returns the forward kernel with a gradient, as the default tables launch it."""
    import triton_resources

    case = next(case for case in triton_resources.cases(capability, dim, dtype) if case.name == "forward")
    compiled = triton_resources.compiled(case, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = cuda_resources.dump("-sass", Path(file.name))
    used, tiles = triton_resources.resources(case, capability), case.tiles
    shape = tiles.block_m, tiles.block_n, tiles.warps, 0
    columns = getattr(compiled.metadata, "tmem_size", 0)
    kernel = Kernel(capability, "forward", dim, *shape, used.registers, used.shared, columns, [])
    return with_loop(kernel, listing)


def cuda_kernels(capability: int, dim: int, dtype: str) -> Iterator[Kernel]:
    """Yields the extension's forward kernels with a gradient for a chip; none where it is not built."""
    file = cuda_resources.extension()
    if file is None:
        return
    from relssl import _cuda  # type: ignore[attr-defined]

    used, listings = extension(file)
    for r in used:
        if (r.chip.removesuffix("a"), r.dtype, r.dim, r.mean) == (f"sm_{capability}", dtype, dim, True):
            own = int(r.kernel.removeprefix("forward_sm"))
            m, n, warps, *_ = _cuda.tiles(dim, own)
            shape = m, n, warps, 4 if own == 90 else 0
            kernel = Kernel(capability, r.kernel, dim, *shape, r.registers, r.shared, 0, [])
            yield with_loop(kernel, listings[r.kernel, r.chip, r.dtype, r.dim, r.mean])


@cache
def extension(file: Path) -> tuple[list[cuda_resources.Resources], dict[tuple, str]]:
    """Returns the resources of an extension's forward kernels, and their code by the first five of these."""
    used = [r for r in cuda_resources.kernels(file) if r.kernel.startswith("forward")]
    found, chip = {}, ""
    for part in re.split(r"(?m)^(?=\s*(?:arch = |Function : ))", cuda_resources.dump("-sass", file)):
        if named := re.match(r"\s*arch = (\S+)", part):
            chip = named[1]
        elif named := re.search(cuda_resources.FORWARD, part.split("\n")[0]):
            own, dtype, dim, mean = named.groups()
            found[f"forward_{own}", chip, dtype.lower(), int(dim), mean == "1"] = part
    return used, found


# ---------------------------------------------------------------------------------------------- the tables


def described(kernel: Kernel) -> tables.Row:
    return {
        "chip": f"sm_{kernel.capability}",
        "kernel": kernel.name,
        "D": kernel.dim,
        "tiles": f"{kernel.block_m} x {kernel.block_n}",
        "blocks, warps": f"{kernel.blocks}, {kernel.warps + kernel.others}",
    }  # blocks of a multiprocessor, warps of a block


def counted(kernel: Kernel, prediction: Prediction) -> tables.Row:
    """Returns the numbers that the prediction rests on."""
    counts = Counter(each.name for each in kernel.loop)
    products = sum(each.multiplies for each in kernel.loop)
    conversions = " + ".join(f"{counts[name]} {name}" for name in ("F2F", "F2FP") if counts[name])
    clocks = ", ".join(f"{taken:,.0f}" for taken in prediction.clocks.values())
    return {
        "registers": kernel.registers,
        "shared": kernel.shared,
        "products, exponentials, conversions, all": (
            f"{products}, {counts['MUFU']}, {conversions}, {len(kernel.loop)}"
        ),
        "tensor, XU, ALU, FMA, issue, shared, alone": clocks,
    }


def part(prediction: Prediction) -> str:
    worst, best = (f"{100 * bound:.0f}" for bound in (prediction.worst, prediction.best))
    return f"{best} %" if worst == best else f"{worst} to {best} %"


def write() -> None:
    """Writes the predictions for bfloat16 on every chip; nothing was measured beside them yet."""
    import triton

    file = cuda_resources.extension()
    if file is None:
        raise SystemExit("relssl._cuda is not built: see `relssl info`")
    sizes = list(itertools.product(CAPABILITIES, DIMS))
    kernels = {
        "triton": [triton_kernel(*size, "bf16") for size in sizes],
        "cuda": [kernel for size in sizes for kernel in cuda_kernels(*size, "bf16")],
    }
    versions = {"triton": {"triton": triton.__version__}, "cuda": {"nvcc": cuda_resources.compiler(file)}}
    for name, version in versions.items():
        rows = [
            {**described(kernel), "predicted": part(predict(kernel)), "measured": "-"}
            for kernel in kernels[name]
        ]
        tables.write(RESULTS / f"{name}-predictions.json", rows, **version)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--dim", type=int, nargs="*", default=DIMS, choices=DIMS)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--json", action="store_true", help="write bench/results instead, all in bf16")
    options = parser.parse_args()
    if options.json:
        write()
        return
    print(
        "All of this is predicted: instructions of a warp and clocks of a multiprocessor, both for a tile.\n"
    )

    def rows() -> Iterator[tables.Row]:
        for size in itertools.product(options.capability, options.dim):
            kernels = [triton_kernel(*size, options.dtype), *cuda_kernels(*size, options.dtype)]
            for kernel in kernels:
                prediction = predict(kernel)
                bounds = {"predicted part of the tensor rate": part(prediction)}
                yield {**described(kernel), **counted(kernel, prediction), **bounds}

    tables.printed(rows())
    if 100 in options.capability:
        print("\nOn sm_100, the bandwidth of tensor memory is left out, and so are the CUDA C++ kernels,")
        print("which are compiled for it when they are loaded.")


if __name__ == "__main__":
    main()
