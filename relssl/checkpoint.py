"""Checkpoints: everything that the next step depends on, in one file that is whole at any moment."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from relssl import methods
from relssl.methods.base import Method, TrainConfig


def _randomness() -> dict[str, Any]:
    """torch's generators: a training step draws from no others."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def save(
    path: Path,
    config: TrainConfig,
    run: dict[str, Any],
    epoch: int,
    step: int,
    sums: dict,
    history: list,
) -> None:
    """Write checkpoint and metrics so that at any moment there is a whole file of each."""
    settings = json.loads(json.dumps(asdict(config), default=str))
    name = next(n for n, c in methods.CONFIGS.items() if type(config) is c)
    state = {key: part.state_dict() for key, part in run.items()}
    state |= {
        "method": name,
        "config": settings,
        "epoch": epoch,
        "step": step,
        "sums": sums,
        "history": history,
    }
    _replace(path, lambda temporary: torch.save(state | {"randomness": _randomness()}, temporary))
    metrics = {"method": name, "config": settings, "epochs": history}
    _replace(
        path.with_name("metrics.json"),
        lambda temporary: temporary.write_text(json.dumps(metrics, indent=1)),
    )


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def restore(path: Path, config: TrainConfig, run: dict[str, Any], device: str) -> tuple[int, int, dict, list]:
    """Put everything back as `save` found it; returns epoch, step, sums and history."""
    state = torch.load(path, map_location=device, weights_only=True)
    if methods.CONFIGS[state["method"]] is not type(config):
        raise ValueError(f"{path} is of method {state['method']}")
    for key, part in run.items():
        part.load_state_dict(state[key])
    torch.set_rng_state(state["randomness"]["cpu"].cpu())
    if state["randomness"]["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["randomness"]["cuda"]])
    return state["epoch"], state["step"], state["sums"], state["history"]


def load_method(path: Path, device: str) -> tuple[Method, TrainConfig]:
    """The trained method of a checkpoint, in eval mode, and its config."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings: dict[str, Any] = state["config"] | {"device": device}
    for name in ("out", "data_root"):
        settings[name] = settings[name] and Path(settings[name])
    config = methods.CONFIGS[state["method"]](**settings)
    unknown = torch.ones(3)  # The statistics are buffers and come with the state.
    method = config.make(unknown, unknown)
    method.load_state_dict(state["model"])
    method.eval()
    return method, config
