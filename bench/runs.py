"""Several runs of one device made into one result, whose spread is that of processes, not of rounds alone.

    python bench/merge.py OUT.json A.json B.json ...

Time and ratio of a peer become the median of the runs' medians, with the lowest and highest of all their
rounds; error and memory the largest. All must be of one device, one version of torch and one commit.
"""

import json
import sys
from pathlib import Path
from statistics import median

from report import rounded

SAME = ("device", "threads", "torch", "commit")


def merged(documents: list[dict]) -> dict:
    for name in SAME:
        if len(found := {document.get(name) for document in documents}) > 1:
            raise ValueError(f"runs of more than one {name}: {', '.join(map(str, found))}")
    entries: dict[tuple, list[dict]] = {}
    for document in documents:
        for entry in document["results"]:
            entries.setdefault((entry["title"], entry["shape"], entry["peer"]), []).append(entry)
    return documents[0] | {"results": [_together(found) for found in entries.values()]}


def _together(entries: list[dict]) -> dict:
    timed = [e for e in entries if "ms" in e]
    if not timed:
        return entries[0]
    result = timed[0] | {"runs": len(timed), "rounds": sum(e["rounds"] for e in timed)}
    for name in ("ms", "times_ours"):
        mids, lows, highs = zip(*(e[name] for e in timed), strict=True)
        result[name] = rounded([median(mids), min(lows), max(highs)])
    for name in ("error", "bytes"):
        if found := [e[name] for e in timed if name in e]:
            result[name] = max(found)
    for name in ("flop_rate", "matmul_rate", "of_fma_rate", "loss_ms", "loss_share", "host_us"):
        if found := [e[name] for e in timed if name in e]:
            (result[name],) = rounded([median(found)])
    return result


if __name__ == "__main__":
    out, *paths = map(Path, sys.argv[1:])
    document = merged([json.loads(path.read_text()) for path in paths])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
