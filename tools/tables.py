"""Rows of a report: printed as a table in Markdown, and kept as JSON for `make figures`."""

import json
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from machine import commit

Row = dict[str, str | int]  # a cell for each heading


def heading(columns: Iterable[str]) -> str:
    columns = list(columns)
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def line(cells: Iterable[str | int]) -> str:
    return f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else cell for cell in cells)} |"


def table(rows: list[Row]) -> str:
    return "\n".join([heading(rows[0]), *(line(row.values()) for row in rows)])


def printed(rows: Iterable[Row]) -> list[Row]:
    """Prints a table row by row, as the rows are found, and returns its rows."""
    found: list[Row] = []
    for row in rows:
        if not found:
            print(heading(row))
        print(line(row.values()), flush=True)
        found.append(row)
    return found


def write(path: Path, rows: list[Row], **versions: str) -> None:
    """Writes rows as JSON, one a line, with the versions of the compilers, commit and date.

    versions: may contain the commit, if that is not the checkout's.
    """
    about = {**versions, "commit": versions.get("commit") or commit(), "date": str(date.today())}
    head = json.dumps(about, indent=1).removesuffix("\n}")
    path.write_text(head + ',\n "rows": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n")
