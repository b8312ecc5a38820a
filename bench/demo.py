"""The library's main job in two minutes of CPU: train ReSSL on real images, and time the loss.

Writes metrics.json, loss_curve.png and comparison.png into --out, and prints what they hold.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import eager
import matplotlib
import torch
from memory import peak_extra_memory
from torch.nn import functional as F

from relssl import backends
from relssl.evaluate import baselines, evaluate
from relssl.functional import relation_loss
from relssl.methods.ressl import PRESETS
from relssl.train import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPE = {"B": 256, "K": 65_536, "D": 128}
BLUE, GREY = "#1f5fa8", "#9a9a9a"


def train_digits(out: Path) -> dict:
    """ReSSL on scikit-learn's scans of handwritten digits: accuracies before and after, and the losses."""
    config = replace(PRESETS["digits"], out=out / "ressl")
    shutil.rmtree(config.out, ignore_errors=True)
    began = perf_counter()
    method = train(config)
    seconds = perf_counter() - began
    history = json.loads((config.out / "metrics.json").read_text())["epochs"]
    accuracy = {**baselines(config), "trained encoder": evaluate(method, config)}
    return {"accuracy": accuracy, "training_seconds": seconds, "epochs": history}


def inputs(B: int, K: int, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit-norm queries, keys near them, and a queue [K, D]."""
    generator = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(B, D, generator=generator), dim=1)
    k = F.normalize(q + 0.5 * torch.randn(B, D, generator=generator) / D**0.5, dim=1)
    queue = torch.randn(K, D, generator=generator)
    return q.requires_grad_(), k, F.normalize(queue, dim=1, out=queue)


MEMORY = """
import sys; sys.path[:0] = {path!r}
import demo, eager
from relssl.functional import relation_loss
"""


def time_loss(rounds: int = 7) -> dict:
    """Forward and backward, eager and fused in turn in this process; peak memory in a process each."""
    q, k, queue = inputs(**SHAPE)
    columns = queue.T.contiguous()  # The published code keeps its queue as [D, K].
    runs = {
        "eager": lambda: eager.relation_loss(q, k, columns),
        "relssl": lambda: relation_loss(q, k, queue, form="ce"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses = {}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            q.grad = None
            began = perf_counter()
            loss = run()
            loss.backward()
            seconds[name].append(perf_counter() - began)
            losses[name] = loss.item()
    seconds = {name: times[1:] for name, times in seconds.items()}  # The first round warms up.
    ratios = sorted(e / r for e, r in zip(seconds["eager"], seconds["relssl"], strict=True))
    return {
        "shape": SHAPE,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "backend": backends.choose("auto", "cpu", torch.float32, SHAPE["D"]),
        "loss": losses,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "ratio": median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }
