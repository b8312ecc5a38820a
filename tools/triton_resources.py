"""Resources of the Triton kernels in the default tables, read from what Triton compiles, without a GPU:

    python tools/triton_resources.py [--capability 90 ...] [--dim 128 ...] [--json FILE]

prints registers, spilled bytes, shared memory and the instruction of the products, as a table in Markdown.
With `--json bench/results/triton-resources.json`, half an hour for all, `make figures` writes docs/kernels.md
from them.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import tables
import triton
from relssl.kernels import backward, combine, enqueue, forward, heuristics, specialised
from relssl.kernels.heuristics import AMD, Chip, Tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 86, 89, 90, 100, 120, AMD)
DIMS = (64, 128, 256, 512, 1024)
PROCESSORS = 132


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    tensor: str  # the instruction of the matrix products
    copies: int  # asynchronous ones of 16 bytes
    narrow: int  # asynchronous ones of fewer
    tma: bool  # whether TMA loads tiles
    warps: int  # including those that Triton adds where warps are specialised
    columns: int  # of tensor memory
    sass: str = ""  # the program, on NVIDIA's chips


class Case(NamedTuple):
    """A kernel with the default tables' launch for a chip, width and dtype."""

    name: str
    kernel: Any
    dtype: str
    dim: int
    tiles: Tiles
    constants: dict[str, Any]


def cases(capability: int, dim: int, dtype: str) -> Iterator[Case]:
    """Yields the forward kernels with a gradient, the backward kernels, the combine kernels, and enqueue."""
    chip = Chip(capability, PROCESSORS, heuristics.version(triton.__version__))
    common = {
        "DIM": dim,
        "BLOCK_D": heuristics.width(dim),
        "EXCLUDE": 0,
        "FILLED": False,
        "EVEN": True,
        "DEVICE_SCALE": False,
        "PRECISION": heuristics.precision(capability, exact=dtype == "fp32"),
        "PACK": heuristics.packs(capability),
    }
    tiles = heuristics.forward(chip, dtype, dim)
    flags = {"MEAN": True, "FIXED": dtype != "fp16", "REDO": False}
    yield Case("forward", forward.forward, dtype, dim, tiles, common | flags)
    with suppress(ValueError):
        tiles = heuristics.variant("specialised", chip, dtype, dim)
        yield Case("specialised", specialised.specialised, dtype, dim, tiles, common | flags)
    tiles = heuristics.backward(chip, dtype, dim)
    flags = {"G_MEAN": True, "WEIGHTED": True, "SYMMETRIC": False}
    yield Case("backward_x", backward.backward_x, dtype, dim, tiles, common | flags)
    tiles = heuristics.backward(chip, dtype, dim, symmetric=True)
    flags = {"G_MEAN": False, "WEIGHTED": True, "SYMMETRIC": True}
    yield Case("backward_x_symmetric", backward.backward_x, dtype, dim, tiles, common | flags)
    tiles = heuristics.backward_queue(chip, dtype, dim)
    yield Case(
        "backward_queue", backward.backward_queue, dtype, dim, tiles, common | {"G_MEAN": True, "G_ROW": True}
    )
    fitting, warps = heuristics.combine(chip, dim, PROCESSORS)
    tiles = Tiles(0, 0, warps, 1)
    for name in ("lse_and_mean", "relation", "info_nce"):
        flags = {"MEAN": True, "KL": True, "TOTAL": True, "GRAD": True, "EXCLUDE": False}
        flags["DEVICE_SCALE"] = False
        kernel = getattr(combine, f"combine_{name}")
        yield Case(f"combine_{name}", kernel, dtype, dim, tiles, fitting | flags)
    constants = enqueue.blocks(dim) | {"IDS": True, "column_stride": 1}
    yield Case("enqueue", enqueue.enqueue, dtype, dim, Tiles(0, 0, 4, 1), constants)


def signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Returns each parameter's type: the address of float32 values by default."""

    def type_of(parameter: Any) -> str:
        name = parameter.name
        if name in constants:
            return "constexpr"
        if name.startswith("scale") or name == "weight":
            return "fp32"
        if name.endswith("_stride") or parameter.do_not_specialize:
            return "i32"
        if name in ("first", "second", "queue", "x", "q", "k", "rows", "keys"):
            return f"*{dtype}"
        indices = "ids", "queue_ids", "key_ids", "filled", "pointer", "count"
        return "*i64" if name in indices else "*fp32"

    return {parameter.name: type_of(parameter) for parameter in kernel.params}


def compiled(case: Case, capability: int) -> Any:
    """Compiles a kernel for pointers and strides that are multiples of 16, as in most calls."""
    names = case.kernel.arg_names
    constants = {n: v for n, v in (case.constants | blocks(case)).items() if n in names}
    types = signature(case.kernel, case.dtype, constants)
    aligned = [n for n, t in types.items() if t.startswith("*") or n.endswith("_stride")]
    source = ASTSource(
        case.kernel,
        signature=types,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": case.tiles.warps, "num_stages": case.tiles.stages}
    target = GPUTarget("hip", "gfx942", 64) if capability == AMD else GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def chip_name(capability: int) -> str:
    return "gfx942" if capability == AMD else f"sm_{capability}"


def blocks(case: Case) -> dict[str, int]:
    tiles = case.tiles
    return {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "CHUNK": tiles.chunk, "TMA": tiles.tma}


def read_int(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"the compiler's report lacks {pattern}"
    return int(found[1])


def resources(case: Case, capability: int) -> Resources:
    result = compiled(case, capability)
    metadata = result.metadata
    if capability == AMD:
        code = result.asm["amdgcn"]
        registers, spilled = (read_int(rf"\.vgpr_{word}:\s+(\d+)", code) for word in ("count", "spill_count"))
        tensor = "mfma" if "v_mfma" in code else "none"
        return Resources(registers, 4 * spilled, metadata.shared, tensor, 0, 0, False, metadata.num_warps, 0)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (read_int(rf"{word}:(\d+)", listing) for word in ("REG", "STACK"))
    ptx = result.asm["ptx"]
    tensor = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "none")
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global(?:\.\S+)? \[[^]]+\], \[[^]]+\], (\w+)", ptx)
    wide = sum(int(n, 0) == 16 for n in copies)
    tma = "cp.async.bulk.tensor" in ptx
    columns = getattr(metadata, "tmem_size", None) or 0
    narrow = len(copies) - wide
    return Resources(
        registers, stack, metadata.shared, tensor, wide, narrow, tma, metadata.num_warps, columns, listing
    )


def loops(sass: str) -> list[list[str]]:
    """Returns the instructions of each loop, from the target of a backward branch up to the branch."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*?)\s*;", sass)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    found = []
    for i, (_, instruction) in enumerate(lines):
        branch = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", instruction)
        start = places.get(int(branch[1], 16), i) if branch else i
        if start < i:
            found.append([instruction for _, instruction in lines[start : i + 1]])
    return found


def row(case: Case, capability: int) -> tables.Row:
    used, tiles = resources(case, capability), case.tiles
    return {
        "chip": chip_name(capability),
        "kernel": case.name,
        "dtype": case.dtype,
        "D": case.dim,
        "tiles": f"{tiles.block_m} x {tiles.block_n}",
        "warps, stages": f"{tiles.warps}, {tiles.stages}",
        "registers": used.registers,
        "spilled": used.spilled,
        "shared": used.shared,
        "product": used.tensor + ", TMA" * used.tma,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    # sm_89 has the kernels of sm_86; the combine kernels and enqueue are left out, too: they never spill.
    chips = [capability for capability in CAPABILITIES if capability != 89]
    parser.add_argument("--capability", type=int, nargs="*", default=chips)
    parser.add_argument("--dim", type=int, nargs="*", default=DIMS)
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp16", "fp32"])
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args()
    sizes = product(options.capability, options.dtype, options.dim)
    rows = tables.printed(
        row(case, capability)
        for capability, dtype, dim in sizes
        for case in cases(capability, dim, dtype)
        if not case.name.startswith(("combine", "enqueue"))
    )
    if options.json:
        tables.write(options.json, rows, triton=triton.__version__)


if __name__ == "__main__":
    main()
