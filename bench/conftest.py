"""Options and fixtures of the benchmarks, and pytest-benchmark's hooks that put our rows into its JSON."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import nce_ext
from bench import report
from bench.timing import Row, Stopwatch

# The order of the table.
ORDER = (
    "test_step", "test_softmax_step", "test_shared", "test_forward_bandwidth", "test_full_softmax", "test_sampling",
    "test_memory", "test_kept_memory", "test_optim", "test_fused_step",
)  # fmt: skip
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes and few rounds: a smoke test, not a measurement")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.addinivalue_line("filterwarnings", "ignore:.*script_method:DeprecationWarning")  # torch.compile's own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> Iterator[bool]:
    quick = request.config.getoption("--quick")
    yield quick
    if quick:  # the goals are for the full sizes
        for row in request.config.stash[ROWS]:
            row.at_least = row.at_most = None


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The results so far; a benchmark appends its own."""
    return request.config.stash[ROWS]


@pytest.fixture
def stopwatch(benchmark, quick: bool) -> Stopwatch:
    return Stopwatch(benchmark, quick=quick)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fused_only() -> Iterator[None]:
    """Timing the pure-PyTorch backend under the name of the kernels would be worse than no number."""
    info = nce_ext.build_info()
    if "fused (cpu)" not in info["backends"]:
        pytest.fail(f"no compiled kernels: {info['missing']['fused (cpu)']}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="weight.grad will be dense")
        yield


def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    return report.machine_facts()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    report.compact(output_json, config.stash[ROWS])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        facts = report.machine_facts()
        quick = "quick run, not a measurement: " if config.getoption("--quick") else ""
        title = f"{facts['cpu']}, {facts['threads']} threads, {facts['simd']}, torch {facts['torch']}"
        terminalreporter.write_line("")
        for line in [quick + title, *report.table(config.stash[ROWS])]:
            terminalreporter.write_line(line)
