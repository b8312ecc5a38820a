"""Trains ReSSL and SACC on CIFAR-10 as published, in pieces, and tabulates the published scores and ours.

    python bench/reproduce.py --data-root data --download          # trains both to the end
    python bench/reproduce.py --data-root data --pieces 1          # a job of a cluster: repeat until status 0
    python bench/reproduce.py --data digits --epochs 4 --minutes 1 # a trial, which the table marks as one

A piece trains one run for at most --minutes, saves the step as after SIGUSR1, and is continued from there by
the next piece, or by the same command in another process. A finished run is scored once and not trained
again. Every option that is not listed below is one of `relssl train`, for example --epochs, --seed or
--device. It applies to both runs: an option that only one of them has needs --method. In --out are written:

    results.md              the table, after each piece
    METHOD/result.json      scores, settings, and device, versions, commit and seconds of each piece
    METHOD/checkpoint.pt    and all else that `relssl train` writes

Exit status: 0 if all runs are finished; 143 if one is left to continue, after --pieces or SIGTERM, and 130
after Ctrl-C, which both save the step; 1, with a line, on an error; 2 on wrong usage.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import machine

from relssl.checkpoint import RESUMABLE_OVERRIDES, read
from relssl.cli import train_config
from relssl.evaluate import evaluate
from relssl.interruption import EXIT_STATUS
from relssl.methods import PRESETS
from relssl.methods.base import Method, TrainConfig
from relssl.train import train

# Scores in percent on CIFAR-10, and who published them.
PUBLISHED: dict[str, tuple[dict[str, float], str]] = {
    "ressl": (
        {"knn": 88.89, "linear": 89.97},
        "others, as their reproduction: README of github.com/pc-cp/Benchmark-Methods-For-MNN (the figures of"
        " ReSSL's authors are in their paper; they are not cited here, since they have not been verified)",
    ),
    "sacc": ({"nmi": 76.5, "acc": 85.1, "ari": 72.4}, "the authors: README of github.com/dengxiaozhi/SACC"),
}
TITLES = {"ressl": "ReSSL", "sacc": "SACC", "knn": "200-NN accuracy", "linear": "linear accuracy"}
# Settings that may differ without a mark in the table.
UNMARKED = RESUMABLE_OVERRIDES | {"seed", "compile", "precision"}


class Run:
    """A published run, or a trial of it, and what its result.json records."""

    def __init__(self, name: str, config: TrainConfig) -> None:
        self.name, self.config = name, config
        self.path = config.out / "result.json"
        settings = config.as_json()
        published = vars(PRESETS[name]["cifar10"])
        self.result: dict[str, Any] = dict(zip(("published", "source"), PUBLISHED[name], strict=True))
        self.result |= {"method": name, "settings": settings, "pieces": [], "scores": {}}
        differing = {k: v for k, v in settings.items() if v != published[k]}
        self.result["differs"] = {k: v for k, v in differing.items() if k not in UNMARKED}
        if self.path.exists():
            earlier = json.loads(self.path.read_text())
            self.result["pieces"] = earlier["pieces"]
            self.result["differs"] = earlier["differs"] | self.result["differs"]  # Of any piece.
            if earlier["settings"] == settings:  # If not, train says whether the run can continue.
                self.result = earlier

    def epochs_done(self) -> float:
        path = self.config.out / "checkpoint.pt"
        if not path.exists():
            return 0.0
        contents = read(path)
        return contents["epoch"] + contents["step"] / contents["steps_per_epoch"]

    def train_piece(self, minutes: float) -> None:
        """Trains for a piece, and prints what is left; scores the run if it is finished."""
        before, began = self.epochs_done(), time.monotonic()
        method: Method | None = None
        try:
            with stop_after(60 * minutes) as stopped:
                method = train(self.config)
        except SystemExit:
            if not stopped:
                raise
        finally:
            seconds, done = time.monotonic() - began, self.epochs_done()
            if method or done > before:
                self.record_piece(before, done, seconds)
        left = 0
        if method and done == self.config.epochs:
            self.result["scores"] = evaluate(method, method.config)
            self.write()
        elif method:  # Ctrl-C: only then does train return from an unfinished run.
            raise KeyboardInterrupt
        elif done == before:
            raise ValueError(f"no step was completed within {minutes:g} minutes: --minutes is too short")
        else:
            left = math.ceil((self.config.epochs - done) / (done - before))
        more = f"; about {left} more pieces of {minutes:g} minutes" if left else ""
        print(f"{self.name}: epoch {done:.1f} of {self.config.epochs}{more}", flush=True)

    def record_piece(self, before: float, after: float, seconds: float) -> None:
        about = machine.about(self.config.pick_device().type)
        self.result["pieces"].append({"from": before, "to": after, "seconds": seconds, **about})
        epochs = json.loads((self.config.out / "metrics.json").read_text())["epochs"]
        if epochs:
            self.result["images_per_second"] = median(entry["images_per_second"] for entry in epochs)
        self.write()

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.result, indent=1))
        temporary.replace(self.path)
        (self.path.parents[1] / "results.md").write_text(table(self.path.parents[1]))


@contextmanager
def stop_after(seconds: float) -> Iterator[list[bool]]:
    """Sends SIGUSR1 to this process after some seconds, if `train` handles it; the list then has an entry."""
    sent: list[bool] = []

    def send(*_: object) -> None:
        if not sent and signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL:
            sent.append(True)
            signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGALRM, send)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # Again every second, until train has its handler.
    try:
        yield sent
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(out: Path) -> str:
    """Returns the Markdown page of the runs that have a result.json in a folder of `out`."""
    rows, notes = ["| run | score | published, % | here, % |", "|---|---|---|---|"], []
    for path in [out / name / "result.json" for name in PUBLISHED]:
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        name, settings, pieces = TITLES[result["method"]], result["settings"], result["pieces"]
        trial = ", **not the published setting**" if result["differs"] else ""
        done = f"{pieces[-1]['to']:.1f} of {settings['epochs']} epochs"
        for score, published in result["published"].items():
            missing = "no labels" if result["scores"] else done
            here = f"{100 * result['scores'][score]:.2f}" if score in result["scores"] else missing
            rows.append(f"| {name}{trial} | {TITLES.get(score, score.upper())} | {published} | {here} |")
        notes += ["", f"{name}:", ""]
        if trial:
            notes += ["- differs: " + ", ".join(f"{key} {value}" for key, value in result["differs"].items())]
        notes += [f"- seed {settings['seed']}, precision {settings['precision']}, {done}"]
        seconds = sum(piece["seconds"] for piece in pieces)
        rate = f"{result.get('images_per_second', math.nan):,.0f} images/s (median of the epochs)"
        notes += [f"- {seconds:,.0f} s in {len(pieces)} piece(s), evaluations included; {rate}"]
        for key in ("device", "torch", "commit"):
            notes += [f"- {key} " + " and ".join(dict.fromkeys(piece.get(key, "?") for piece in pieces))]
        notes += [f"- published by {result['source']}"]
    return "\n".join(["# Published scores on CIFAR-10, and ours", "", *rows, *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False,
        usage="python bench/reproduce.py [options] [options of relssl train]",
    )  # fmt: skip
    parser.add_argument("--method", choices=PUBLISHED, help="the run; default: both, one after the other")
    parser.add_argument("--minutes", type=float, default=25, help="minutes of a piece; default 25")
    parser.add_argument("--pieces", type=int, help="pieces after which to end; default: until all is done")
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"), help="default out/reproduce")
    options, others = parser.parse_known_args()
    names = [options.method] if options.method else list(PUBLISHED)
    configs = {name: train_config(name, others) for name in names}
    left = math.inf if options.pieces is None else options.pieces
    try:
        for name, config in configs.items():
            run = Run(name, replace(config, out=options.out / name, resume=True))
            while not run.result["scores"]:
                if left <= 0:
                    print(f"{name} is not finished: the same command continues", file=sys.stderr)
                    sys.exit(EXIT_STATUS)
                run.train_piece(options.minutes)
                left -= 1
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"relssl train: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        sys.exit(130)
    print(table(options.out))


if __name__ == "__main__":
    main()
