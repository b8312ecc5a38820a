"""What a benchmark run is asked, what it keeps, and the table that it ends with."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import machine
import report


def pytest_addoption(parser) -> None:
    group = parser.getgroup("relssl")
    group.addoption("--full", action="store_true", help="the large grid; on a GPU it is what runs anyway")
    group.addoption("--record", type=Path, metavar="FOLDER", help="keep results as JSON there, and draw them")
    group.addoption("--seconds", type=float, help="leave out what has not begun by then")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    config.stash[_RESULTS] = report.Results(config.getoption("--record"))
    config.option.full |= machine.DEVICE == "cuda"
    if config.option.verbose < 1:
        config.option.benchmark_quiet = True  # Its table is ours, without ratios, errors and memory.


_RESULTS = pytest.StashKey[report.Results]()
_BEGAN = time.monotonic()


def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # They are other packages' own.
        if item.get_closest_marker("large") and not config.option.full:
            item.add_marker(pytest.mark.skip(reason="of the large grid: --full"))


def pytest_runtest_setup(item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - _BEGAN > limit:
        pytest.skip(f"not begun within {limit:.0f} s")


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.option.full


@pytest.fixture
def results(request) -> report.Results:
    return request.config.stash[_RESULTS]


def pytest_terminal_summary(terminalreporter, config) -> None:
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
