"""Checkpoints: everything that the next step depends on, in one file that is whole at any moment."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from relssl import distributed, methods
from relssl.methods.base import Method, TrainConfig

# Settings that a run may change when it goes on.
FREE = {
    "resume", "out", "data_root", "download", "device", "workers", "backend", "epochs", "judge_every",
    "skip_unreadable",
}  # fmt: skip


def _settings(config: TrainConfig) -> dict[str, Any]:
    """A config as JSON has it: paths as strings."""
    return json.loads(json.dumps(asdict(config), default=str))


def _randomness() -> dict[str, Any]:
    """torch's generators, of this process's GPU if it has one: a training step draws from no others."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": gpu}


def save(
    path: Path,
    config: TrainConfig,
    run: dict[str, Any],
    epoch: int,
    step: int,
    sums: dict,
    history: list,
) -> None:
    """Write checkpoint and metrics so that at any moment there is a whole file of each.

    Every process must call it; the first writes, the random state of all.
    """
    randomness = distributed.collect(_randomness())
    if distributed.rank():
        return
    settings = _settings(config)
    name = next(n for n, c in methods.CONFIGS.items() if type(config) is c)
    state = {key: part.state_dict() for key, part in run.items()}
    state |= {
        "method": name,
        "config": settings,
        "epoch": epoch,
        "step": step,
        "sums": sums,
        "history": history,
        "randomness": randomness,
        "device": next(run["model"].parameters()).device.type,
    }
    _replace(path, lambda file: torch.save(state, file))
    metrics = {"method": name, "config": settings, "epochs": history}
    _replace(path.with_name("metrics.json"), lambda file: file.write(json.dumps(metrics, indent=1).encode()))


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside the file, to the disk, and only then take its place."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or something else than a checkpoint of this library.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["method"], state["config"], state["model"], state["device"]
    except Exception as error:  # torch and pickle raise nearly anything over a damaged file.
        raise ValueError(f"{path} is damaged, or no checkpoint of relssl ({type(error).__name__})") from error
    if state["method"] not in methods.CONFIGS:
        raise ValueError(f"{path} is of method {state['method']!r}, which this version does not know")
    return state


def restore(
    path: Path, config: TrainConfig, run: dict[str, Any], device: torch.device
) -> tuple[int, int, dict, list]:
    """Put everything back as `save` found it; returns epoch, step, sums and history."""
    state = read(path)
    if methods.CONFIGS[state["method"]] is not type(config):
        raise ValueError(f"{path} is of method {state['method']}: give --out another folder")
    now = _settings(config)
    changed = [f"{k} was {v}" for k, v in state["config"].items() if k not in FREE and now.get(k) != v]
    if changed:
        raise ValueError(f"{path} is of other settings ({', '.join(changed)}): they cannot change on the way")
    then, here = (len(state["randomness"]), state["device"]), (distributed.world(), device.type)
    if then != here:
        which = "{} is of {} processes on {}, this run of {} on {}"
        raise ValueError(which.format(path, *then, *here))
    for key, part in run.items():
        part.load_state_dict(state[key])
    randomness = state["randomness"][distributed.rank()]
    torch.set_rng_state(randomness["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(randomness["cuda"], device)
    sums = {name: total.to(device) for name, total in state["sums"].items()}
    return state["epoch"], state["step"], sums, state["history"]


def load_method(path: Path, device: str) -> tuple[Method, TrainConfig]:
    """The trained method of a checkpoint, in eval mode, and its config."""
    state = read(path)
    settings: dict[str, Any] = state["config"] | {"device": device}
    for name in ("out", "data_root"):
        settings[name] = settings[name] and Path(settings[name])
    try:
        config = methods.CONFIGS[state["method"]](**settings)
    except TypeError as error:
        raise ValueError(f"{path} is of another version of relssl: {error}") from error
    unknown = torch.ones(3)  # The statistics are buffers and come with the state.
    method = config.make(unknown, unknown)
    method.load_state_dict(state["model"])
    method.eval()
    return method, config
