"""Tests and benchmarks a GPU in under eight minutes: builds, tests, times, draws, reports.

    python tools/gpu_report.py OUT [--parts build tests bench] [--seconds 470] [--wheels FOLDER]

It writes log.txt, the results as JSON with their plots, and report.md to OUT, and prints the report. When a
part fails, the others still run. Peers that are not installed are left out; without a network, --wheels names
a folder with the wheels of bench/peers.txt. `--parts build tune bench` lets `relssl tune --published` choose
the kernels first, another six minutes, and keeps its results in OUT/tuned; `--parts sanitizer` runs the CUDA
kernels under compute-sanitizer, another four. Copy results to keep to bench/results; `make figures` then
writes the tables of README.md and docs/.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGAN = time.monotonic()
sys.path.append(str(ROOT / "bench"))
# -P: the installed package, since the source folder may have no extensions.
PYTHON = [sys.executable, "-P"]


def log(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:4.0f} s] {text}", flush=True)


class Report:
    """A folder, its log, and the seconds that are left."""

    def __init__(self, out: Path, seconds: float, wheels: Path | None) -> None:
        self.out, self.log, self.wheels = out, out / "log.txt", wheels
        self.until = BEGAN + seconds

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def run(self, *command: object, seconds: float, **environment: str) -> str:
        """Runs a command for at most so many seconds, and returns the last line of its output."""
        with open(self.log, "a") as output:
            print(f"\n$ {' '.join(map(str, command))[:300]}", file=output, flush=True)
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.out,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
            until = time.monotonic() + seconds
            while process.poll() is None and (left := until - time.monotonic()) > 0:
                try:
                    process.wait(min(left, 20))
                except subprocess.TimeoutExpired:
                    log(f"  {self.last()[-100:]}")
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children
                process.wait()
                print(f"\nstopped after {seconds:.0f} s", file=output)
        return self.last()

    def last(self) -> str:
        return self.log.read_text().strip().splitlines()[-1]


def build(report: Report) -> str:
    """Installs the package from this source folder, unless the installed one is newer than all of it."""
    found = []
    if report.wheels:
        wheels = [*PYTHON, "-m", "pip", "install", "--no-deps", "--no-index", "--find-links", report.wheels]
        found.append(report.run(*wheels, "-r", ROOT / "bench" / "peers.txt", seconds=60))
    probe = "import relssl.kernels, relssl._cuda; print('built', relssl._cuda.__file__)"
    built = report.run(*PYTHON, "-c", probe, seconds=60)
    sources = [p for name in ("relssl", "kernels", "csrc") for p in (ROOT / name).rglob("*.*")]
    newest = max(p.stat().st_mtime for p in sources if p.suffix not in (".pyc", ".so"))
    if not built.startswith("built ") or Path(built.removeprefix("built ")).stat().st_mtime < newest:
        pip = [*PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", ROOT]
        built = report.run(*pip, seconds=min(report.left, 120))
    return "; ".join([*found, built])


# The files with tests that need a GPU, and their selections, one process each: after an error of CUDA a
# process can launch nothing more. The selections are disjoint and complete.
FILES = (
    "test_gpu.py", "test_gpu_step.py", "test_cuda.py", "test_triton.py", "test_losses.py", "test_ids.py",
    "test_split_batch_norm.py",
)  # fmt: skip
SELECTIONS = {
    "triton": "not cuda and not gpu_step",
    "cuda": "cuda and not sm_90",
    "cuda, sm_90a": "cuda and sm_90",
    "step": "gpu_step",
}


def selected(expression: str) -> list[object]:
    """Returns the arguments with which pytest runs a selection."""
    return ["-m", "gpu", "-k", expression, *(ROOT / "tests" / name for name in FILES)]


def tests(report: Report) -> str:
    """Runs the tests that need a GPU; without one they fail instead of being skipped."""
    until = time.monotonic() + min(report.left, 270)
    here = [*PYTHON, ROOT / "tools" / "compile_kernels.py"]
    found = [report.run(*here, seconds=min(report.left, 120))]
    options = ["-q", "--maxfail=40", "-p", "no:cacheprovider"]
    options += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # From a thread: no signal interrupts a wait in the driver.
    options += (
        ["--timeout=60", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    )
    for name, expression in SELECTIONS.items():
        command = [*PYTHON, "-m", "pytest", *options, *selected(expression)]
        last = report.run(*command, seconds=max(0, until - time.monotonic()), RELSSL_REQUIRE_GPU="1")
        found.append(f"{name}: {last}")
    return "; ".join(found)


def tune(report: Report) -> str:
    """Verifies and times every kernel at the published sizes; from then on "auto" takes the chosen ones."""
    os.environ["RELSSL_CACHE"] = str(report.out / "tuned")  # The following parts use its choices.
    found = report.run(*PYTHON, "-m", "relssl", "tune", "--published", seconds=min(report.left, 400))
    from relssl import tuned
    from relssl.tune import table

    return "\n\n".join([found, *(table(entry) for entries in tuned.read().values() for entry in entries)])


def bench(report: Report) -> str:
    """Runs pytest bench/ with the grid of a GPU, host time and graph replay included."""
    command = [
        *PYTHON,
        "-m",
        "pytest",
        "-q",
        ROOT / "bench",
        "-p",
        "no:cacheprovider",
        "--record",
        report.out,
    ]
    found = report.run(*command, "--seconds", report.left - 40, seconds=report.left - 15)
    try:
        from plots import draw

        for recorded in report.out.glob("*.json"):  # The run may have been stopped before it drew them.
            draw(recorded)
    except ImportError as missing:
        found += f"; no plots: {missing}"
    return found


# A few rows and tiles of each width, with both kernels and both paths of the exponent.
SANITIZED = """
import sys, torch
from relssl.functional import info_nce, relation_loss
for dim in 64, 128, 256, 512:
    for dtype in torch.bfloat16, torch.float16:
        q, k, queue = (torch.randn(n, dim, device="cuda", dtype=dtype) for n in (70, 70, 1000))
        q = torch.nn.functional.normalize(q, dim=1).requires_grad_()
        relation_loss(q, k, queue, backend=sys.argv[1]).backward()
        info_nce(q, k, queue, backend=sys.argv[1]).backward()
