"""The choices of `relssl tune`, which backend="auto" follows.

The file tuned.json, in $RELSSL_CACHE or else in the user's cache folder, has a list of entries for each
environment: a device with its driver, and the versions of torch, Triton and relssl. An entry has a dtype, a
width `dim`, the `rows` of queries and keys together and the rows of the `queue` that it was measured for, the
`choice`, and the figures of all candidates. It holds for sizes up to four times as large or as small; the
defaults hold elsewhere.

The file is read once, at the first call; RELSSL_TUNE=0 leaves it unread. A training run adopts the choices
that it began with, and its checkpoint records them, since other kernels would round otherwise.
"""

import json
import logging
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from relssl._compat import constant_result, cuda_driver_version
from relssl.version import __version__

SHAPE = ("dtype", "dim", "rows", "queue")
NEAR = 4  # An entry holds for rows and queues up to so many times as large or as small.
Record = dict[str, Any]  # {"environment": str, "choices": [Choice as a list]}


class Choice(NamedTuple):
    dtype: str  # without "torch."
    dim: int
    rows: int  # of queries and keys together
    queue: int
    backend: str


_adopted: Record | None = None  # the choices of a training run, in place of the file's
_choices: dict[tuple, tuple[Choice, ...]] = {}  # by device type and dtype
_advised = False


def path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RELSSL_CACHE") or Path(cache) / "relssl") / "tuned.json"


def environment(device: str) -> str:
    """Returns all that a measurement on a device type depends on, as text."""
    if device == "cuda":
        driver = f"HIP {torch.version.hip}"
        if not torch.version.hip:
            major, minor = divmod(cuda_driver_version(), 1000)
            driver = f"driver for CUDA {major}.{minor // 10}"
        about = f"{torch.cuda.get_device_name()}, {driver}"
    else:
        about = f"{processor()}, {torch.get_num_threads()} threads"
    return f"{about}, torch {torch.__version__}, Triton {_triton()}, relssl {__version__}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def read() -> dict[str, list[dict[str, Any]]]:
    """Returns the entries of every environment; none where the file is missing or damaged."""
    try:
        table = json.loads(path().read_text())
        return {own: list(filter(_is_entry, entries)) for own, entries in table.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # It may hold anything.
        return {}


def _is_entry(entry: Any) -> bool:
    sizes = [entry.get(name) for name in ("dim", "rows", "queue")]
    words = [entry.get(name) for name in ("dtype", "choice")]
    return all(type(n) is int and n > 0 for n in sizes) and all(type(word) is str for word in words)


def store(own: str, entries: list[dict[str, Any]]) -> None:
    """Write the entries of an environment, each in place of one for the same shape."""
    table, file = read(), path()
    kept = {_shape(entry): entry for entry in [*table.get(own, []), *entries]}
    table[own] = list(kept.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps(table, indent=1))
        partial.replace(file)  # Whole or not at all, beside other writers.
    finally:
        partial.unlink(missing_ok=True)
    _choices.clear()


def _shape(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in SHAPE)


def record(device: str) -> Record:
    """Returns the choices in force for a device: those adopted, or else this environment's in the file."""
    if _adopted is not None:
        return _adopted
    own = environment(device)
    entries = [] if os.environ.get("RELSSL_TUNE") == "0" else read().get(own, [])
    return {"environment": own, "choices": [[*_shape(entry), entry["choice"]] for entry in entries]}


def adopt(record: Record | None) -> None:
    """Puts these choices in force in place of the file's; with None, the file's again."""
    global _adopted
    _adopted = record
    _choices.clear()


def matching(device: str, dtype: torch.dtype) -> tuple[Choice, ...]:
    """Returns the choices in force for a dtype."""
    if _adopted is None and os.environ.get("RELSSL_TUNE") == "0":
        return ()
    name = str(dtype).removeprefix("torch.")
    every = (Choice(*choice) for choice in record(device)["choices"])
    return tuple(choice for choice in every if choice.dtype == name)


@constant_result
def choices(device: str, dtype: torch.dtype) -> tuple[Choice, ...]:
    """Returns `matching`, which is called once."""
    found = _choices.get((device, dtype))
    if found is None:
        found = _choices[device, dtype] = matching(device, dtype)
        if device == "cuda" and not found:
            _advise()
    return found


def _advise() -> None:
    global _advised
    ignored = os.environ.get("RELSSL_TUNE") == "0" or _adopted is not None
    if not _advised and not ignored and not record("cuda")["choices"]:
        logging.getLogger("relssl").warning(
            "no kernels were chosen by measurement on this GPU: `relssl tune` does that, once (RELSSL_TUNE=0"
            " silences this)"
        )
    _advised = True


def nearest(choices: Sequence[Choice], dim: int, rows: int, queue: int) -> Choice | None:
    """Returns the choice for this width at the nearest size, or None where none is near."""
    best, least = None, float(NEAR * NEAR)
    for own in choices:
        if own.dim != dim:
            continue
        by_rows = rows / own.rows if rows > own.rows else own.rows / rows
        by_queue = queue / own.queue if queue > own.queue else own.queue / queue
        if by_rows <= NEAR and by_queue <= NEAR and by_rows * by_queue <= least:
            best, least = own, by_rows * by_queue
    return best
