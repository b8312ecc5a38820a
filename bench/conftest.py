"""Options, records and the final tables of a benchmark run."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "tools"))

import machine
import report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("relssl")
    group.addoption("--full", action="store_true", help="also the large grid; always on a GPU")
    group.addoption("--record", type=Path, metavar="FOLDER", help="write results as JSON and plots there")
    group.addoption("--seconds", type=float, help="skip what has not begun by then")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = report.Results(config.getoption("--record"))
    config.option.full |= machine.DEVICE == "cuda"


_RESULTS = pytest.StashKey[report.Results]()
_BEGAN = time.monotonic()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # Those of other packages are no errors here.
        if item.get_closest_marker("large") and not config.option.full:
            item.add_marker(pytest.mark.skip(reason="in the large grid: --full"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - _BEGAN > limit:
        pytest.skip(f"not begun within {limit:.0f} s")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return request.config.option.full


@pytest.fixture
def results(request: pytest.FixtureRequest) -> report.Results:
    return request.config.stash[_RESULTS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if results.entries:
        terminalreporter.section("relssl and its peers")
        report.show(results.document(), width=terminalreporter._tw.fullwidth)
    if results.path and results.entries:
        written = [results.path]
        try:
            import plots

            written += plots.draw(results.path)
        except ImportError as missing:
            terminalreporter.write_line(f"no plots: {missing}")
        terminalreporter.write_line("written: " + ", ".join(map(str, written)))
