"""The grid under pytest-benchmark: ``pytest bench --benchmark-only [--quick] [--bench-threads 2] [-k ...]``.

Each case is a group with rnnkit's kernels and the peers side by side. Here the sides run one after the
other; for ratios to quote use ``python -m bench.grid``, where they take turns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from . import cases, ours, peers, timing
from .correct import TOLERANCE, is_right, max_error

SIDES = (*(f"rnnkit-{kernel}" for kernel in ours.kernel_modules("numpy")), *peers.PEERS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by operation, which the name of the test says, case and side."""
    operation = metafunc.function.__name__.removeprefix("test_")
    quick = metafunc.config.getoption("--quick")
    pairs = [
        pytest.param(case, side, id=f"{case.cell}-{case.T}-{case.B}-{case.I}-{case.H}-{side}")
        for case in cases.grid([operation], cases.CELLS, quick=quick)
        for side in SIDES
        if side.startswith("rnnkit-") or peers.takes_part(side, case)
    ]
    metafunc.parametrize(("case", "side"), pairs)


@lru_cache(maxsize=1)  # the sides of a case follow each other
def _prepared(case: cases.Case) -> tuple[cases.Problem, dict[str, Any]]:
    problem = cases.problem_of(case)
    return problem, ours.expected(problem)


def _measure(benchmark: Any, case: cases.Case, name: str, num_threads: int) -> None:
    problem, expected = _prepared(case)
    if name in peers.PEERS:
        if lacking := peers.missing(name):
            pytest.skip(f"{' and '.join(lacking)} not installed")
        side = peers.side_of(name, problem, num_threads)
    else:
        kernel = name.removeprefix("rnnkit-")
        if (reason := ours.why_not(kernel, case, "numpy")) is not None:
            pytest.skip(f"{kernel}: {reason}")
        side = ours.side_of(problem, kernel)
    benchmark.group = f"{case}, {num_threads} threads"
    with timing.threads(num_threads):
        error = max_error(side.compute(), expected)
        assert is_right(error), f"{name}: error {error:.1e}, allowed {TOLERANCE:.0e}"
        benchmark.extra_info.update(case._asdict(), side=name, threads=num_threads, max_error=error)
        with side.scope():
            benchmark(side.call)


def test_forward(benchmark: Any, case: cases.Case, side: str, num_threads: int) -> None:
    _measure(benchmark, case, side, num_threads)


def test_train(benchmark: Any, case: cases.Case, side: str, num_threads: int) -> None:
    _measure(benchmark, case, side, num_threads)


def test_step(benchmark: Any, case: cases.Case, side: str, num_threads: int) -> None:
    _measure(benchmark, case, side, num_threads)


def test_ragged(benchmark: Any, case: cases.Case, side: str, num_threads: int) -> None:
    _measure(benchmark, case, side, num_threads)


def test_lm(benchmark: Any, case: cases.Case, side: str, num_threads: int) -> None:
    _measure(benchmark, case, side, num_threads)
