"""What a run found: kept as JSON, shown as a table."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median

import machine
from timing import ratio
from work import Case


class Results:
    """An entry for each peer of each case; written anew after each, so that a run cut short keeps what it has."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: list[dict] = []
        self.about = machine.about()

    def document(self) -> dict:
        return {**self.about, "results": self.entries}

    def add(self, entry: dict) -> None:
        self.entries.append(entry)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.document(), indent=1) + "\n")

    def absent(self, case: Case, peer: str, why: str) -> None:
        self.add({**described(case), "peer": peer, "absent": why})

    def timed(
        self,
        case: Case,
        peer: str,
        seconds: dict[str, list[float]],
        error: float | None,
        peak: int | None,
        product: int = 0,
        extra: dict | None = None,
    ) -> None:
        """seconds: of "peer", "ours" and, `product` flop each, "between" (timing.alternate)."""
        took = seconds["peer"]
        entry = {
            **described(case),
            "peer": peer,
            "ms": rounded([1e3 * s for s in (median(took), min(took), max(took))]),
            "times_ours": rounded(ratio(took, seconds["ours"])),  # median, lowest, highest of the rounds
            "rounds": len(took),
        }
        if error is not None:
            entry["error"] = float(f"{error:.2g}")
        if peak is not None:
            entry["bytes"] = peak
        if product:
            rate = product / median(seconds["between"])
            entry["of_matmul_rate"] = rounded([case.flop / median(took) / rate])[0]
        self.add(entry | (extra or {}))


def described(case: Case) -> dict:
    return {"title": case.title, "shape": case.shape, **asdict(case)}


def rounded(values) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


def show(document: dict, width: int) -> None:
    """The table in the terminal: a part for each case, fastest first, absent peers last."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(width, 100), highlight=False)
    console.print(", ".join(f"{name} {document[name]}" for name in document if name != "results"))
    console.print(
        "Times are medians of rounds taken in turn with relssl's default backend; × is how many times as long as that\n"
        "a peer takes, with the lowest and highest of the rounds. The error is against float64, the memory beyond\n"
        "inputs and queue, the rate that of the least work, as a part of torch.mm's rate in the same rounds."
    )
    for title, entries in groups(document):
        table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
        table.add_column("peer", min_width=26)
        for name in ("ms", "×", "(rounds)", "error", "MiB", "of mm"):
            table.add_column(name, justify="right")
        for entry in entries:
            table.add_row(*cells(entry), style="bold" if entry["peer"].startswith("relssl") else None)
        console.print(table)
        for entry in entries:
            if "absent" in entry:
                console.print(f"  without {entry['peer']}: {entry['absent']}", style="dim")


def groups(document: dict) -> list[tuple[str, list[dict]]]:
    found: dict[str, list[dict]] = {}
    for entry in document["results"]:
        found.setdefault(f"{entry['title']}, {entry['shape']}", []).append(entry)
    return [(t, sorted(e, key=lambda x: x["ms"][0] if "ms" in x else float("inf"))) for t, e in found.items()]


def cells(entry: dict) -> list[str]:
    if "absent" in entry:
        return [entry["peer"], "absent", "", "", "", "", ""]
    mid, low, high = entry["times_ours"]
    return [
        entry["peer"],
        number(entry["ms"][0]),
        f"{mid:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{entry['error']:.0e}" if "error" in entry else "",
        number(entry["bytes"] / 2**20) if "bytes" in entry else "",
        f"{entry['of_matmul_rate']:.2f}" if entry.get("of_matmul_rate") else "",
    ]


def number(value: float) -> str:
    """Three digits, or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
