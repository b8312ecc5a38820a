"""README.md's part on speed, written from bench/results (make figures).

    python bench/figures.py

draws the plots of bench/results/*.json anew, and writes what lies between two marks in README.md.
"""

import json
from pathlib import Path

from report import cells, groups, number, own

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- make figures writes from here -->", "<!-- to here -->"
ALT = {
    "size": "Time and memory against the size of the queue",
    "rate": "Rate of each peer as a part of a matrix product's",
    "roofline": "What bounds the work, and how near relssl comes",
    "step": "A training step, and the loss's share of it",
}


def readme(text: str) -> str:
    """README.md with the part between its two marks written from bench/results."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    documents = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    parts = [section(path, document, ROOT) for path, document in documents.items()]
    if not any("driver" in document for document in documents.values()):
        parts.append("**No result on a GPU is recorded yet.**\n")
    return before + START + "\n\n" + "\n".join(parts) + "\n" + END + after


def section(path: Path, document: dict, root: Path) -> str:
    """The yardstick with every peer, all other work in a line each, and the plots, as seen from a folder."""
    (title, entries), *others = groups(document)
    versions = ", ".join(
        f"{n} {document[n]}" for n in ("driver", "torch", "triton", "commit", "date") if n in document
    )
    runs = max(e.get("runs", 1) for e in entries)
    versions += f"; the median of {runs} runs" if runs > 1 else ""
    lines = [f"**{document['device']}** ({versions}): {title}", ""]
    lines += ["| | ms | times relssl's | error | MiB | of torch.mm's rate |", "|---|---|---|---|---|---|"]
    for e in entries:
        if "ms" in e:
            name, ms, times, spread, *rest = cells(e)
            row = [name, ms, f"{times} ({spread})", *rest]
            lines.append("| " + " | ".join(f"**{c}**" if own(e["peer"]) else c for c in row) + " |")
    lines += ["", "| | relssl, ms | times that: eager | best other | |", "|---|---|---|---|---|"]
    for title, entries in others:
        rest = [e for e in entries if "ms" in e and not e["peer"].startswith("relssl")]
        if rest:
            best = min(rest, key=lambda e: e["times_ours"][0])
            timed = [e["ms"][0] for e in entries if "ms" in e and own(e["peer"])]
            ours = timed[0] if timed else best["ms"][0] / best["times_ours"][0]
            eager = [f"{e['times_ours'][0]:.2f}" for e in rest if e["peer"] == "eager"] or [""]
            lines.append(
                f"| {title} | {number(ours)} | {eager[0]} | {best['times_ours'][0]:.2f} | {best['peer']} |"
            )
    lines += [""]
    for name in ALT:
        plot = path.with_name(f"{path.stem}-{name}.png")
        if plot.exists():
            lines += [f"![{ALT[name]}]({plot.relative_to(root)})", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    from plots import draw

    for recorded in sorted(RESULTS.glob("*.json")):
        print(*draw(recorded), sep="\n")
    target = ROOT / "README.md"
    target.write_text(readme(target.read_text()))
