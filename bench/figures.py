"""Writes the plots, and the tables of README.md and docs/, from the JSON in bench/results (make figures).

    python bench/figures.py

In a page, everything between `<!-- figures: NAME -->` and `<!-- end -->` is written; PARTS has the names.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from report import cells, groups, is_relssl, number, rate_limits

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import scaling
import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.S)
ALT = {
    "size": "Time and memory against the size of the queue",
    "rate": "Rate of each peer relative to a matrix product",
    "roofline": "What bounds the work, and the rate that relssl reaches",
    "step": "A training step, and the share of the loss",
}
# The rows of README.md by work, B and K: first those of CPUs, then what GPUs have instead.
SUMMARY = [
    ("relation", 256, 65_536),  # on a CPU in float32 and bfloat16
    ("relation", 64, 4_096),
    ("info_nce", 256, 65_536),
    ("nt_xent", 200, 0),
    ("nt_xent_queue", 200, 65_536),
    ("sacc", 200, 0),
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


def each_device(write: Callable[[Path, dict, Path], str]) -> Callable[[Path], str]:
    """Returns a part that calls `write` with each benchmark, its file and the folder of the page."""
    return lambda folder: "\n\n".join(write(*recorded, folder) for recorded in benchmarks().items())


def device(document: dict) -> str:
    runs = max(entry.get("runs", 1) for entry in document["results"])
    return f"**{document['device']}** ({versions(document)}{f'; the median of {runs} runs' * (runs > 1)}):"


def versions(document: dict) -> str:
    names = ("driver", "torch", "triton", "nvcc", "seeds", "commit", "date")
    return ", ".join(f"{name} {document[name]}" for name in names if name in document)


def plot(path: Path, name: str, folder: Path) -> str:
    """Returns an image as seen from a folder, with a blank line before it; nothing where it was not drawn."""
    image = path.with_name(f"{path.stem}-{name}.png")
    return f"\n\n![{ALT[name]}]({os.path.relpath(image, folder)})" if image.exists() else ""


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join([tables.heading(columns), *map(tables.line, rows)])


def summary(path: Path, document: dict, folder: Path) -> str:
    """Returns the representative cases in a row each."""
    cases = [(title, entries) for title, entries in groups(document) if summarised(entries[0])]
    return f"{device(document)}\n\n{comparisons(cases)}"


def summarised(entry: dict) -> bool:
    return entry["grad"] and (entry["work"], entry["rows"], entry["size"]) in SUMMARY


def benchmark(folder: Path) -> str:
    """Returns everything that is recorded."""
    on_gpu = any("driver" in document for document in benchmarks().values())
    missing = "" if on_gpu else "\n\n**No result on a GPU is recorded yet.**"
    return each_device(section)(folder) + missing


def section(path: Path, document: dict, folder: Path) -> str:
    """Returns the first case with every peer, all other cases in a row each, and the plots."""
    (title, entries), *others = [g for g in groups(document) if not g[1][0]["work"].endswith("_view")]
    rows = []
    for e in entries:
        if "ms" in e:
            name, ms, slowdown, spread, *rest = cells(e)
            row = [name, ms, f"{slowdown} ({spread})", *rest]
            rows.append([f"**{cell}**" for cell in row] if is_relssl(e["peer"]) else row)
    first = markdown(["peer", "ms", "slowdown", "error", "MiB", "of torch.mm's rate"], rows)
    plots = "".join(plot(path, name, folder) for name in ALT)
    return f"{device(document)} {title}\n\n{first}\n\n{comparisons(others)}{plots}"


def comparisons(cases: list[tuple[str, list[dict]]]) -> str:
    """Returns a table with a row for each case: relssl, eager code, and the fastest of all other peers."""
    rows = []
    for title, entries in cases:
        others = [e for e in entries if "ms" in e and not e["peer"].startswith("relssl")]
        if others:
            best = min(others, key=lambda e: e["slowdown"][0])
            timed = [e["ms"][0] for e in entries if "ms" in e and is_relssl(e["peer"])]
            ours = timed[0] if timed else best["ms"][0] / best["slowdown"][0]
            eager = [f"{e['slowdown'][0]:.2f}" for e in others if e["peer"] == "eager"] or [""]
            rows.append([title, number(ours), eager[0], f"{best['slowdown'][0]:.2f}", best["peer"]])
    columns = ["work", "relssl, ms", "slowdown of eager", "slowdown of the best other", "which"]
    return markdown(columns, rows)


def limits(path: Path, document: dict, folder: Path) -> str:
    """Returns the device's rates, and the time that each permits for the first case."""
    title, entries = groups(document)[0]
    ours = next(e for e in entries if "ms" in e and is_relssl(e["peer"]))
    pairs = ours["rows"] * ours["size"]
    queue = ours["size"] * ours["dim"] * (4 if ours["dtype"] == "float32" else 2)
    flop = 8 * pairs * ours["dim"]
    needed = {
        "fma": ("flop of multiply-adds in registers", flop),
        "matmul": ("flop of torch.mm", flop),
        "exponentials": ("exponentials", 2 * pairs),
        "bandwidth": ("bytes of the queue", queue),
    }
    rates = rate_limits(document)
    rows = [
        [name, number(rates[key] / 1e9), number(1e3 * amount / rates[key])]
        for key, (name, amount) in needed.items()
        if key in rates
    ]
    rows.append([f"**{ours['peer']}, measured**", number(ours["flop_rate"] / 1e9), number(ours["ms"][0])])
    table = markdown(["", "10⁹ per second", "ms"], rows)
    return f"{device(document)} {title}\n\n{table}{plot(path, 'roofline', folder)}"


