"""Checkpoints: everything that the next step depends on, in one file that is whole at any moment."""

import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from relssl import backends, distributed, methods, tuned
from relssl.methods.base import Method, TrainConfig

# Settings that a run may change when it goes on, without a word...
FREE = {
    "resume", "out", "data_root", "download", "device", "workers", "backend", "judge_every", "save_every",
    "reschedule", "skip_unreadable",
}  # fmt: skip
# ... and those that no other step depends on, which take effect from there.
RATES = {"lr", "weight_decay", "decay_norm_and_bias", "sgd_momentum", "momentum"}


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
    *,
    steps: int | None = None,
    unjudged: bool = False,
    again: bool = False,
) -> None:
    """Write checkpoint and metrics so that at any moment there is a whole file of each.

    The checkpoint before it remains as `previous(path)`, where the file system has hard links. Every process
    must call it; the first writes, the random state of all.

    steps: of an epoch. unjudged: whether the last epoch's evaluation is yet to be made. again: whether the
    checkpoint in place is of the same step, and is not kept.
    """
    randomness = distributed.collect(_randomness())
    if distributed.rank():
        return
    settings = _settings(config)
    name = next(n for n, c in methods.CONFIGS.items() if type(config) is c)
    device = next(run["model"].parameters()).device.type
    state = {key: part.state_dict() for key, part in run.items()}
    state |= {
        "method": name,
        "config": settings,
        "epoch": epoch,
        "step": step,
        "steps": steps,
        "unjudged": unjudged,
        "sums": sums,
        "history": history,
        "randomness": randomness,
        "device": device,
        "tuned": tuned.record(device),
    }
    _replace(path, lambda file: torch.save(state, file), None if again else previous(path))
    metrics = {"method": name, "config": settings, "epochs": history}
    _replace(path.with_name("metrics.json"), lambda file: file.write(json.dumps(metrics, indent=1).encode()))


def previous(path: Path) -> Path:
    """The checkpoint before the last one."""
    return path.with_stem(path.stem + ".previous")


def _replace(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Write beside the file, to the disk, and only then take its place. OSError if that fails.

    keep: where to keep the file that was there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            with suppress(OSError):
                keep.unlink(missing_ok=True)
                os.link(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter for the former.
        temporary.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"cannot write {path}: {reason}") from error


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
    path: Path, config: TrainConfig, run: dict[str, Any], device: torch.device, steps: int
) -> tuple[int, int, dict, list, bool]:
    """Put everything back as `save` found it; returns epoch, step, sums, history and unjudged.

    The kernels that "auto" takes are from here on those of the checkpoint.

    What has changed between the runs is said in a line each, on standard error.

    steps: of an epoch of this run.

    Raises:
        ValueError: the checkpoint is damaged, or the run cannot go on from it with these settings.
    """
    state = read(path)
    lines = _changes(path, state, config, device, steps)
    epoch, step = state["epoch"], state["step"]
    if distributed.rank() == 0:
        for line in lines:
            print(f"{line} from {place(epoch + 1, step)} on", file=sys.stderr)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in run["optimizer"].param_groups]
    for key, part in run.items():
        _load(path, part, state[key])
    for group, new in zip(run["optimizer"].param_groups, settings, strict=True):
        group.update(new)  # Rates are those of the config, not of the checkpoint.
    if (len(state["randomness"]), state["device"]) == (distributed.world(), device.type):
        randomness = state["randomness"][distributed.rank()]
        torch.set_rng_state(randomness["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(randomness["cuda"], device)
    else:
        torch.manual_seed(fresh_seed(config.seed, distributed.rank(), epoch, step))
    same_device = state["device"] == device.type
    kernels = tuned.record(device.type)
    tuned.adopt(
        kernels | {"choices": state["tuned"]["choices"]} if same_device and "tuned" in state else kernels
    )
    sums = {name: total.to(device) for name, total in state["sums"].items()}
    return epoch, step, sums, state["history"], state.get("unjudged", False)


def _load(path: Path, part: Any, state: dict[str, Any]) -> None:
    """part.load_state_dict(state); ValueError where they do not fit."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from error


def place(epoch: int, step: int) -> str:
    """An epoch, counted from 1, and the step in it, if that is not its first."""
    return f"epoch {epoch}, step {step + 1}" if step else f"epoch {epoch}"


def fresh_seed(seed: int, rank: int, epoch: int, step: int) -> int:
    """For a process whose random state no checkpoint holds: 63 bits, others for each process and step."""
    return random.Random(f"{seed} {rank} {epoch} {step}").getrandbits(63)


def _changes(
    path: Path, state: dict[str, Any], config: TrainConfig, device: torch.device, steps: int
) -> list[str]:
    """What the run that goes on changes, in words; ValueError where that is not well defined."""
    if methods.CONFIGS[state["method"]] is not type(config):
        raise ValueError(f"{path} is of method {state['method']}: give --out another folder")
    now = _settings(config)
    changed = {k: v for k, v in state["config"].items() if k not in FREE and now.get(k) != v}
    fixed = [f"{name} was {old}" for name, old in changed.items() if name not in RATES | {"epochs"}]
    if fixed:
        raise ValueError(f"{path} is of other settings ({', '.join(fixed)}): they cannot change on the way")
    if (then := state.get("steps") or steps) != steps:
        raise ValueError(f"{path} has {then} steps an epoch, these data make {steps}: they are not the same")
    begun = state["epoch"] + (state["step"] > 0)
    if config.epochs < begun:
        raise ValueError(f"{path} is in epoch {begun}, past the end of {config.epochs} epochs")
    lines = [f"{name} was {old}, is {now[name]}" for name, old in changed.items()]
    if "epochs" in changed and config.schedule == "cosine":
        if not config.reschedule:
            raise ValueError(
                f"{path} is of {changed['epochs']} epochs, this run of {config.epochs}: the learning rate"
                " would leave its cosine; pass --reschedule to let it jump to the other, or --epochs"
                f" {changed['epochs']}"
            )
        lines = [f"{line}, with its cosine" if line.startswith("epochs ") else line for line in lines]
    anew = "; random numbers are drawn anew, not bit for bit as before,"
    if (was := len(state["randomness"])) != distributed.world():
        lines.append(f"processes was {was}, is {distributed.world()}{anew}")
    if (was := state["device"]) != device.type:
        return [*lines, f"device was {was}, is {device.type}{anew}"]
    return lines + _other_kernels(state.get("tuned"), device.type)


def _other_kernels(record: tuned.Record | None, device: str) -> list[str]:
    """A line if this machine, or a kernel that was chosen on that of the checkpoint, makes results differ."""
    if record is None:
        return []
    lost = []
    for dtype, dim, *_, name in record["choices"]:
        if not backends.available(name, device, getattr(torch, dtype), dim):
            lost.append(name)
    lines = []
    if (was := record["environment"]) != (now := tuned.environment(device)):
        lines.append(f"machine was {was}; is {now}; not bit for bit as before")
    if lost:
        names = ", ".join(sorted(set(lost)))
        lines.append(f"kernels were {names}, which cannot run here: the defaults")
    return lines


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
    _load(path, method, state["model"])
    method.eval()
    return method, config
