"""The table that a benchmark run ends with."""

import sys
from pathlib import Path
from statistics import median

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


class Table:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, what: str, seconds: list[float], ratios: dict, rates: dict) -> None:
        """ratios: (median, low, high) of a peer's time to ours; rates: of our flop rate to another."""
        self.lines.append(f"{what}: {1e3 * median(seconds):.1f} ms")
        for told, values in (("x as fast as", ratios), ("of the rate of", rates)):
            for name, (mid, low, high) in values.items():
                self.lines.append(f"  {mid:7.2f} {told} {name:<14} ({low:.2f} to {high:.2f})")


_table = Table()


@pytest.fixture
def table() -> Table:
    return _table


def pytest_terminal_summary(terminalreporter) -> None:
    if not _table.lines:
        return
    terminalreporter.section("relssl's CPU kernel against its peers: median of ratios, quartiles in brackets")
    from relssl import _cpu

    terminalreporter.write_line(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_cpu.instruction_set()}"
    )
    for line in _table.lines:
        terminalreporter.write_line(line)
