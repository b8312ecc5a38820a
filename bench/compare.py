"""Whether two results agree: of each comparison that both made, the ratio and its spread in each.

    python bench/compare.py A.json B.json

They agree where the spreads meet, which go from the lowest to the highest of the rounds. Prints those that do
not, and how many do. A single run knows nothing of how processes differ: bench/merge.py makes one result of
several.
"""

import json
import sys
from pathlib import Path


def ratios(path: str) -> dict[tuple[str, str, str], list[float]]:
    """(title, shape, peer) -> median, lowest and highest of the rounds' ratios to relssl."""
    entries = json.loads(Path(path).read_text())["results"]
    return {(e["title"], e["shape"], e["peer"]): e["times_ours"] for e in entries if "ms" in e}


def agree(a: list[float], b: list[float]) -> bool:
    return a[1] <= b[2] and b[1] <= a[2]


def main() -> None:
    first, second = map(ratios, sys.argv[1:3])
    both = [key for key in first if key in second]
    apart = [key for key in both if not agree(first[key], second[key])]
    for key in apart:
        told = ["{:.2f} ({:.2f} to {:.2f})".format(*found[key]) for found in (first, second)]
        print(f"{', '.join(key)}: {told[0]} and {told[1]}")
    print(f"{len(both) - len(apart)} of {len(both)} comparisons agree")


if __name__ == "__main__":
    main()
