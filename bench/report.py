"""The results of a run: kept as JSON, printed as tables."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import median

import machine
from timing import slowdown
from work import Case


class Results:
    """One entry for each peer of each case, written at once where a folder was given."""

    def __init__(self, folder: Path | None) -> None:
        self.entries: list[dict] = []
        self.about = machine.about()
        name = re.sub(r"[^a-z0-9]+", "-", self.about["device"].lower()).strip("-")
        self.path = folder / f"{name}.json" if folder else None

    def document(self) -> dict:
        """Returns what is recorded; limits, which take a second to measure, only in a file."""
        limits = {"limits": self.limits} if self.path else {}
        return {**self.about, **limits, "results": self.entries}

    @cached_property
    def limits(self) -> dict[str, float]:
        return machine.limits()

    def add(self, entry: dict) -> dict:
        self.entries.append(entry)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.document(), indent=1) + "\n")
        return entry

    def absent(self, case: Case, peer: str, why: str, title: str | None = None) -> None:
        self.add({**described(case), "title": title or case.title, "peer": peer, "absent": why})

    def timed(
        self,
        case: Case,
        peer: str,
        seconds: dict[str, list[float]],
        error: float | None,
        peak: int | None,
        product: int = 0,
        extra: dict | None = None,
    ) -> dict:
        """Adds the entry of a peer's seconds and returns it.

        Args:
            seconds: of "peer", "ours" and "between" (timing.alternate).
            error: relative, against float64.
            peak: bytes beyond inputs and queue.
            product: flop of "between".
        """
        took = seconds["peer"]
        entry = {
            **described(case),
            "peer": peer,
            "ms": rounded([1e3 * s for s in (median(took), min(took), max(took))]),
            "slowdown": rounded(slowdown(took, seconds["ours"])),  # median, lowest, highest of the rounds
            "rounds": len(took),
        }
        if error is not None:
            entry["error"] = float(f"{error:.2g}")
        if peak is not None:
            entry["bytes"] = peak
        if product:
            rate = product / median(seconds["between"])
            entry["flop_rate"], entry["matmul_rate"] = rounded([case.flop / median(took), rate])
        return self.add(entry | (extra or {}))


def described(case: Case) -> dict:
    return {"title": case.title, "shape": case.shape, **asdict(case)}


def rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


LEGEND = """\
ms: the median of rounds that alternate between a peer and relssl's default backend.
slowdown: the peer's time divided by that backend's, the median of the rounds with the lowest and highest.
error: relative, of loss and gradients, against float64. MiB: peak memory beyond inputs and queue.
of mm: the rate at which the least sufficient work is done, as a part of torch.mm's in the same rounds."""


def show(document: dict, width: int) -> None:
    """Prints a table for each case, the fastest peer first, absent ones below it."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, entries in groups(document):
            print(title, *("  ".join(cells(entry)) for entry in entries), sep="\n  ")
        return
    console = Console(width=max(width, 100), highlight=False, soft_wrap=True)
    console.print(
        ", ".join(f"{name} {document[name]}" for name in document if isinstance(document[name], str))
    )
    console.print(LEGEND)
    for title, entries in groups(document):
        table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
        table.add_column("peer", min_width=26)
        for name in ("ms", "slowdown", "(rounds)", "error", "MiB", "of mm"):
            table.add_column(name, justify="right")
        for entry in entries:
            table.add_row(*cells(entry), style="bold" if entry["peer"].startswith("relssl") else None)
        console.print(table)
        for entry in entries:
            if "absent" in entry:
                console.print(f"  without {entry['peer']}: {entry['absent']}", style="dim")
            if "of_fma_rate" in entry:
                rate = f"{entry['of_fma_rate']:.2f} of the rate of multiply-adds in registers"
                console.print(f"  {entry['peer']}: {rate}", style="dim")
            if "host_us" in entry and is_relssl(entry["peer"]):
                host = f"the host takes {entry['host_us']:.0f} µs a call"
                console.print(f"  {entry['peer']}: {host}", style="dim")
            if "operations" in entry:
                counts = f"{entry['operations']} operations, {entry['synchronisations']} synchronisations"
                console.print(f"  {entry['peer']}: {counts}", style="dim")
            if "kernels" in entry:
                console.print(f"  {entry['peer']}: {entry['kernels']} kernels", style="dim")
            if "loss_share" in entry:
                share = f"{number(entry['loss_ms'])} ms, {entry['loss_share']:.0%} of the step"
                console.print(f"  {entry['peer']}: the losses take {share}", style="dim")


def groups(document: dict) -> list[tuple[str, list[dict]]]:
    """Returns the entries of each case by its title, the fastest first."""
    found: dict[str, list[dict]] = {}
    for entry in document["results"]:
        found.setdefault(f"{entry['title']}, {entry['shape']}", []).append(entry)
    return [(t, sorted(e, key=lambda x: x["ms"][0] if "ms" in x else float("inf"))) for t, e in found.items()]


def is_relssl(name: str) -> bool:
    """Returns whether a peer is one of relssl's kernels, not its PyTorch code."""
    return name.startswith("relssl") and name not in ("relssl chunked", "relssl reference")


def cells(entry: dict) -> list[str]:
    if "absent" in entry:
        return [entry["peer"], "absent"]
    mid, low, high = entry["slowdown"]
    return [
        entry["peer"],
        number(entry["ms"][0]),
        f"{mid:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{entry['error']:.0e}" if "error" in entry else "",
        number(entry["bytes"] / 2**20) if "bytes" in entry else "",
        f"{entry['flop_rate'] / entry['matmul_rate']:.2f}" if "flop_rate" in entry else "",
    ]


def number(value: float) -> str:
    """Returns a number with three digits, or more where it is larger."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate_limits(document: dict) -> dict[str, float]:
    """Returns a device's rates: "matmul", "bandwidth" and, where measured, "exponentials" and "fma"."""
    rates = [
        e["flop_rate"] / e["of_fma_rate"]
        for e in document["results"]
        if "of_fma_rate" in e and e["dtype"] == "float32"
    ]
    return document["limits"] | ({"fma": median(rates)} if rates else {})