def step(path: Path, document: dict, folder: Path) -> str:
    """Returns the time of a training step of ReSSL and the loss's share of it, for each size of the queue."""
    steps = [e for e in document["results"] if e["work"] == "ressl_step" and "ms" in e]
    rows = []
    for size in sorted({e["size"] for e in steps}):
        cells_of = {
            e["peer"]: [number(e["ms"][0]), f"{e['loss_share']:.0%}"] for e in steps if e["size"] == size
        }
        rows.append([f"{size:,}", *cells_of.get("relssl", ["-", "-"]), *cells_of.get("eager", ["-", "-"])])
    columns = ["K", "relssl, ms", "share of the loss", "eager, ms", "share of the loss"]
    return f"{device(document)}\n\n{markdown(columns, rows)}{plot(path, 'step', folder)}"


def parts(path: Path, document: dict, folder: Path) -> str:
    """Returns time and operations of each part of the steps, with relssl's views and with kornia's."""
    steps = [e for e in document["results"] if "parts_ms" in e and e["peer"] in ("relssl", "kornia")]
    steps = [e for e in steps if e["size"] in (0, 4_096)]
    if not steps:
        return f"{device(document)} not recorded yet."
    names = list(steps[0]["parts_ms"])
    rows = []
    for e in steps:
        cells = [f"{number(e['parts_ms'][name])} ms, {e['parts_operations'][name]:,}" for name in names]
        method = e["title"].removeprefix("a training step of ").partition(",")[0]
        rows.append([f"{method}, {e['peer']}", *cells, f"{e['operations']:,}", f"{e['synchronisations']}"])
    columns = ["", *names, "operations", "synchronisations"]
    return f"{device(document)} {steps[0]['shape'].partition(',')[0]}\n\n{markdown(columns, rows)}"


def views(path: Path, document: dict, folder: Path) -> str:
    """Returns time, operations and compiled kernels of each view and peer."""
    rows = []
    for title, entries in groups(document):
        for e in entries:
            if e["work"].endswith("_view") and "ms" in e:
                low, high = e["slowdown"][1:]
                slowdown = f"{e['slowdown'][0]:.2f} ({low:.2f} to {high:.2f})"
                found = (e.get(name) for name in ("operations", "synchronisations", "kernels"))
                counts = ["-" if value is None else f"{value:,}" for value in found]
                rows.append([title, e["peer"], number(e["ms"][0]), slowdown, *counts])
    if not rows:
        return f"{device(document)} not recorded yet."
    columns = ["view", "peer", "ms", "slowdown", "operations", "synchronisations", "kernels"]
    return f"{device(document)}\n\n{markdown(columns, rows)}"