torch.cuda.synchronize()
"""


def sanitizer(report: Report) -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "compute-sanitizer was not found"
    found = []
    for kernel, check in itertools.product(("cuda", "cuda/sm_90a"), ("memcheck", "racecheck")):
        last = report.run(tool, "--tool", check, *PYTHON, "-c", SANITIZED, kernel, seconds=60)
        found.append(f"{check}, {kernel}: {last}")
    return "; ".join(found)


PARTS = {"build": build, "tests": tests, "tune": tune, "bench": bench, "sanitizer": sanitizer}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["build", "tests", "bench"])
    parser.add_argument("--seconds", type=float, default=470, help="limit for all parts together")
    parser.add_argument("--wheels", type=Path, help="folder with the peers' wheels")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, options.seconds, options.wheels and options.wheels.resolve())
    lines = []
    for name in options.parts:
        log(f"{name} ...")
        try:
            found = PARTS[name](report)
        except Exception:
            found = traceback.format_exc(limit=-2)
        log(f"{name}: {found}")
        lines.append(f"- {name}: {found}")
    try:
        from figures import section

        for path in sorted(out.glob("*.json")):
            lines += ["", section(path, json.loads(path.read_text()), out)]
    except Exception:
        lines.append(traceback.format_exc(limit=-2))
    (out / "report.md").write_text("\n".join(lines) + "\n")
    log(f"report.md, after {time.monotonic() - BEGAN:.0f} s:")
    print((out / "report.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
