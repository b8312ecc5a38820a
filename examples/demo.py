"""Clusters real images with SACC, without labels, and times ReSSL's loss, in two minutes of CPU (make demo).

    python examples/demo.py [--out out/demo]

Writes metrics.json, loss_curve.png and comparison.png to --out, and prints the results.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import matplotlib
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import eager
from memory import case_memory, measurable
from timing import interleave, slowdown
from work import Case

from relssl import backends
from relssl.evaluate import baselines, evaluate
from relssl.functional import relation_loss
from relssl.methods.sacc import PRESETS
from relssl.train import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPE = {"B": 256, "K": 65_536, "D": 128}
BLUE, GREY = "#1f5fa8", "#9a9a9a"


SCORES = {"acc": "clusters", "knn": "200-NN", "linear": "linear"}


def train_digits(out: Path) -> dict:
    """Clusters scikit-learn's handwritten digits; returns scores before and after, and the losses.

    The clusters of raw pixels and of the untrained encoder are those of k-means.
    """
    config = replace(PRESETS["digits"], epochs=20, out=out / "sacc")
    shutil.rmtree(config.out, ignore_errors=True)
    began = perf_counter()
    method = train(config)
    seconds = perf_counter() - began
    history = json.loads((config.out / "metrics.json").read_text())["epochs"]
    scores = {**baselines(method.config), "trained encoder": evaluate(method, method.config)}
    return {"scores": scores, "training_seconds": seconds, "epochs": history}


def inputs(B: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns unit-norm queries, keys near them, and a queue [K, D]."""
    generator = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(B, D, generator=generator), dim=1)
    k = F.normalize(q + 0.5 * torch.randn(B, D, generator=generator) / D**0.5, dim=1)
    queue = torch.randn(K, D, generator=generator)
    return q.requires_grad_(), k, F.normalize(queue, dim=1, out=queue)


def time_loss(rounds: int = 7) -> dict:
    """Times forward and backward, eager and relssl alternating; measures peak memory in a process each."""
    q, k, queue = inputs(**SHAPE)
    columns = queue.T.contiguous()  # The published code keeps its queue as [D, K].
    runs: dict[str, Callable[[], Any]] = {
        "eager": lambda: eager.relation_loss(q, k, columns),
        "relssl": lambda: relation_loss(q, k, queue, form="ce"),
    }
    losses = {name: run().item() for name, run in runs.items()}
    both = {name: (lambda run=run: torch.autograd.grad(run(), q)) for name, run in runs.items()}
    seconds = interleave(both, rounds)
    ratio, low, high = slowdown(seconds["eager"], seconds["relssl"])
    case = Case("relation", SHAPE["B"], SHAPE["K"], SHAPE["D"])
    memory = {name: case_memory(case, name) for name in runs if measurable()}
    return {
        "shape": SHAPE,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "backend": backends.choose("auto", "cpu", torch.float32, SHAPE["D"]),
        "loss": losses,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "slowdown": ratio,
        "slowdown_range": [low, high],
        "peak_extra_bytes": memory,
    }


def plot_training(training: dict, path: Path) -> None:
    epochs = training["epochs"]
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    at = [e["epoch"] for e in epochs]
    axis.plot(at, [e["instance_loss"] for e in epochs], color=BLUE, label="over images")
    axis.plot(at, [e["cluster_loss"] for e in epochs], color=GREY, label="over clusters")
    axis.set(xlabel="epoch", ylabel="loss in nats", title="SACC on handwritten digits")
    axis.locator_params(axis="x", integer=True)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_comparison(loss: dict, path: Path) -> None:
    panels = {"time (ms), forward and backward": {n: 1e3 * s for n, s in loss["seconds"].items()}}
    if loss["peak_extra_bytes"]:
        panels["peak extra memory (MiB)"] = {n: b / 2**20 for n, b in loss["peak_extra_bytes"].items()}
    figure, axes = plt.subplots(1, len(panels), figsize=(7.2, 3.4), layout="constrained", squeeze=False)
    for axis, (label, values) in zip(axes[0], panels.items(), strict=True):
        bars = axis.bar(list(values), list(values.values()), color=[GREY, BLUE], width=0.6)
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.set(ylabel=label)
        axis.margins(y=0.15)
    shape = ", ".join(f"{name} = {value:,}" for name, value in SHAPE.items())
    figure.suptitle(f"relation loss, {shape}, float32, {loss['threads']} CPU threads")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    training = train_digits(out)
    loss = time_loss()
    (out / "metrics.json").write_text(json.dumps({"training": training, "loss": loss}, indent=1))
    plot_training(training, out / "loss_curve.png")
    plot_comparison(loss, out / "comparison.png")

    print(f"\nSACC on handwritten digits, {training['training_seconds']:.0f} s of training without labels")
    print(f"  {'accuracy':<20}" + "".join(f"{title:>10}" for title in SCORES.values()))
    for name, score in training["scores"].items():
        print(f"  {name:<20}" + "".join(f"{score[key]:>10.1%}" for key in SCORES))
    shape = ", ".join(f"{name} = {value:,}" for name, value in SHAPE.items())
    print(f"\nrelation loss, forward and backward, {shape}, float32, {loss['threads']} CPU threads")
    for name, seconds in loss["seconds"].items():
        memory = loss["peak_extra_bytes"].get(name)
        peak = f"{memory / 2**20:>8.0f} MiB extra at its peak" if memory is not None else ""
        print(f"  {name:<8}{1e3 * seconds:>8.0f} ms{peak}   loss {loss['loss'][name]:.6f}")
    low, high = loss["slowdown_range"]
    rounds = f"({low:.1f} to {high:.1f} over the rounds)"
    print(f"  slowdown of eager: {loss['slowdown']:.1f} {rounds}; relssl's backend: {loss['backend']}")
    print(f"\nwritten: {', '.join(sorted(str(p) for p in out.glob('*.*')))}")


if __name__ == "__main__":
    main()
