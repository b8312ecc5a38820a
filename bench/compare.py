"""Trains every method with one budget on the same images, and records the scores of their encoders.

    python bench/compare.py --data-root cifar10.npz                  # the budget of docs/results.md: hours
    python bench/compare.py --data digits --image-size 8 --budget 12 # a trial, in minutes

The budget is counted in passes of the encoder over the training images. A forward pass is one, a backward
pass two; so an epoch of ReSSL or MoCo, whose student runs forward and backward and whose teacher runs
forward, takes four, one of SimCLR or CC, with two views, six, and one of SACC, with three, nine. Distillation
takes four, and its teacher is the encoder of the ReSSL of the same seed. Each method has the settings of its
preset, but for the encoder and for what a short run needs; none trains on the test images. Each run is a
process with one thread, --jobs at a time, and is continued where it was interrupted. Further options are
those of `relssl train`. In --out are written:

    METHOD-SEED.json  scores, settings and commit of a run
    options.json      the budget and the further options, which cannot change
    methods.json      the rows of the table, with versions and commit (--record writes them elsewhere)
    METHOD-SEED/      what `relssl train` writes
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import machine

from relssl.cli import train_config
from relssl.evaluate import baselines, evaluate
from relssl.methods.base import TrainConfig
from relssl.methods.cc import CCConfig
from relssl.train import train

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import tables

COMMON = "--preset arrays --arch conv4 --image-size 32 --batch-size 256 --eval-every 0 --device cpu --resume"
SGD = "--warmup-epochs 1"
ADAM = "--lr 1e-3 --schedule cosine --normalize all --no-test-images --stem small"
# Passes of an epoch, and a method's own options.
METHODS = {
    "ressl": (4, f"{SGD} --bn-splits 1"),
    "moco": (4, f"{SGD} --bn-splits 1"),
    "simclr": (6, SGD),
    "sacc": (9, ADAM),
    "cc": (6, ADAM),
    "distill": (4, SGD),
}
BASELINES = "baselines"
TITLES = {
    BASELINES: "",
    "ressl": "ReSSL",
    "moco": "MoCo",
    "simclr": "SimCLR",
    "sacc": "SACC",
    "cc": "CC",
    "distill": "distilled from ReSSL",
}
SCORES = {"knn": "200-NN, %", "linear": "linear, %", "nmi": "NMI, %", "acc": "ACC, %"}


def config(name: str, seed: int, out: Path, budget: int, options: Sequence[str]) -> TrainConfig:
    """Returns the config of a run; options are those of `relssl train`."""
    passes, own = METHODS[name]
    run = ["--epochs", str(max(1, round(budget / passes))), "--seed", str(seed)]
    run += ["--out", str(out / f"{name}-{seed}")]
    if name == "distill":
        run += ["--teacher", str(out / f"ressl-{seed}")]
    return train_config(name, [*COMMON.split(), *own.split(), *run, *options])


def run(name: str, seed: int, out: Path, budget: int, options: Sequence[str]) -> dict[str, Any]:
    """Trains, or continues, a run, and returns its record."""
    settings = config("ressl" if name == BASELINES else name, seed, out, budget, options)
    record = {"commit": machine.commit()}
    if name == BASELINES:
        return record | {"scores": baselines(settings)}
    method = train(settings)
    if method.epoch < settings.epochs:
        raise KeyboardInterrupt  # It has saved the step, and is continued by the next call.
    scored = method.config
    if isinstance(scored, CCConfig):  # Clusters are scored on training and test images, as the others' are.
        scored = replace(scored, test_images=True)
    return record | {"scores": evaluate(method, scored), "settings": vars(method.config)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/compare"))
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1")
    parser.add_argument(
        "--budget", type=int, default=144, help="passes of the encoder over the training images"
    )
    parser.add_argument(
        "--record", type=Path, help="where to write the table's rows; default: methods.json in --out"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--one", nargs=2, metavar=("METHOD", "SEED"), help="a run alone, which prints its record"
    )
    arguments, options = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    given, kept = [str(arguments.budget), *options], arguments.out / "options.json"
    if kept.exists() and (found := json.loads(kept.read_text())) != given:
        parser.error(f"{arguments.out} has runs of {' '.join(found)}, not {' '.join(given)}: another --out")
    kept.write_text(json.dumps(given))
    if arguments.one:
        name, seed = arguments.one
        record = run(name, int(seed), arguments.out, arguments.budget, options)
        print(json.dumps(record, default=str))
        return

    runs: dict[tuple[str, int], Future[None]] = {}

    def start(name: str, seed: int) -> None:
        if name == "distill":
            runs["ressl", seed].result()  # Its teacher, which has been started before it.
        path = arguments.out / f"{name}-{seed}.json"
        if path.exists():
            return
        command = [sys.executable, __file__, "--one", name, str(seed), *sys.argv[1:]]
        found = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
        )
        path.write_text(found.stdout.splitlines()[-1])
        print(name, seed, json.loads(path.read_text())["scores"], flush=True)

    seeds = range(arguments.seeds)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for seed in seeds:
            for name in (BASELINES, *METHODS):
                runs[name, seed] = pool.submit(start, name, seed)
    for future in runs.values():
        future.result()
    found = {n: [json.loads((arguments.out / f"{n}-{s}.json").read_text()) for s in seeds] for n in TITLES}
    about = {name: value for name, value in machine.about("cpu").items() if name in ("device", "torch")}
    commits = sorted({record["commit"] for records in found.values() for record in records})
    path = arguments.record or arguments.out / "methods.json"
    table = rows(found)
    tables.write(path, table, seeds=str(arguments.seeds), commit=", ".join(commits), **about)
    print(tables.table(table))


def rows(found: dict[str, list[dict[str, Any]]]) -> list[tables.Row]:
    """Returns a row for each method and for what is not trained, of the records of all seeds."""
    untrained = [record["scores"] for record in found.pop(BASELINES)]
    scores = {name: [scores[name] for scores in untrained] for name in untrained[0]}
    scores |= {TITLES[name]: [record["scores"] for record in records] for name, records in found.items()}
    epochs = {TITLES[name]: str(records[0]["settings"]["epochs"]) for name, records in found.items()}
    return [
        {"": name, "epochs": epochs.get(name, "-")}
        | {title: cell([s[key] for s in of]) for key, title in SCORES.items()}
        for name, of in scores.items()
    ]


def cell(values: list[float]) -> str:
    """Returns mean and standard deviation in percent."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
