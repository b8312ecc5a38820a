"""Several runs on one device: merged into one result, or compared.

    python bench/runs.py merge OUT.json A.json B.json ...
    python bench/runs.py compare A.json B.json

A single run has the spread of its rounds; a merged one has that of processes, too. merge: a peer's time and
slowdown become the median of the runs' medians, with the lowest and highest of all rounds; error and memory
become the largest. compare: lists the slowdowns whose spreads, from lowest to highest, do not overlap.
"""

import json
import sys
from pathlib import Path
from statistics import median

from report import rounded

SAME = ("device", "threads", "torch", "commit")


def merge(documents: list[dict]) -> dict:
    """Returns one document of several.

    Raises:
        ValueError: they differ in device, threads, version of torch or commit.
    """
    for name in SAME:
        if len(found := {document.get(name) for document in documents}) > 1:
            raise ValueError(f"runs of more than one {name}: {', '.join(map(str, found))}")
    entries: dict[tuple, list[dict]] = {}
    for document in documents:
        for entry in document["results"]:
            entries.setdefault(key(entry), []).append(entry)
    return documents[0] | {"results": [_merge_entries(found) for found in entries.values()]}


def key(entry: dict) -> tuple[str, str, str]:
    return entry["title"], entry["shape"], entry["peer"]


def _merge_entries(entries: list[dict]) -> dict:
    timed = [e for e in entries if "ms" in e]
    if not timed:
        return entries[0]
    result = timed[0] | {"runs": len(timed), "rounds": sum(e["rounds"] for e in timed)}
    for name in ("ms", "slowdown"):
        medians, lows, highs = zip(*(e[name] for e in timed), strict=True)
        result[name] = rounded([median(medians), min(lows), max(highs)])
    for name in ("error", "bytes"):
        if found := [e[name] for e in timed if name in e]:
            result[name] = max(found)
    for name in ("flop_rate", "matmul_rate", "of_fma_rate", "loss_ms", "loss_share", "host_us"):
        if found := [e[name] for e in timed if name in e]:
            (result[name],) = rounded([median(found)])
    if "parts_ms" in result:
        of_part = {part: [e["parts_ms"][part] for e in timed] for part in result["parts_ms"]}
        result["parts_ms"] = {part: rounded([median(found)])[0] for part, found in of_part.items()}
    return result


def overlap(a: list[float], b: list[float]) -> bool:
    """Returns whether two spreads, (median, lowest, highest), overlap."""
    return a[1] <= b[2] and b[1] <= a[2]


def compare(first: dict, second: dict) -> None:
    a, b = ({key(e): e["slowdown"] for e in d["results"] if "ms" in e} for d in (first, second))
    both = [name for name in a if name in b]
    apart = [name for name in both if not overlap(a[name], b[name])]
    for name in apart:
        spreads = ["{:.2f} ({:.2f} to {:.2f})".format(*found[name]) for found in (a, b)]
        print(f"{', '.join(name)}: {spreads[0]} and {spreads[1]}")
    print(f"{len(both) - len(apart)} of {len(both)} comparisons agree")


def main() -> None:
    match sys.argv[1:]:
        case ["merge", out, *paths] if paths:
            document = merge([json.loads(Path(path).read_text()) for path in paths])
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out).write_text(json.dumps(document, indent=1) + "\n")
        case ["compare", first, second]:
            compare(*(json.loads(Path(path).read_text()) for path in (first, second)))
        case _:
            raise SystemExit((__doc__ or "").split("\n\n")[1])


if __name__ == "__main__":
    main()
