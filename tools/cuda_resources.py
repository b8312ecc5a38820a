"""Resources of the CUDA kernels in the installed extension, read from its machine code, without a GPU:

    python tools/cuda_resources.py [--json FILE]

prints registers, spilled bytes, shared memory and the instructions used, as a table in Markdown. With `--json
bench/results/cuda-resources.json`, `make figures` writes docs/cuda.md from them. It needs cuobjdump and
nvdisasm: those on PATH, or the ones that come with Triton.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import tables

# The products, and the copies to shared memory that use no registers, by their names in SASS.
INSTRUCTIONS = {"HMMA": "mma.sync", "HGMMA": "wgmma", "LDGSTS": "cp.async", "UTMALDG": "bulk tensor copy"}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/")  # the address that the disassembler puts before each
FORWARD = re.compile(r"_ZN6relssl\d+(sm\d+)7forwardINS_4(BF16|FP16)ELi(\d+)ELb([01])E")
COMBINE = re.compile(r"_ZN6relssl.*?(combine_(?:lse_and_mean|relation|info_nce))(?:INS_4(BF16|FP16)E)?")


class Resources(NamedTuple):
    kernel: str
    chip: str  # what it was compiled for
    dtype: str
    dim: int  # 0: any
    mean: bool
    registers: int
    spilled: int  # bytes of stack: nothing else goes there
    shared: int  # bytes
    instructions: dict[str, int]  # how often each of INSTRUCTIONS occurs
    serialized: int  # products that are waited for one by one
    exposed: int  # exponentials between the last wait before a product and that product: not overlapped
    turns: list[int]  # instructions between each turn at issuing products and the first product
    early_releases: int  # tiles released between two waits, while the next one's similarities are in flight
    waiting_votes: int  # a warp's votes on masking a tile that wait for a load
    in_flight: int  # the most loads of 16 bytes that are issued before one is used


def extension() -> Path | None:
    spec = importlib.util.find_spec("relssl._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def tools() -> Path | None:
    """Returns the folder with cuobjdump and nvdisasm."""
    found = shutil.which("cuobjdump")
    if found and shutil.which("nvdisasm"):
        return Path(found).parent
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    return folder if folder and (folder / "cuobjdump").exists() else None


@cache  # of an extension it takes seconds
def dump(option: str, file: Path) -> str:
    folder = tools()
    if folder is None:
        raise SystemExit("neither the CUDA toolkit's cuobjdump nor Triton's was found")
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(folder / "cuobjdump"), option, str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def kernels(file: Path) -> Iterator[Resources]:
    """Yields the resources of every kernel for every chip."""
    from relssl import _cuda  # type: ignore[attr-defined]

    code: dict[tuple[str, str], str] = {}
    chip = ""
    for part in re.split(r"(?m)^(?=\s*(?:arch = |Function : ))", dump("-sass", file)):
        if found := re.match(r"\s*arch = (\S+)", part):
            chip = found[1]
        elif found := re.match(r"\s*Function : (\S+)", part):
            code[chip, found[1]] = part
    for line in re.split(r"(?m)^(?=\s*(?:arch = |\s*Function ))", dump("-res-usage", file)):
        if found := re.match(r"\s*arch = (\S+)", line):
            chip = found[1]
        if not (found := re.match(r"\s*Function (\S+):\s*REG:(\d+) STACK:(\d+)", line)):
            continue
        name, registers, stack = found[1], int(found[2]), int(found[3])
        text = code[chip, name]
        counts = {i: len(re.findall(rf"\b{i}\b", text)) for i in INSTRUCTIONS}
        # Only the last product of a chain is waited for.
        waits, products = text.count("gsb0") - text.count("DEPBAR.LE gsb0"), counts["HGMMA"]
        if found := FORWARD.match(name):
            own, dtype, dim, mean = found[1], found[2].lower(), int(found[3]), found[4] == "1"
            shared = _cuda.tiles(dim, int(own[2:]))[-1]
            kernel = f"forward_{own}"
        elif found := COMBINE.match(name):
            kernel, dtype, dim, mean, shared = found[1], (found[2] or "").lower(), 0, True, 0
        else:
            continue
        serialized = waits if products and waits == products else 0
        chains = re.findall(r"DEPBAR\.LE gsb0((?:(?!DEPBAR\.LE gsb0|HGMMA).)*)HGMMA", text, re.S)
        exposed = sum(chain.count("MUFU.EX2") for chain in chains)
        # The turn is the only barrier whose number is in a register: it depends on the warpgroup.
        opened = re.findall(r"BAR\.SYNC\S* R((?:(?!BAR\.SYNC|HGMMA).)*)HGMMA", text, re.S)
        turns = [len(re.findall(INSTRUCTION, turn)) - 1 for turn in opened] if products else []
        early_releases = len(re.findall(r"DEPBAR\.LE gsb0, 0x1(?:(?!DEPBAR).)*?SYNCS\.ARRIVE", text, re.S))
        waiting_votes = len(re.findall(r"\bLDG\b(?:(?!MMA|BAR\.|VOTE|SHFL).)*VOTE", text, re.S))
        in_flight = max(part.count("LDG.E.128") for part in text.split("FFMA"))
        yield Resources(
            kernel, chip, dtype, dim, mean, registers, stack, shared, counts,
            serialized, exposed, turns, early_releases, waiting_votes, in_flight,
        )  # fmt: skip


def rows(file: Path) -> Iterator[tables.Row]:
    for r in sorted(kernels(file), key=lambda r: (r.kernel, r.chip, r.dtype, r.dim, r.mean)):
        yield {
            "kernel": r.kernel,
            "compiled for": r.chip,
            "dtype": r.dtype,
            "D": r.dim or "any",
            "mean": "yes" if r.mean else "no",
            "registers": r.registers,
            "spilled": r.spilled,
            "shared": r.shared,
            "by": ", ".join(INSTRUCTIONS[i] for i, count in r.instructions.items() if count),
        }


def compiler(file: Path) -> str:
    """Returns the version of nvcc, which is recorded in what it compiles."""
    found = re.search(rb"Cuda compilation tools, release \S+, V(\S+?)\0", file.read_bytes())
    return found[1].decode() if found else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args()
    file = extension()
    if file is None:
        raise SystemExit("relssl._cuda is not built: see `relssl info`")
    found = tables.printed(rows(file))
    if options.json:
        tables.write(options.json, found, nvcc=compiler(file))


if __name__ == "__main__":
    main()
