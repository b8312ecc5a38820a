"""Checkpoints: all that the next step depends on, in files that are complete at any time.

A single process writes checkpoint.pt. Several write folders: each its part of the model, and rank 0 state.pt,
which holds what checkpoint.pt holds besides the model.
"""

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from relssl import backends, distributed, methods, random_state, tuned
from relssl.datasets.python import GIVEN, is_python
from relssl.methods.base import Method, TrainConfig
from relssl.old_names import replace_old_names

# Settings that a resumed run may change without a message...
RESUMABLE_OVERRIDES = {
    "resume", "out", "data_root", "download", "device", "workers", "backend", "eval_every", "save_every",
    "reschedule", "skip_unreadable", "data_device", "init", "log",
}  # fmt: skip
# ... and those that affect only the steps to come.
RATES = {
    "lr", "weight_decay", "decay_norm_and_bias", "sgd_momentum", "momentum", "accumulate", "compile",
    "clip_grad", "teacher",
}  # fmt: skip


Stateful = torch.nn.Module | torch.optim.Optimizer | torch.amp.GradScaler


@dataclass
class TrainState:
    """All that a training step changes, besides random number generators.

    Attributes:
        steps_per_epoch, images_per_epoch: 0 if unknown.
        epoch: number of completed epochs.
        step: number of completed steps of the epoch after these.
        sums: for each logged scalar, its sum over these steps and the number of its terms, [2].
        history: an entry of scalars for each completed epoch, which metrics.json lists.
        evaluation_due: whether the last completed epoch is yet to be evaluated.
    """

    method: Method
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    steps_per_epoch: int = 0
    images_per_epoch: int = 0
    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    evaluation_due: bool = False

    def parts(self) -> dict[str, Stateful]:
        """Returns what has a state_dict, by its key in a checkpoint."""
        parts = {"model": self.method, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}


# The names in a run's folder.
FILE, FOLDERS, STATE = "checkpoint.pt", "checkpoints", "state.pt"

# The other attributes, which a checkpoint holds as they are; the first ones cannot change.
EXTENT = "steps_per_epoch", "images_per_epoch"
PROGRESS = *EXTENT, "epoch", "step", "sums", "history", "evaluation_due"


def save(out: Path, state: TrainState, *, replaced: Path | None = None) -> Path:
    """Writes checkpoint and metrics so that a complete one of each exists at any time; returns the former.

    The checkpoint before it remains as `previous_path`, for a file if the file system has hard links. Every
    process must call it; rank 0 writes the random number generators of all.

    replaced: the last checkpoint if it is of the same step, and so of the same model.

    Raises:
        OSError: it cannot be written.
    """
    rng_states = distributed.all_gather_object(random_state.get())
    settings = state.method.config.as_json()
    name = next(n for n, c in methods.CONFIGS.items() if type(state.method.config) is c)
    device = next(state.method.parameters()).device.type
    parts = {key: part for key, part in state.parts().items() if key != "model"}
    contents: dict[str, Any] = {key: part.state_dict() for key, part in parts.items()}
    contents |= {name: getattr(state, name) for name in PROGRESS}
    contents |= {
        "method": name,
        "config": settings,
        "rng_states": rng_states,
        "device": device,
        "tuned": tuned.record(device),
        "launch": distributed.launch()[0],
    }
    if distributed.world_size() > 1:
        path = out / FOLDERS / f"epoch-{state.epoch:04}-step-{state.step:05}"
        _save_folder(path, state.method, contents, replaced == path)
    else:
        path = out / FILE
        contents["model"] = state.method.state_dict()
        kept = None if replaced == path else previous_path(path)
        _write_atomically(path, lambda file: torch.save(contents, file), kept)
    if distributed.rank() == 0:
        metrics = json.dumps({"method": name, "config": settings, "epochs": state.history}, indent=1)
        _write_atomically(out / "metrics.json", lambda file: file.write(metrics.encode()))
    distributed.barrier()  # Where one process ends, torchrun soon ends the others.
    return path


def _save_folder(path: Path, method: Method, contents: dict[str, Any], again: bool) -> None:
    """Writes a folder and removes those before the last two.

    again: whether the folder exists and has the model; then only its state.pt is replaced.
    """
    from relssl import sharded_checkpoint

    def write(folder: Path) -> None:
        _write_atomically(folder / STATE, lambda file: torch.save(contents, file))

    if not again:
        if distributed.rank() == 0:
            for left in path.parent.glob("*.tmp"):  # by a process that was killed
                if _position(left.with_suffix("")):
                    shutil.rmtree(left)
            if path.exists():  # It is not what this run was resumed from.
                sharded_checkpoint.remove(path)
        sharded_checkpoint.save(path, method, write)
    if distributed.rank() == 0:
        if again:
            write(path)
        for older in _folders(path.parents[1])[:-2]:
            sharded_checkpoint.remove(older)


