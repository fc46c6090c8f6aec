"""How time is taken: all sides alternately in one process, warm, every call on its own.

Absolute times drift between hours; what lasts is the ratio of two sides that ran alternately. The sides
take turns in blocks of calls, because single calls would find each other's data in the caches.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np

BLOCK_SECONDS = 0.02  # long against the clock's resolution and the first call's cold caches
LOAD_SECONDS = 0.2  # some dozens of the system clock's ticks
CEILING_SIZE = 1024  # of the square matrices: 2 GFLOP, far beyond where the rate still rises


class Side(NamedTuple):
    """One contestant of a case.

    Attributes
    ----------
    name : str
        "rnnkit numba", "torch" and the like.
    call : callable
        What is timed; takes nothing.
    results : callable
        Turns what `call` returned into arrays on the host, by name.
    scope : callable
        Returns the context in which calls have to happen.
    """

    name: str
    call: Callable[[], Any]
    results: Callable[[Any], dict[str, Any]]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    def compute(self) -> dict[str, Any]:
        """Return the results of one call, untimed."""
        with self.scope():
            return self.results(self.call())


class Times(NamedTuple):
    """What the calls of a side took, in seconds.

    Attributes
    ----------
    median : float
    spread : float
        The distance of the quartiles over the median.
    p99 : float or None
        The 99th percentile, where there were calls enough (1000) to tell.
    calls : int
    """

    median: float
    spread: float
    p99: float | None
    calls: int


class Effort(NamedTuple):
    """How long to go on: for `seconds` a case, but at least `rounds` turns of each side."""

    seconds: float = 4.0
    rounds: int = 5


QUICK = Effort(0.5, 3)


def alternate(sides: Sequence[Side], effort: Effort, *, settle: bool) -> dict[str, Times]:
    """Time the sides in turns.

    Parameters
    ----------
    sides : sequence of Side
        With different names. They must have run before: this function warms caches, not compilers.
    effort : Effort
        When to stop.
    settle : bool
        Whether to wait between turns for idle threads to fall asleep; needed from two threads on.

    Returns
    -------
    dict of str to Times

    Raises
    ------
    ValueError
        Two sides have the same name.
    """
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    if len(samples) < len(sides):
        raise ValueError(f"sides must have different names, got {[side.name for side in sides]}")
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, turns = time.perf_counter(), 0
        while turns < effort.rounds or time.perf_counter() - start < effort.seconds:
            for side in sides:
                if settle:
                    _settle()
                samples[side.name] += _block(side)
            turns += 1
    finally:
        if collecting:
            gc.enable()
            gc.collect()
    return {name: summarise(values) for name, values in samples.items()}


def _settle() -> None:
    """Wait until this process uses no processor time.

    Idle worker threads of OpenBLAS, OpenMP and ONNX Runtime spin on for up to a tenth of a second and
    would take the cores from the next side.
    """
    for _ in range(40):
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def _block(side: Side) -> list[float]:
    clock, call, times = time.perf_counter, side.call, []
    with side.scope():
        start = clock()
        call()  # for the caches; of a long call a cold start is a small part
        first = clock() - start
        if first > 5 * BLOCK_SECONDS:
            return [first]
        end = clock() + BLOCK_SECONDS
        while True:
            start = clock()
            call()
            stop = clock()
            times.append(stop - start)
            if stop > end:
                return times


def summarise(samples: Sequence[float]) -> Times:
    """Return median, spread and, of 1000 samples or more, the 99th percentile."""
    low, median, high = (float(q) for q in np.quantile(samples, (0.25, 0.5, 0.75)))
    p99 = float(np.quantile(samples, 0.99)) if len(samples) >= 1000 else None
    return Times(median, (high - low) / median, p99, len(samples))


def ceiling_side(dtype: str) -> Side:
    """Return a large square matrix product of NumPy's BLAS: the rate that nothing here can beat for long."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((CEILING_SIZE, CEILING_SIZE)).astype(dtype) for _ in range(2))
    out = np.empty_like(a)
    return Side("ceiling", lambda: np.matmul(a, b, out=out), lambda product: {"product": product})


def ceiling_rate(times: Times) -> float:
    """Return the rate in FLOP/s of `ceiling_side`'s times."""
    return 2.0 * CEILING_SIZE**3 / times.median


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        restore(before)


def restore(before: Mapping[str, str | None]) -> None:
    """Set environment variables to earlier values; None removes one."""
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let every side that can be told so at run time use `count` threads; afterwards all is as before.

    NumPy's and SciPy's BLAS, torch where it is loaded, and rnnkit's compiled kernels, which read
    RNNKIT_NUM_THREADS at each call. ONNX Runtime fixes its threads when a session is made.
    """
    from threadpoolctl import threadpool_limits

    if importlib.util.find_spec("scipy"):
        import scipy.linalg.blas  # noqa: F401 (numba's BLAS: limits reach only what is loaded)
    with ExitStack() as stack:
        stack.enter_context(environment(RNNKIT_NUM_THREADS=str(count)))
        torch = sys.modules.get("torch")
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
        # BLAS alone: OpenMP's threads are torch's, and torch keeps count of them itself.
        stack.enter_context(threadpool_limits(count, user_api="blas"))
        yield


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy_cores() -> float | None:
    """Return how many cores other processes keep busy now, or None where the system does not say.

    On a busy machine a side whose threads wait for each other at every step can be a hundred times
    slower than on an idle one, and another not: a ratio from such a run says little.
    """
    _settle()
    before = _processor_ticks()
    time.sleep(LOAD_SECONDS)
    after = _processor_ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1]) * (os.cpu_count() or 1)


def _processor_ticks() -> tuple[int, int] | None:
    """Return the ticks that all cores together were busy, and in all."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(value) for value in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle, and waiting for a disk
