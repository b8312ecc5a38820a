"""Verifies and times every kernel that could compute the losses on this machine, and keeps the fastest.

Each candidate runs in a process of its own (trial.py) with a time limit, so that one that hangs or crashes
costs itself alone. So many at a time as there are processors compile and are held to float64; then those that
passed are timed against the present choice, one after another. tuned.py keeps what was chosen, where
backend="auto" finds it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date
from importlib import import_module
from itertools import groupby, product
from threading import Timer
from typing import Any, NamedTuple

import torch

from relssl import backends, tuned

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BETTER = 0.98  # A candidate takes the baseline's place if it takes at most so much of its time.
FALLBACK = "chunked"  # the baseline where the present choice is refused
# Of the published settings: rows of q and k together, rows of the queue, and the width.
PUBLISHED = [
    (512, 4096, 128),  # ReSSL on small images: a batch of 256
    (512, 65_536, 128),  # MoCo v2
    (512, 131_072, 512),  # ReSSL on ImageNet
    (2048, 262_144, 128),
]
FULL = list(product((64, 512, 2048, 8192), (4096, 65_536, 262_144, 1_048_576), (64, 128, 256, 512)))


class Shape(NamedTuple):
    dtype: str
    dim: int
    rows: int  # of queries and keys together
    queue: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows of q and k, a queue of {self.queue:,}, D = {self.dim}, {self.dtype}"


class Trial:
    """A candidate's process. It ends with `close`, or as soon as an answer takes longer than the limit."""

    def __init__(self, task: dict[str, Any], limit: float) -> None:
        self.task, self.limit, self.overdue = task, limit, False
        self.verdict: dict[str, Any] = {}
        code = f"import sys; sys.path[:] = {sys.path!r}; from relssl.trial import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"RELSSL_TUNE": "0"}, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        # Read all along: the process would wait while the pipe is full.
        self.stderr_reader = ThreadPoolExecutor(1)
        self.stderr_text = self.stderr_reader.submit(self.process.stderr.read)  # type: ignore[union-attr]

    def verify(self) -> None:
        self.verdict = self.request(self.task)

    def request(self, question: dict[str, Any]) -> dict[str, Any]:
        """Returns the process's answer, or {"refused": why there is none}."""
        timer = Timer(self.limit, self.expire)
        timer.start()
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()  # type: ignore[union-attr]
            return json.loads(answer) if answer else {"refused": self.exit_reason()}
        except BrokenPipeError:
            return {"refused": self.exit_reason()}
        finally:
            timer.cancel()

    def expire(self) -> None:
        self.overdue = True
        self.kill()

    def exit_reason(self) -> str:
        """Waits for the process, which has closed its output without an answer; returns how it ended."""
        status = self.process.wait()
        if self.overdue:
            return f"no answer within {self.limit:g} s"
        self.kill()  # what it started itself, and would leave behind
        if status < 0:
            return f"crashed: {signal.Signals(-status).name}"
        last = self.stderr_text.result().strip().splitlines()[-1:]
        return f"crashed: exit status {status}" + "".join(f", {line}" for line in last)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self.process.wait()
        self.stderr_reader.shutdown()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def candidates(device: str, dtype: torch.dtype, dim: int) -> list[str]:
    """Returns the backends that take such rows on this machine, each with its variants."""
    names = []
    for name, backend in backends.BACKENDS.items():
        if backend.supports(device, dtype, dim) is None:
            names += [name, *(f"{name}/{variant}" for variant in backend.variants(dtype, dim))]
    return names