def _position(folder: Path) -> tuple[int, ...]:
    """Returns the epoch and step in the name of a checkpoint's folder; () if it is no such name."""
    match = re.fullmatch(r"epoch-(\d+)-step-(\d+)", folder.name)
    return tuple(map(int, match.groups())) if match else ()


def _folders(out: Path) -> list[Path]:
    """Returns the folders that are checkpoints of a run, in the order of their positions."""
    return sorted(filter(_position, (out / FOLDERS).glob("epoch-*")), key=_position)


def newest(out: Path) -> Path | None:
    """Returns the checkpoint of a run that has come furthest, a file or a folder; None if there is none.

    The later one is newest where both have come as far. Raises ValueError if it is damaged.
    """
    file, folders = out / FILE, _folders(out)
    if folders and not (folders[-1] / STATE).exists():
        raise ValueError(f"{folders[-1]} is damaged, it has no {STATE}: remove it to use the one before")
    if not folders or not file.exists():
        return folders[-1] if folders else file if file.exists() else None
    contents, folder = read(file), folders[-1]
    of_file = (contents["epoch"], contents["step"]), file.stat().st_mtime
    of_folder = _position(folder), (folder / STATE).stat().st_mtime
    return file if of_file > of_folder else folder


def locate(path: Path) -> Path:
    """Returns the checkpoint that a path names: itself, or the newest one of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file() or (path / STATE).exists():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no file {path}")
    if (found := newest(path)) is None:
        raise FileNotFoundError(f"no checkpoint in {path}")
    return found


def previous_path(path: Path) -> Path:
    """Returns the path of the checkpoint before the last one, which may be missing."""
    if path.name == FILE:
        return path.with_stem(path.stem + ".previous")
    before = [folder for folder in _folders(path.parents[1]) if _position(folder) < _position(path)]
    return before[-1] if before else path.parents[1] / FILE


def _write_atomically(path: Path, write: Callable[[BinaryIO], object], previous: Path | None = None) -> None:
    """Writes and syncs a temporary file, and renames it to `path`. Raises OSError if that fails.

    previous: where to keep the file that was there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous:
            with suppress(OSError):
                previous.unlink(missing_ok=True)
                os.link(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter instead of the former.
        temporary.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"cannot write {path}: {reason}") from error


def read(path: Path) -> dict[str, Any]:
    """Returns what `save` wrote, on the CPU; of a folder what is in its state.pt, without the model.

    path: see `locate`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the file is damaged, or is not a checkpoint of this library.
    """
    path = locate(path)
    try:
        file = path / STATE if path.is_dir() else path
        contents = torch.load(file, map_location="cpu", weights_only=True)
        replace_old_names(contents)
        contents["method"], contents["device"]
    except Exception as error:  # torch and pickle raise almost any exception for a damaged file.
        raise ValueError(f"{path} is damaged, or no checkpoint of relssl ({type(error).__name__})") from error
    if contents["method"] not in methods.CONFIGS:
        raise ValueError(f"{path} is of method {contents['method']!r}, which this version does not have")
    return contents


def restore(path: Path, state: TrainState, device: torch.device) -> None:
    """Restores state, generators and the kernels of "auto" to what they were in `save`.

    Each difference between the runs is reported in a line on standard error.

    Raises:
        ValueError: the checkpoint is damaged, or the run cannot continue from it with these settings.
    """
    contents, config = read(path), state.method.config
    epoch, step = contents["epoch"], contents["step"]
    lines = _describe_changes(path, contents, state, device)
    if distributed.rank() == 0:
        for line in lines:
            print(f"{line} from {describe_position(epoch + 1, step)} on", file=sys.stderr)
    assert state.optimizer
    # Rates, and how a step is computed (fused), are those of this run. Loading depends on the latter.
    groups, own_groups = contents["optimizer"]["param_groups"], state.optimizer.param_groups
    if len(groups) != len(own_groups):
        counts = f"has {len(groups)} groups of parameters, this run {len(own_groups)}"
        raise ValueError(f"{path} is of another optimizer, or another version of timm: it {counts}")
    for group, own in zip(groups, own_groups, strict=True):
        group |= {name: value for name, value in own.items() if name != "params"}
    for key, part in state.parts().items():
        if key != "model":
            _load(path, part, contents[key])
    _load_model(path, state.method, contents)
    if (len(contents["rng_states"]), contents["device"]) == (distributed.world_size(), device.type):
        random_state.restore(contents["rng_states"][distributed.rank()])
    else:
        torch.manual_seed(fresh_seed(config.seed, distributed.rank(), epoch, step))
    kernels = tuned.record(device.type)
    if contents["device"] == device.type and "tuned" in contents:
        kernels = kernels | {"choices": contents["tuned"]["choices"]}
    tuned.adopt(kernels)
    state.epoch, state.step, state.history = epoch, step, contents["history"]
    state.sums = {name: total.to(device) for name, total in contents["sums"].items()}
    state.evaluation_due = contents.get("evaluation_due", False)


