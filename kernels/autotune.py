"""Tiles by measurement, where RELSSL_AUTOTUNE=1 asks for it: each choice is printed, and kept on disk.

Off by default: processes that measure for themselves may choose differently, and then sum in another order.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from relssl.kernels.heuristics import Tiles
from triton.runtime.errors import TritonError


def wanted() -> bool:
    return os.environ.get("RELSSL_AUTOTUNE") == "1"


def path() -> Path:
    """Where choices are kept: in $RELSSL_CACHE, or else in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RELSSL_CACHE") or Path(cache) / "relssl") / "tiles.json"


_known: dict[Path, dict[str, list[Any]]] = {}  # what the disk holds, read once


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or damaged: to be measured again
        return {}


def choose(key: str, candidates: Iterable[Tiles], measure: Callable[[Tiles], float]) -> Tiles:
    """The fastest of the candidates by measure(tiles), in milliseconds; asked again, what was chosen before.

    A candidate that does not compile or does not fit the chip is passed over.
    """
    file = path()
    if file not in _known:
        _known[file] = _read(file)
    known = _known[file]
    if key not in known:
        times = {}
        for tiles in candidates:
            try:
                times[tiles] = measure(tiles)
            except TritonError:
                continue
            except RuntimeError as error:  # which launches raise, too
                if "PassManager::run failed" not in str(error):
                    raise
        if not times:
            raise RuntimeError(f"relssl: no tiles that were tried for {key} fit this chip")
        best = min(times, key=lambda tiles: times[tiles])
        print(f"relssl: {key}: {best}, {times[best]:.3f} ms, fastest of {len(times)}")
        known[key] = list(best)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_read(file) | known, indent=1))
        partial.replace(file)  # whole or not at all, whoever else writes
    return Tiles(*known[key])
