"""Everything that is to be done with a GPU, in under eight minutes: build, test, time, draw, report.

    python bench/gpu_report.py OUT [--parts build tests bench] [--seconds 470] [--wheels FOLDER]

OUT gets log.txt, the results as JSON with their plots, and report.md, which is printed last. Each part is
guarded: a failure leaves the rest. Peers that are not installed are left out; without a network, --wheels
names a folder that holds those of bench/peers.txt. `--parts build tune bench` has `relssl tune --published`
choose the kernels first, another six minutes, and keeps its figures in OUT/tuned; `--parts sanitizer` runs
the CUDA kernels under compute-sanitizer, another four. Results to keep go to bench/results; `make figures`
then writes the README's tables.
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
# Of the installed package (-P): in the source folder there may be no extensions.
PYTHON = [sys.executable, "-P"]


def told(text: str) -> None:
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
        """The last line that a command says. All goes to the log; it is stopped after so many seconds."""
        with open(self.log, "a") as log:
            print(f"\n$ {' '.join(map(str, command))[:300]}", file=log, flush=True)
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.out,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
            until = time.monotonic() + seconds
            while process.poll() is None and (left := until - time.monotonic()) > 0:
                try:
                    process.wait(min(left, 20))
                except subprocess.TimeoutExpired:
                    told(f"  {self.last()[-100:]}")
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # With what it started itself.
                process.wait()
                print(f"\nstopped after {seconds:.0f} s", file=log)
        return self.last()

    def last(self) -> str:
        return self.log.read_text().strip().splitlines()[-1]


def build(report: Report) -> str:
    """Install the package from this source folder, unless what is installed is newer than all of it."""
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


# The files with tests that need a GPU, and the processes that run them, one for each backend: after an error
# of CUDA's a process can launch nothing more. The selections are disjoint, and leave none out.
FILES = ("test_gpu.py", "test_cuda.py", "test_triton.py", "test_losses.py")
SELECTIONS = {"triton": "not cuda", "cuda": "cuda and not sm_90", "cuda, sm_90a": "cuda and sm_90"}


def selected(expression: str) -> list[object]:
    """The arguments with which pytest runs a selection."""
    return ["-m", "gpu", "-k", expression, *(ROOT / "tests" / name for name in FILES)]


def tests(report: Report) -> str:
    """The tests that need a GPU, and no other; a skip for want of one would be a failure."""
    until = time.monotonic() + min(report.left, 270)
    here = [*PYTHON, ROOT / "bench" / "compile_kernels.py"]
    found = [report.run(*here, seconds=min(report.left, 120))]
    options = ["-q", "--maxfail=40", "-p", "no:cacheprovider"]
    options += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # From a thread: no signal ends what waits in the driver.
    options += (
        ["--timeout=60", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    )
    for name, expression in SELECTIONS.items():
        command = [*PYTHON, "-m", "pytest", *options, *selected(expression)]
        last = report.run(*command, seconds=max(0, until - time.monotonic()), RELSSL_REQUIRE_GPU="1")
        found.append(f"{name}: {last}")
    return "; ".join(found)


def tune(report: Report) -> str:
    """Every kernel verified and timed at the published sizes; "auto" takes what is chosen from here on."""
    os.environ["RELSSL_CACHE"] = str(report.out / "tuned")  # What follows runs by its choices.
    found = report.run(*PYTHON, "-m", "relssl", "tune", "--published", seconds=min(report.left, 400))
    from relssl import tuned
    from relssl.tune import table

    return "\n\n".join([found, *(table(entry) for entries in tuned.read().values() for entry in entries)])


def bench(report: Report) -> str:
    """pytest bench/ with the grid of a GPU: host time and graph replay are in it."""
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

        for recorded in report.out.glob("*.json"):  # Anew, lest the run was stopped before it drew them.
            draw(recorded)
    except ImportError as missing:
        found += f"; no plots: {missing}"
    return found


# A few rows and tiles of each width, by both kernels and on both paths of the exponent.
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
        return "compute-sanitizer is not here"
    found = []
    for kernel, kind in itertools.product(("cuda", "cuda/sm_90a"), ("memcheck", "racecheck")):
        last = report.run(tool, "--tool", kind, *PYTHON, "-c", SANITIZED, kernel, seconds=60)
        found.append(f"{kind}, {kernel}: {last}")
    return "; ".join(found)


PARTS = {"build": build, "tests": tests, "tune": tune, "bench": bench, "sanitizer": sanitizer}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["build", "tests", "bench"])
    parser.add_argument("--seconds", type=float, default=470, help="that all parts may take")
    parser.add_argument("--wheels", type=Path, help="folder with the peers' wheels")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, options.seconds, options.wheels and options.wheels.resolve())
    lines = []
    for name in options.parts:
        told(f"{name} ...")
        try:
            found = PARTS[name](report)
        except Exception:
            found = traceback.format_exc(limit=-2)
        told(f"{name}: {found}")
        lines.append(f"- {name}: {found}")
    try:
        from figures import section

        for path in sorted(out.glob("*.json")):
            lines += ["", section(path, json.loads(path.read_text()), out)]
    except Exception:
        lines.append(traceback.format_exc(limit=-2))
    (out / "report.md").write_text("\n".join(lines) + "\n")
    told(f"report.md, after {time.monotonic() - BEGAN:.0f} s:")
    print((out / "report.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