def _load(path: Path, part: Stateful, state: dict[str, Any]) -> None:
    """Calls part.load_state_dict(state); raises ValueError if they do not match."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from error


def _load_model(path: Path, method: Method, contents: dict[str, Any]) -> None:
    """Restores a method from a file's contents or from a folder; raises ValueError if they do not fit."""
    if path.is_file():
        return _load(path, method, contents["model"])
    from relssl import sharded_checkpoint

    try:
        sharded_checkpoint.load(path, method)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from error


def describe_position(epoch: int, step: int) -> str:
    """Names an epoch, counted from 1, and a step of it (counted from 0) unless it is the first."""
    return f"epoch {epoch}, step {step + 1}" if step else f"epoch {epoch}"


def fresh_seed(seed: int, rank: int, epoch: int, step: int) -> int:
    """Returns 63 bits, different for each process and step, for a process without a saved generator."""
    return random.Random(f"{seed} {rank} {epoch} {step}").getrandbits(63)


def _describe_changes(
    path: Path, contents: dict[str, Any], state: TrainState, device: torch.device
) -> list[str]:
    """Returns a line for each change of the resumed run; raises ValueError if one is not well defined."""
    config = state.method.config
    if methods.CONFIGS[contents["method"]] is not type(config):
        raise ValueError(f"{path} is of method {contents['method']}: give --out another folder")
    now = config.as_json()
    old = contents["config"]
    changed = {k: v for k, v in old.items() if k not in RESUMABLE_OVERRIDES and now.get(k) != v}
    free = RATES | {"epochs"}
    if is_python(now["data"]) and is_python(str(changed.get("data"))):  # The same data in another way.
        free = free | {"data"}
    if changed.get("data") == GIVEN and "data" not in free:
        raise ValueError(f"{path} is of data that were passed to train(config, data): pass them again")
    fixed = [f"{name} was {value}" for name, value in changed.items() if name not in free]
    if fixed:
        raise ValueError(
            f"{path} is of other settings ({', '.join(fixed)}): a resumed run cannot change them"
        )
    for name in EXTENT:
        if (was := contents.get(name)) and was != (found := getattr(state, name)):
            what = name.partition("_")[0]
            raise ValueError(f"{path} has {was} {what} an epoch, these data make {found}: they differ")
    begun = contents["epoch"] + (contents["step"] > 0)
    if config.epochs < begun:
        raise ValueError(f"{path} is in epoch {begun}, past the end of {config.epochs} epochs")
    lines = [f"{name} was {value}, is {now[name]}" for name, value in changed.items()]
    if "epochs" in changed and config.schedule == "cosine":
        if not config.reschedule:
            raise ValueError(
                f"{path} is of {changed['epochs']} epochs, this run of {config.epochs}: the learning rate"
                " would leave its cosine; pass --reschedule to let it jump to the other, or --epochs"
                f" {changed['epochs']}"
            )
        lines = [f"{line}, with its cosine" if line.startswith("epochs ") else line for line in lines]
    anew = "; random numbers are drawn anew, not bit for bit as before,"
    if (was := len(contents["rng_states"])) != distributed.world_size():
        lines.append(f"processes was {was}, is {distributed.world_size()}{anew}")
    if (was := contents["device"]) != device.type:
        return [*lines, f"device was {was}, is {device.type}{anew}"]
    return lines + _describe_kernel_changes(contents.get("tuned"), device.type)


def _describe_kernel_changes(record: tuned.Record | None, device: str) -> list[str]:
    """Returns a line for another machine, and one for kernels of the checkpoint that cannot run here."""
    if record is None:
        return []
    missing = set()
    for dtype, dim, *_, name in record["choices"]:
        if not backends.available(name, device, getattr(torch, dtype), dim):
            missing.add(name)
    lines = []
    if (was := record["environment"]) != (now := tuned.environment(device)):
        lines.append(f"machine was {was}; is {now}; not bit for bit as before")
    if missing:
        names = ", ".join(sorted(missing))
        lines.append(f"kernels were {names}, which cannot run here: the defaults")
    return lines


def load_method(path: Path, device: str) -> tuple[Method, TrainConfig]:
    """Returns the trained method of a checkpoint, in eval mode, and its config; path: see `locate`."""
    path = locate(path)
    contents = read(path)
    settings: dict[str, Any] = contents["config"] | {"device": device}
    settings["log"] = tuple(settings.get("log", ("tensorboard",)))
    try:
        config = methods.CONFIGS[contents["method"]](**settings)
    except TypeError as error:
        raise ValueError(f"{path} is of another version of relssl: {error}") from error
    placeholder = torch.ones(3)  # The statistics are buffers, which the state_dict has.
    method = config.build_on_device(placeholder, placeholder)
    _load_model(path, method, contents)
    method.eval()
    return method, config