def growth(path: Path, document: dict, folder: Path) -> str:
    """Returns time and memory of the relation loss for each size of the queue, for batches with several."""
    first = document["results"][0]
    cells_of: dict[tuple[int, int], dict[str, str]] = {}
    for e in sorted((e for e in document["results"] if "bytes" in e), key=lambda e: -e["ms"][0]):
        if all(e[name] == first[name] for name in ("work", "grad", "dim", "dtype")):
            peer = "relssl" if is_relssl(e["peer"]) else e["peer"]  # the fastest one, which comes last
            cell = f"{number(e['ms'][0])} ms, {number(e['bytes'] / 2**20)} MiB"
            cells_of.setdefault((e["rows"], e["size"]), {})[peer] = cell
    sizes = Counter(rows for rows, _ in cells_of)
    rows = [
        [f"B {b:,}, K {k:,}", *(cells_of[b, k].get(peer, "-") for peer in ("eager", "relssl"))]
        for b, k in sorted(cells_of)
        if sizes[b] > 1
    ]
    table = markdown(["", "eager", "relssl"], rows)
    return f"{device(document)}\n\n{table}{plot(path, 'size', folder)}"


def report(name: str, folder: Path) -> str:
    """Returns the table of a report of tools/."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    return f"By {versions(document)}:\n\n{tables.table(document['rows'])}"


def adopters(folder: Path) -> str:
    """Returns the comparison with other packages that `make adopters` has recorded."""
    return adopters_table(json.loads((RESULTS / "adopters.json").read_text()))


def adopters_table(document: dict) -> str:
    rows = []
    for e in document["comparisons"]:
        if "error" in e:
            rows.append([e["package"], e["title"], e["error"], *[""] * 6])
            continue
        ms, needed = e["ms"], e.get("bytes")
        low, high = e["slowdown"][1:]
        rows.append(
            [
                f"{e['package']} {e['version']}",
                f"{e['title']}, {e['shape']}",
                f"{e['loss_difference']:.1e}",
                f"{e['gradient_difference']:.1e} of {e['gradient']:.1e}",
                *(number(ms[side]) for side in ("theirs", "ours")),
                f"{e['slowdown'][0]:.2f} ({low:.2f} to {high:.2f})",
                *(mebibytes(needed[side]) if needed else "-" for side in ("theirs", "ours")),
            ]
        )
    columns = [
        "package",
        "its loss",
        "loss differs by",
        "gradient differs by",
        "its ms",
        "relssl's ms",
        "slowdown",
    ]
    table = markdown([*columns, "its MiB", "relssl's MiB"], rows)
    return f"**{document['device']}** ({versions(document)}):\n\n{table}"


def mebibytes(value: int) -> str:
    """Less than one is not told from nothing: Linux counts resident pages in batches."""
    return number(value / 2**20) if value >= 2**20 else "< 1"


def model(write: Callable[[], list[tables.Row]], folder: Path) -> str:
    """Returns a table of the model of many GPUs, which reads no results."""
    return tables.table(write())


REPORTS = ("triton-resources", "triton-predictions", "cuda-resources", "cuda-predictions", "methods")
PARTS: dict[str, Callable[[Path], str]] = {
    "adopters": adopters,
    "benchmark": benchmark,
    **{write.__name__: each_device(write) for write in (summary, limits, step, growth, parts, views)},
    **{name: partial(report, name) for name in REPORTS},
    **{f"scaling-{write.__name__}": partial(model, write) for write in scaling.TABLES},
}


if __name__ == "__main__":
    from plots import draw, draw_scaling

    for recorded in benchmarks():
        print(*draw(recorded), sep="\n")
    print(draw_scaling(ROOT / "docs" / "scaling.png"))
    for page in PAGES:
        page.write_text(filled(page))
