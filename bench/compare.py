"""Trains every method with one budget on the same images, and records the scores of their encoders.

    python bench/compare.py --data-root mine.npz                     # the budget of docs/results.md: hours
    python bench/compare.py --data digits --image-size 8 --budget 12 # a trial, in minutes

The budget is counted in passes of the encoder over the training images. A forward pass is one, a backward
pass two; so an epoch of ReSSL or MoCo, whose student runs forward and backward and whose teacher runs
forward, takes four, one of SimCLR or CC, with two views, six, and one of SACC, with three, nine. Distillation
takes four, and its teacher is the encoder of the ReSSL of the same seed. Each method has the settings of its
preset, but for the encoder and for what a short run needs; none trains on the test images. Each run is a
process with one thread, --jobs at a time, and is continued where it was interrupted. Further options are
those of `relssl train`. In --out are written:

    methods.json      the scores of all runs, with settings, versions and commit
    METHOD-SEED/      what `relssl train` writes
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine

from relssl.cli import train_config
from relssl.evaluate import baselines, evaluate
from relssl.methods.base import TrainConfig
from relssl.methods.cc import CCConfig
from relssl.train import train

# Passes of an epoch, and options besides those of all.
SGD = ["--warmup-epochs", "1"]
ADAM = ["--lr", "1e-3", "--schedule", "cosine", "--normalize", "all", "--no-test-images", "--stem", "small"]
METHODS: dict[str, tuple[int, list[str]]] = {
    "ressl": (4, [*SGD, "--bn-splits", "1"]),
    "moco": (4, [*SGD, "--bn-splits", "1"]),
    "simclr": (6, SGD),
    "sacc": (9, ADAM),
    "cc": (6, ADAM),
    "distill": (4, SGD),
}
BASELINES = "baselines"


def config(name: str, seed: int, out: Path, budget: int, options: Sequence[str]) -> TrainConfig:
    """Returns the config of a run; options are those of `relssl train`."""
    passes, own = METHODS[name]
    common = ["--arch", "conv4", "--batch-size", "256", "--eval-every", "0", "--device", "cpu", "--resume"]
    own = [
        *own,
        "--epochs",
        str(max(1, round(budget / passes))),
        "--seed",
        str(seed),
        "--out",
        str(out / f"{name}-{seed}"),
    ]
    if name == "distill":
        own += ["--teacher", str(out / f"ressl-{seed}")]
    return train_config(name, ["--preset", "arrays", *common, *own, *options])


def run(name: str, seed: int, out: Path, budget: int, options: Sequence[str]) -> dict[str, Any]:
    """Trains, or continues, a run, and returns its record."""
    settings = config("ressl" if name == BASELINES else name, seed, out, budget, options)
    if name == BASELINES:
        return {"scores": baselines(settings)}
    method = train(settings)
    scored = method.config
    if isinstance(scored, CCConfig):  # Clusters are scored on training and test images, as the others' are.
        scored = replace(scored, test_images=True)
    return {"scores": evaluate(method, scored), "settings": vars(method.config)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1")
    parser.add_argument(
        "--budget", type=int, default=144, help="passes of the encoder over the training images"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--one", nargs=2, metavar=("METHOD", "SEED"), help="a run alone, which prints its record"
    )
    arguments, options = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        name, seed = arguments.one
        record = run(name, int(seed), arguments.out, arguments.budget, options)
        print(json.dumps(record, default=str))
        return

    def start(name: str, seed: int) -> None:
        path = arguments.out / f"{name}-{seed}.json"
        if path.exists():
            return
        command = [sys.executable, __file__, "--one", name, str(seed), *sys.argv[1:]]
        found = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
        )
        path.write_text(found.stdout.splitlines()[-1])
        print(name, seed, json.loads(path.read_text())["scores"], flush=True)

    for names in (
        (BASELINES, *(n for n in METHODS if n != "distill")),
        ("distill",),
    ):  # Its teachers come first.
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(start, *zip(*((n, s) for s in range(arguments.seeds) for n in names), strict=True)))
    records = {p.stem: json.loads(p.read_text()) for p in sorted(arguments.out.glob("*-*.json"))}
    found = {"budget": arguments.budget, "runs": records, **machine.about("cpu")}
    (arguments.out / "methods.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
