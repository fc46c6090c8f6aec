"""What `pytest bench` takes: shapes and threads."""

from __future__ import annotations

import pytest

from . import peers, timing


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rnnkit")
    group.addoption("--quick", action="store_true", help="rnnkit: the quick grid")
    group.addoption("--bench-threads", type=int, default=1, help="rnnkit: threads of all sides (default: 1)")


def pytest_configure(config: pytest.Config) -> None:
    count: int = config.getoption("--bench-threads")
    if not 1 <= count <= timing.cores():
        raise pytest.UsageError(f"--bench-threads must be from 1 to {timing.cores()}, got {count}")


@pytest.fixture(scope="session")
def num_threads(request: pytest.FixtureRequest) -> int:
    """Return the number of threads of all sides."""
    count: int = request.config.getoption("--bench-threads")
    return count


@pytest.fixture(scope="session", autouse=True)
def loaded_peers() -> tuple[str, ...]:
    """Load the peers that are installed, so that `timing.threads` reaches them."""
    present = tuple(peer for peer in peers.PEERS if not peers.missing(peer))
    peers.load(present)
    return present
