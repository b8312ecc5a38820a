"""Everything that is to be done with a GPU, in under eight minutes: build, test, time, draw, report.

    python bench/gpu_report.py OUT [--parts build tests bench] [--seconds 470]

OUT gets tests.txt, bench.txt, the results as JSON with their plots, and report.md, which is printed last.
Each part is guarded: a failure leaves the rest. `--parts sanitizer` runs the CUDA kernels under
compute-sanitizer, another four minutes. Results to keep go to bench/results; `make figures` then writes the
README's tables.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGAN = time.monotonic()
# Of the installed package (-P): in the source folder there may be no extensions.
PYTEST = [sys.executable, "-P", "-m", "pytest", "-q"]


def told(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:4.0f} s] {text}", flush=True)


def run(command: list, log: Path, seconds: float, environment: dict[str, str] | None = None) -> None:
    """What a command prints goes to `log` as it comes; it is stopped after so many seconds."""
    with open(log, "w") as report:
        process = subprocess.Popen(
            list(map(str, command)), cwd=log.parent, stdout=report, stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
        )  # fmt: skip
        until = time.monotonic() + seconds
        while process.poll() is None and (left := until - time.monotonic()) > 0:
            try:
                process.wait(min(left, 20))
            except subprocess.TimeoutExpired:
                told(f"  {last(log)[-100:]}")
        if process.poll() is None:
            process.kill()
            process.wait()
            report.write(f"\nstopped after {seconds:.0f} s\n")


def last(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "(nothing said)"


def build(out: Path, left: float) -> str:
    """Install the package from this source folder, unless an installed one has the CUDA kernels."""
    probe = "import relssl.kernels, relssl._cuda, relssl; print(relssl.__file__)"
    log = out / "build.txt"
    run([sys.executable, "-P", "-c", probe], log, 60)
    if "Error" not in last(log):
        return f"already installed: {last(log)}"
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", ROOT]
    run(pip, log, min(left, 240))
    return last(log)


def tests(out: Path, left: float) -> str:
    """The tests that need a GPU, and no other; a skip for want of one would be a failure."""
    command = [*PYTEST, "-m", "gpu", "--maxfail=40", "-p", "no:cacheprovider"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    names = ("test_gpu.py", "test_cuda.py", "test_triton.py", "test_losses.py")
    command += [ROOT / "tests" / name for name in names]
    run(command, out / "tests.txt", min(left, 200), {"RELSSL_REQUIRE_GPU": "1"})
    return last(out / "tests.txt")


def bench(out: Path, left: float) -> str:
    """pytest bench/ with the grid of a GPU: host time and graph replay are in it."""
    command = [*PYTEST, ROOT / "bench", "--record", out, "--seconds", left - 40, "-p", "no:cacheprovider"]
    run(command, out / "bench.txt", left - 15)
    for recorded in out.glob("*.json"):  # Anew, lest the run was stopped before it drew them.
        from plots import draw

        draw(recorded)
    return last(out / "bench.txt")


# A few rows and tiles of each width, by both kernels and on both paths of the exponent.
SANITIZED = """
import os, sys, torch
from relssl.functional import info_nce, relation_loss
os.environ["RELSSL_CUDA_KERNEL"] = sys.argv[1]
for dim in 64, 128, 256, 512:
    for dtype in torch.bfloat16, torch.float16:
        q, k, queue = (torch.randn(n, dim, device="cuda", dtype=dtype) for n in (70, 70, 1000))
        q = torch.nn.functional.normalize(q, dim=1).requires_grad_()
        relation_loss(q, k, queue, backend="cuda").backward()
        info_nce(q, k, queue, backend="cuda").backward()
torch.cuda.synchronize()
"""


def sanitizer(out: Path, left: float) -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "compute-sanitizer is not here"
    found = []
    for kernel, kind in itertools.product(("sm_80", "sm_90a"), ("memcheck", "racecheck")):
        log = out / f"{kind}-{kernel}.txt"
        run([tool, "--tool", kind, sys.executable, "-P", "-c", SANITIZED, kernel], log, 60)
        found.append(f"{kind}, {kernel}: {last(log)}")
    return "; ".join(found)


PARTS = {"build": build, "tests": tests, "bench": bench, "sanitizer": sanitizer}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["build", "tests", "bench"])
    parser.add_argument("--seconds", type=float, default=470, help="that all parts may take")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in options.parts:
        told(f"{name} ...")
        try:
            found = PARTS[name](out, options.seconds - (time.monotonic() - BEGAN))
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
