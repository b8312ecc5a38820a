"""A module's state in a folder that several processes write and read, each its part of sharded tensors.

torch.distributed.checkpoint (DCP) does so. What does not depend on the process is written by rank 0.
"""

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from relssl import _compat, distributed


class _Unpickler(pickle.Unpickler):
    """Unpickles the index of a folder, and runs no code from it."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _compat.CHECKPOINT_INDEX_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not expected")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads a folder without DCP's pickle.load, which could run code."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        # DCP unpickles what is no tensor, so that there must be nothing else.
        if not all(isinstance(t, TensorStorageMetadata) for t in metadata.state_dict_metadata.values()):
            raise pickle.UnpicklingError("a value is no tensor")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save(folder: Path, module: nn.Module, write_more: Callable[[Path], object]) -> None:
    """Writes the state of a module so that either the whole folder exists at any time, or none.

    Every process must call it; neither folder nor its temporary one, with the suffix .tmp, may exist. Rank 0
    also calls write_more(temporary folder). Tensors other than DTensors are those of rank 0.

    Raises:
        OSError: a process cannot write.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    dist.barrier()  # Rank 0 may be removing what was left there.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        dcp.save(
            {"model": module.state_dict()}, storage_writer=dcp.FileSystemWriter(temporary), planner=planner
        )
        if distributed.rank() == 0:
            write_more(temporary)
            os.replace(temporary, folder)
    except (OSError, dcp.CheckpointException) as error:
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write {folder}: {_reason(error)}") from error


def load(folder: Path, module: nn.Module) -> None:
    """Restores the state of a module; a process reads its part only, and communicates with no other.

    Raises:
        ValueError: the folder is damaged.
        RuntimeError: names or shapes of the module differ from those in the folder.
    """
    reader, state = _Reader(folder), module.state_dict()
    try:
        saved = reader.read_metadata().state_dict_metadata
    except Exception as error:  # pickle raises almost any exception for a damaged file.
        raise ValueError(f"{folder} is damaged ({_reason(error)})") from error
    tensors = {name: tensor for name, tensor in saved.items() if isinstance(tensor, TensorStorageMetadata)}
    _compare_shapes(
        {name.removeprefix("model."): tensor.size for name, tensor in tensors.items()},
        {name: tensor.shape for name, tensor in state.items()},
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load({"model": state}, storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:
        raise ValueError(f"{folder} is damaged ({_reason(error)})") from error
    module.load_state_dict(state)


def remove(folder: Path) -> None:
    """Removes a folder so that it is either whole, or gone by its name."""
    gone = folder.with_name(folder.name + ".tmp")
    os.replace(folder, gone)
    shutil.rmtree(gone)


def _compare_shapes(saved: dict[str, torch.Size], own: dict[str, torch.Size]) -> None:
    """Raises RuntimeError, in the words of load_state_dict, if the names or shapes differ."""
    missing, unexpected = (
        ", ".join(f'"{name}"' for name in one if name not in other)
        for one, other in ((own, saved), (saved, own))
    )
    problems = [f"Missing key(s): {missing}."] * bool(missing)
    problems += [f"Unexpected key(s): {unexpected}."] * bool(unexpected)
    for name in own.keys() & saved.keys():
        if own[name] != saved[name]:
            problems.append(f"{name} is {list(saved[name])} in it, {list(own[name])} in the model.")
    if problems:
        raise RuntimeError(" ".join(problems))


def _reason(error: BaseException) -> str:
    """Returns what failed in a line, without the tracebacks of all processes that DCP collects."""
    if isinstance(error, dcp.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return " ".join(reason.split())
