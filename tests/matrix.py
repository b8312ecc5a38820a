"""Tests relssl with every torch that pyproject.toml admits, each with the Triton that it brings.

    python tests/matrix.py [CELL ...] [--prepare] [--keep]        a CELL is PYTHON-TORCH, as in 3.11-2.9.1

For each cell it makes an environment in build/matrix, with torch and the package as pip installs them. There
it runs the tests of ops, autograd, torch.compile, queue and errors, compiles Triton's kernels for every chip,
and compares them with the oracle in the interpreter. The result is a row of docs/compatibility.md; rows of
other cells stay. It downloads gigabytes, takes minutes a cell, and removes the environments after it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"
CELLS = [f"3.11-{torch}" for torch in ("2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1")] + [
    "3.13-2.14.1"
]
COMPILED = [
    f"tests/test_{name}.py"
    for name in ("ops", "autograd", "callers", "queue", "sharded", "other_queues", "errors", "kernels")
]
INTERPRETED = ["-k", "triton", "-m", "not slow", "tests/test_losses.py", "tests/test_triton.py"]
NEEDS = ["hypothesis", "ninja", "numpy", "psutil", "pybind11", "pytest", "pytest-xdist", "setuptools"]
HEAD = """# Compatibility

`make matrix` installs relssl with each version of torch and the version of Triton that torch requires. It
runs the tests of ops, autograd, torch.compile, the queue and errors, the tests that compile the Triton
kernels for every chip, and the tests that run these kernels in Triton's interpreter. None of it uses a GPU:
the tests that need one are skipped. pyproject.toml excludes no version of torch from 2.9 on.

With Triton 3.5 and 3.6 the matrix uses a version of numpy before 2.4: the interpreter of these versions,
not the compiled kernels, fails with a later one ("only 0-dimensional arrays can be converted to Python
scalars").

| Python | torch | Triton | passed | failed | skipped | commit | date |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"default: {' '.join(CELLS)}")
    parser.add_argument("--prepare", action="store_true", help="only make the environments, and keep them")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    failed = False
    for cell in options.cells or CELLS:
        python, torch = cell.split("-")
        folder = FOLDER / cell
        environment(folder, python, torch)
        if options.prepare:
            continue
        began = time.perf_counter()
        row, failures = tried(folder)
        record(python, torch, row)
        print(f"{cell}: {row}, {time.perf_counter() - began:.0f} s", *failures, sep="\n  ", flush=True)
        failed = failed or bool(failures)
        if not options.keep:
            shutil.rmtree(folder)
    sys.exit(failed)


def environment(folder: Path, python: str, torch: str) -> None:
    """Installs torch, then the rest without anything that would replace it, then the package."""
    run = folder / "bin" / "python"
    pip = [run, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    if not (folder / "made").exists():
        pins = folder.with_name(f"{folder.name}.txt")
        folder.mkdir(parents=True, exist_ok=True)
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        old = re.match(r"2\.(9|10|11)\.", torch)  # The interpreter of their Triton fails with numpy 2.4.
        kept = [line for line in lines if not re.match("torch|triton" + "|numpy" * bool(old), line)]
        pins.write_text("\n".join([*kept, "numpy<2.4"] if old else kept))
        call(f"python{python}", "-m", "venv", "--clear", folder)
        call(*pip, f"torch=={torch}")
        if subprocess.run([run, "-c", "import triton"], capture_output=True).returncode:
            call(*pip, "--no-deps", next(line for line in lines if line.startswith("triton==")))
        call(*pip, "-c", pins, *NEEDS)
        (folder / "made").touch()
    call(
        *pip,
        "--no-deps",
        "--no-build-isolation",
        "--force-reinstall",
        ROOT,
        RELSSL_CUDA="0",
        RELSSL_EMULATE="1",
    )


def tried(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the cell's row, without Python and torch, and the names of failed tests."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failures = []
    for name, arguments, more in (
        ("compiled", COMPILED, {}),
        ("interpreted", INTERPRETED, {"TRITON_INTERPRET": "1"}),
    ):
        report = folder / f"{name}.xml"
        report.unlink(missing_ok=True)
        command = [folder / "bin/pytest", "-q", "-n", str(os.cpu_count()), "--dist", "loadgroup"]
        with (folder / f"{name}.log").open("w") as log:
            environ = os.environ | {"OMP_NUM_THREADS": "1"} | more
            subprocess.run([*command, f"--junitxml={report}", *arguments], cwd=ROOT, env=environ, stdout=log)
        for case in ElementTree.parse(report).iter("testcase"):
            tags = {child.tag for child in case}
            bad = tags & {"failure", "error"}
            outcome = "failed" if bad else "skipped" if "skipped" in tags else "passed"
            counts[outcome] += 1
            if outcome == "failed":
                failures.append(f"{name}: {case.get('classname')}::{case.get('name')}")
    versions = "import json, torch, triton; print(json.dumps([torch.__version__, triton.__version__]))"
    torch, triton = json.loads(call(folder / "bin/python", "-c", versions))
    commit = call("git", "-C", ROOT, "rev-parse", "--short", "HEAD").strip()
    row = {"torch": torch, "triton": triton, **{k: str(v) for k, v in counts.items()}, "commit": commit}
    return row | {"date": date.today().isoformat()}, failures


def record(python: str, torch: str, row: dict[str, str]) -> None:
    """Writes the row into the page, in the order of CELLS."""
    rows = {}
    if PAGE.exists():
        for line in PAGE.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("| 3."):
                rows[f"{cells[0]}-{cells[1].partition('+')[0]}"] = line
    rows[f"{python}-{torch}"] = f"| {python} | {' | '.join(row.values())} |"
    order = [*CELLS, *rows]
    PAGE.write_text(HEAD + "\n".join(rows[cell] for cell in sorted(rows, key=order.index)) + "\n")


def call(*command: object, **environ: str) -> str:
    """Returns the output of a command that runs in an empty folder, to import the installed package."""
    parts = [str(part) for part in command]
    run = subprocess.run(parts, cwd=FOLDER, env=os.environ | environ, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(parts)} failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.stdout


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    main()
