"""Writes the plots, and the tables of README.md and docs/, from the JSON in bench/results (make figures).

    python bench/figures.py

In a page, everything between `<!-- figures: NAME -->` and `<!-- end -->` is written; PARTS has the names.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from report import cells, groups, number, own

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.S)
ALT = {
    "size": "Time and memory against the size of the queue",
    "rate": "Rate of each peer as a part of a matrix product's",
    "roofline": "The bounds of the work, and relssl's distance from them",
    "step": "A training step, and the loss's share of it",
}
# The rows of README.md by work, B and K: first those of CPUs, then what GPUs have instead.
SUMMARY = [
    ("relation", 256, 65_536),  # on a CPU in float32 and bfloat16
    ("relation", 64, 262_144),
    ("relation", 64, 4_096),  # where relssl is slower
    ("multi_crop", 64, 16_384),
    ("info_nce", 256, 65_536),
    ("nt_xent", 1024, 0),
    ("ressl_step", 128, 65_536),
    ("multi_crop", 256, 65_536),
    ("nt_xent", 4096, 0),
    ("ressl_step", 256, 65_536),
]


def filled(page: Path) -> str:
    """Returns a page's text with its marked parts written from the recorded results."""

    def part(found: re.Match) -> str:
        return f"{found[1]}\n{PARTS[found[2]](page.parent)}\n\n{found[3]}"

    return MARKED.sub(part, page.read_text())


def benchmarks() -> dict[Path, dict]:
    """Returns the recorded benchmark of each device; the other files are reports of tools/."""
    documents = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return {path: document for path, document in documents.items() if "results" in document}


def summary(folder: Path) -> str:
    """Returns a table of the representative cases for each device."""
    found = []
    for document in benchmarks().values():
        kept = [(title, entries) for title, entries in groups(document) if summarised(entries[0])]
        found.append(f"{device(document)}:\n\n{comparisons(kept)}")
    return "\n\n".join(found)


def summarised(entry: dict) -> bool:
    return entry["grad"] and (entry["work"], entry["rows"], entry["size"]) in SUMMARY


def benchmark(folder: Path) -> str:
    """Returns everything recorded of each device, with plots as seen from a folder."""
    documents = benchmarks()
    found = [section(path, document, folder) for path, document in documents.items()]
    if not any("driver" in document for document in documents.values()):
        found.append("**No result on a GPU is recorded yet.**")
    return "\n\n".join(found)


def section(path: Path, document: dict, folder: Path) -> str:
    """Returns the first case with every peer, all other cases in a row each, and the plots."""
    (title, entries), *others = groups(document)
    lines = [f"{device(document)}: {title}", ""]
    lines.append(tables.heading(["peer", "ms", "slowdown", "error", "MiB", "of torch.mm's rate"]))
    for e in entries:
        if "ms" in e:
            name, ms, slowdown, spread, *rest = cells(e)
            row = [name, ms, f"{slowdown} ({spread})", *rest]
            lines.append(tables.line(f"**{c}**" if own(e["peer"]) else c for c in row))
    lines += ["", comparisons(others)]
    for name, alt in ALT.items():
        plot = path.with_name(f"{path.stem}-{name}.png")
        if plot.exists():
            lines += ["", f"![{alt}]({os.path.relpath(plot, folder)})"]
    return "\n".join(lines)


def device(document: dict) -> str:
    runs = max(entry.get("runs", 1) for entry in document["results"])
    return f"**{document['device']}** ({versions(document)}{f'; the median of {runs} runs' * (runs > 1)})"


def versions(document: dict) -> str:
    names = ("driver", "torch", "triton", "nvcc", "commit", "date")
    return ", ".join(f"{name} {document[name]}" for name in names if name in document)


def comparisons(cases: list[tuple[str, list[dict]]]) -> str:
    """Returns a table with a row for each case: relssl, eager code, and the fastest of all other peers."""
    columns = ["work", "relssl, ms", "slowdown of eager", "slowdown of the best other", "which"]
    lines = [tables.heading(columns)]
    for title, entries in cases:
        others = [e for e in entries if "ms" in e and not e["peer"].startswith("relssl")]
        if others:
            best = min(others, key=lambda e: e["slowdown"][0])
            timed = [e["ms"][0] for e in entries if "ms" in e and own(e["peer"])]
            ours = timed[0] if timed else best["ms"][0] / best["slowdown"][0]
            eager = [f"{e['slowdown'][0]:.2f}" for e in others if e["peer"] == "eager"] or [""]
            slowdown = f"{best['slowdown'][0]:.2f}"
            lines.append(tables.line([title, number(ours), eager[0], slowdown, best["peer"]]))
    return "\n".join(lines)


def report(name: str, folder: Path) -> str:
    """Returns the table of a report of tools/."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    return f"By {versions(document)}:\n\n{tables.table(document['rows'])}"


REPORTS = ("triton-resources", "triton-predictions", "cuda-resources", "cuda-predictions")
PARTS: dict[str, Callable[[Path], str]] = {
    "summary": summary,
    "benchmark": benchmark,
    **{name: partial(report, name) for name in REPORTS},
}


if __name__ == "__main__":
    from plots import draw

    for recorded in benchmarks():
        print(*draw(recorded), sep="\n")
    for page in PAGES:
        page.write_text(filled(page))