def tune(
    device: str, shapes: Iterable[Shape], *,
    imports: Iterable[str] = (), limit: float = 240, jobs: int | None = None,
    report: Callable[[int, int, str], Any] = lambda done, total, what: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yields the entry of each shape, as tuned.py stores it; its `choice` is None if all were refused.

    Args:
        imports: modules to import in each process first, which may add to `relssl.backends.BACKENDS`.
        limit: seconds for a candidate to compile and be verified, for each shape, and again to be timed.
        jobs: processes that do so at a time; by default as many as there are processors, up to 16.
        report: is called with the steps done, all steps, and what is done next.
    """
    jobs = jobs or min(os.cpu_count() or 1, 16)
    groups = [(*key, list(group)) for key, group in groupby(sorted(shapes), key=lambda shape: shape[:2])]
    total = sum(
        (1 + len(own)) * len(candidates(device, getattr(torch, name), dim)) for name, dim, own in groups
    )
    done = 0
    for name, dim, own in groups:
        dtype = getattr(torch, name)
        present = [present_choice(device, dtype, shape) for shape in own]
        # First those that the others are timed against.
        names = list(dict.fromkeys([*present, FALLBACK, *candidates(device, dtype, dim)]))
        task = {"device": device, "dtype": name, "dim": dim, "import": list(imports)}
        task["shapes"] = [[shape.rows, shape.queue] for shape in own]
        found: list[dict[str, dict]] = [{} for _ in own]
        for start in range(0, len(names), jobs):
            some = names[start : start + jobs]
            report(done, total, f"D {dim}: verify {', '.join(some)}")
            trials = [Trial({"backend": backend, **task}, limit * len(own)) for backend in some]
            try:
                verify(trials)
                done += len(some)
                for backend, trial in zip(some, trials, strict=True):
                    for i, baseline in enumerate(present):
                        report(done, total, f"D {dim}: time {backend}")
                        found[i][backend] = timed(trial, i, baseline)
                        done += 1
                        if backend == baseline and "refused" in found[i][backend]:
                            present[i] = FALLBACK
                    trial.close()
            finally:
                for trial in trials:
                    trial.close()
        for shape, baseline, figures in zip(own, present, found, strict=True):
            yield {**shape._asdict(), "choice": choice(figures, baseline), "baseline": baseline,
                   "date": date.today().isoformat(), "candidates": figures}  # fmt: skip


def present_choice(device: str, dtype: torch.dtype, shape: Shape) -> str:
    """Returns what "auto" takes."""
    chosen = backends.measured(tuned.matching(device, dtype), device, dtype, *shape[1:])
    return chosen or backends.choose("auto", device, dtype, shape.dim)


def verify(trials: list[Trial]) -> None:
    """Verifies all candidates at the same time."""
    with ThreadPoolExecutor(len(trials)) as pool:
        try:
            list(pool.map(Trial.verify, trials))
        except BaseException:  # Ctrl-C: the threads wait for the processes.
            for trial in trials:
                trial.kill()
            raise


def timed(trial: Trial, i: int, baseline: str) -> dict[str, Any]:
    """Returns a candidate's figures at shape i, or {"refused": reason}."""
    if "refused" in trial.verdict:
        return trial.verdict
    figures = trial.request({"shape": i, "baseline": baseline})
    if "refused" in figures:
        trial.verdict = figures  # Nothing that follows can be trusted.
        return figures
    return {"error": trial.verdict["errors"][i], **figures}


def choice(figures: dict[str, dict], baseline: str) -> str | None:
    """Returns the fastest of those that kept the budget, the baseline unless another is clearly faster.

    The reference takes no part: it keeps the similarities, which is what the others are for.
    """
    ratios = {name: f["ratio"] for name, f in figures.items() if "ratio" in f and name != "reference"}
    best = min(ratios, key=lambda name: ratios[name], default=None)
    return baseline if baseline in ratios and best and ratios[best] > BETTER else best


def table(entry: dict[str, Any]) -> str:
    """Returns the candidates of a shape, the fastest first and the refused last, as text."""
    found, chosen = entry["candidates"], entry["choice"]
    least = found[chosen]["ratio"] if chosen else 1.0
    lines = [("", "ms", "times the choice", "of matmul", "error", "MiB", "")]
    for name in sorted(found, key=lambda name: found[name].get("ratio", float("inf"))):
        f = found[name]
        if "refused" in f:
            lines.append((name, "", "", "", "", "", f"refused: {f['refused']}"))
            continue
        verdict = "chosen" if name == chosen else "keeps the similarities" if name == "reference" else ""
        memory = "" if f["memory"] is None else f"{f['memory'] / 2**20:.1f}"
        lines.append((name, f"{1e3 * f['seconds']:.3g}", f"{f['ratio'] / least:.2f}",
                      f"{f['of_matmul']:.2f}", f"{f['error']:.0e}", memory, verdict))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [str(Shape(*(entry[name] for name in Shape._fields)))]
    for name, *numbers, verdict in lines:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True)]
        text.append("  ".join(["", name.ljust(widths[0]), *aligned, verdict]).rstrip())
    return "\n".join(text)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="relssl tune", description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--published", action="store_true", help="the sizes of ReSSL and MoCo, and a large one")
    some.add_argument("--full", action="store_true", help="a grid of 64 sizes: hours")
    gpu = torch.cuda.is_available()
    parser.add_argument("--dim", type=int, default=128, help="width D of the embeddings (%(default)s)")
    parser.add_argument("--rows", type=int, default=512, help="queries and keys together (%(default)s)")
    parser.add_argument("--queue", type=int, default=65_536, help="rows of the queue (%(default)s)")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, *DTYPES.values()], default="bf16" if gpu else "fp32",
        metavar="{bf16,fp16,fp32}", help="dtype that the loss is computed in (here %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--limit", type=float, default=240, help="seconds a candidate may take (%(default)s)")
    parser.add_argument("--jobs", type=int, help="processes that compile and verify at a time")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="a module that adds a backend of your own to relssl.backends.BACKENDS",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not gpu:
        raise ValueError("--device cuda: torch finds no GPU")
    for name, least in {"dim": 1, "rows": 2, "queue": 1, "jobs": 1, "limit": 1}.items():
        value = getattr(options, name)
        if value is not None and not value >= least:  # nor NaN
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if options.rows % 2:
        raise ValueError(f"--rows counts as many queries as keys, so it must be even; got {options.rows}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # The candidates' processes end with this one.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    dtype = DTYPES.get(options.dtype, options.dtype)
    sizes = [(options.rows, options.queue, options.dim)]
    if options.published or options.full:
        sizes = PUBLISHED if options.published else FULL
    shapes = [Shape(dtype, dim, rows, queue) for rows, queue, dim in sizes]
    entries, failed = [], None
    own = tuned.environment(options.device)
    print(own, file=sys.stderr)
    if options.imports and "" not in sys.path:
        sys.path.append("")  # Modules in this folder are found, too; after those that are installed.
    for name in options.imports:
        try:
            import_module(name)
        except Exception as error:
            raise ValueError(f"--import {name}: {error}") from error
    tuned.path().parent.mkdir(parents=True, exist_ok=True)  # An error comes before the work.
    with progress() as report:
        limits = {"limit": options.limit, "jobs": options.jobs}
        for entry in tune(options.device, shapes, imports=options.imports, report=report, **limits):
            entries.append(entry)
            try:
                tuned.store(own, [entry] if entry["choice"] else [])
            except OSError as error:
                failed = error  # What was measured is printed nevertheless.
    if options.json:
        print(json.dumps({"environment": own, "entries": entries}, indent=1))
    else:
        print(*map(table, entries), sep="\n\n")
    if failed:
        raise OSError(f"cannot write {tuned.path()}: {failed}") from failed
    if not all(entry["choice"] for entry in entries):
        raise ValueError("every candidate was refused")
    print(f"kept in {tuned.path()}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Returns a progress bar on standard error, or a line for each step where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done, total, what: print(f"{done} of {total}: {what}", file=sys.stderr)
        return
    with tqdm(bar_format="{n}/{total} |{bar}| {elapsed} {desc}", dynamic_ncols=True, file=sys.stderr) as bar:

        def report(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(what)

        yield report
        bar.n = bar.total
