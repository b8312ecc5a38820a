"""Whether two runs agree: of each comparison that both made, the ratio and its spread in each.

    python bench/compare.py A.json B.json

They agree where each median lies within the other's spread, the lowest to the highest of its rounds. Prints
what does not, with a ! where not even the spreads meet, and how many there are of each.
"""

import json
import sys
from pathlib import Path


def ratios(path: str) -> dict[tuple[str, str, str], list[float]]:
    """(title, shape, peer) -> median, lowest and highest of the rounds' ratios to relssl."""
    entries = json.loads(Path(path).read_text())["results"]
    return {(e["title"], e["shape"], e["peer"]): e["times_ours"] for e in entries if "ms" in e}


def agree(a: list[float], b: list[float]) -> bool:
    return b[1] <= a[0] <= b[2] and a[1] <= b[0] <= a[2]


def meet(a: list[float], b: list[float]) -> bool:
    return a[1] <= b[2] and b[1] <= a[2]


def main() -> None:
    first, second = map(ratios, sys.argv[1:3])
    both = [key for key in first if key in second]
    apart = [key for key in both if not agree(first[key], second[key])]
    far = [key for key in apart if not meet(first[key], second[key])]
    for key in apart:
        told = ["{:.2f} ({:.2f} to {:.2f})".format(*found[key]) for found in (first, second)]
        print(f"{'!' if key in far else ' '} {', '.join(key)}: {told[0]} and {told[1]}")
    same = len(both) - len(apart)
    print(f"of {len(both)} comparisons {same} agree, and the spreads of {len(far)} do not meet")


if __name__ == "__main__":
    main()
