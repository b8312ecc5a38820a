"""Runs the examples with other packages, and compares the packages' losses with relssl's (make adopters).

    python tools/adopters.py [EXAMPLE.py ...] [--record bench/results]

Each example runs in a process of its own. Then value and gradient, the time of a step's loss with its
backward pass, taken alternately in this process, and the memory that it needs are compared on the same
tensors. Writes adopters.json into the folder of --record. Where that is bench/results, the table in
docs/adopting.md is written, too. The exit status is 1 if an example fails, a package cannot be imported, or a
difference is too large.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import figures
import machine
import memory
import other_packages
from other_packages import SIDES, Comparison
from timing import interleave, slowdown

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "adopters"
# Those that need another package, or none.
OTHERS = [ROOT / "examples" / f"{n}.py" for n in ("hf_dataset", "lightning_module", "own_loop", "tar_shards")]
ROUNDS = 5
SECONDS = 120  # An example takes 10.
# torchvision, by relssl's import of it: its operators may not suit torch's build.
IMPORTED_FIRST = "relssl.datasets.torchvision_import"
START = """
import importlib, runpy, sys
importlib.import_module(sys.argv.pop(1))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(path: Path, seconds: float = SECONDS) -> dict:
    """Runs a file in an empty folder, and returns its seconds and its last line, or its error."""
    began = time.perf_counter()
    command = [sys.executable, "-c", START, IMPORTED_FIRST, str(path.resolve())]
    found: dict = {"example": path.name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = subprocess.run(
                command,
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return found | {"error": f"takes longer than {seconds:g} s"}
    found["seconds"] = round(time.perf_counter() - began, 1)
    lines = (run.stderr if run.returncode else run.stdout).strip().splitlines()
    last = lines[-1] if lines else f"exit status {run.returncode}"
    return found | {"error" if run.returncode else "last_line": last}


def differences(comparison: Comparison) -> dict:
    """Returns the loss, and how far value and gradient of both sides are apart at most."""
    theirs, ours = (other_packages.runner(comparison, side)() for side in SIDES)
    pairs = list(zip(theirs[1], ours[1], strict=True))
    return {
        "loss": float(theirs[0]),
        "loss_difference": abs(float(theirs[0]) - float(ours[0])),
        "gradient": max(float(g.abs().max()) for g, _ in pairs),
        "gradient_difference": max(float((g - h).abs().max()) for g, h in pairs),
    }


def too_large(found: dict) -> bool:
    """Returns whether a loss differs by more than 1e-6, relative to it where it is larger than 1, or a
    gradient by more than 1e-7 and 1e-5 of its largest element. NaN is too large.
    """
    loss = found["loss_difference"] <= 1e-6 * max(1.0, abs(found["loss"]))
    gradient = found["gradient_difference"] <= max(1e-7, 1e-5 * found["gradient"])
    return not (loss and gradient and math.isfinite(found["loss"]))


def peak(comparison: Comparison, side: str) -> int:
    """Returns the bytes that a step needs beyond leaves and queue."""
    index = other_packages.COMPARISONS.index(comparison)
    small = replace(comparison.shape, rows=8, size=min(comparison.shape.size, 1024))
    setup = f"import other_packages as o\nc = o.COMPARISONS[{index}]\n"
    for variable, shape in {"run": comparison.shape, "small": small}.items():
        setup += f"{variable} = o.runner(c, {side!r}, o.Shape(**{asdict(shape)}))\n"
    return memory.peak_extra_memory("result = run()", setup=setup, warm_up="small()")


def compare(comparison: Comparison, rounds: int = ROUNDS) -> dict:
    """Returns differences, milliseconds, slowdown and, where it can be measured, bytes of both sides."""
    found = {
        "package": comparison.package,
        "version": version(comparison.package),
        "title": comparison.title,
        "shape": str(comparison.shape),
        **differences(comparison),
    }
    taken = interleave({side: other_packages.runner(comparison, side) for side in SIDES}, rounds)
    found["ms"] = {side: 1e3 * median(seconds) for side, seconds in taken.items()}
    found["slowdown"] = slowdown(taken["theirs"], taken["ours"])
    if memory.measurable() and comparison in other_packages.COMPARISONS:
        found["bytes"] = {side: peak(comparison, side) for side in SIDES}
    return found


def compare_all(comparisons: Iterable[Comparison], rounds: int = ROUNDS) -> list[dict]:
    """Compares, and prints a line for each; the error of one does not end the others."""
    entries = []
    for comparison in comparisons:
        try:
            entry = compare(comparison, rounds)
            if too_large(entry):
                entry["error"] = "the difference is too large"
        except Exception as error:
            entry = {"package": comparison.package, "title": comparison.title}
            entry["error"] = f"{type(error).__name__}: {error}"
        numbers = ("loss_difference", "gradient_difference", "slowdown", "error")
        print(comparison.name, {name: entry[name] for name in numbers if name in entry}, flush=True)
        entries.append(entry)
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument(
        "examples", nargs="*", type=Path, help="default: all of examples/adopters, and OTHERS"
    )
    parser.add_argument("--record", type=Path, default=ROOT / "out/adopters", help="folder of adopters.json")
    options = parser.parse_args(arguments)
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")  # stable-pretraining's
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        examples = []
        for found in threads.map(run_example, options.examples or [*sorted(EXAMPLES.glob("*.py")), *OTHERS]):
            print(*found.values(), sep=": ", flush=True)
            examples.append(found)
    comparisons = compare_all(other_packages.COMPARISONS)
    document = {**machine.about("cpu"), "examples": examples, "comparisons": comparisons}
    options.record.mkdir(parents=True, exist_ok=True)
    file = options.record / "adopters.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(figures.adopters_table(document))
    if options.record.resolve() == figures.RESULTS:
        page = ROOT / "docs" / "adopting.md"
        page.write_text(figures.filled(page))
    return int(any("error" in entry for entry in examples + comparisons))


if __name__ == "__main__":
    sys.exit(main())
