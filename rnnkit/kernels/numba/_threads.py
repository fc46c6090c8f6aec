"""Threads of our own: each takes whole tiles of the batch, in compiled code without the interpreter's lock.

Not numba's `prange`: its default threading layer aborts the process when two Python threads use it at the
same time, and its thread count is one more global to restore. The calling thread works too and takes what no
other has begun, so a call never waits for a thread that is busy elsewhere, and any number of calls may run at
once.

A thread that sleeps needs 30 microseconds to wake up, and 80 to 300 if its processor has gone to sleep as
well (Zen 3, virtual). So a thread that has nothing to do looks out for a while, in compiled code that offers
the processor to others, before it goes to sleep.

Where it wakes up is said, too: not on the caller's processor. Linux on a virtual machine does not always
choose another that is idle; the thread then waits for the caller's time slice to end, up to 3 ms, and by then
the caller has done the other tiles as well. On two processors, where the threads of NumPy's BLAS had run just
before, a scan of 3 ms took 5.4.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

import numpy as np

from ._atomic import add_and_wait, wait

# Offers of the processor before an idle thread goes to sleep: together 200 microseconds, longer than what
# lies between two scans or products of a step.
_OFFERS = 50


def thread_limit() -> int:
    """Return how many threads a call may use: RNNKIT_NUM_THREADS, else OMP_NUM_THREADS, else the cores."""
    for name in ("RNNKIT_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()
        if value.isdecimal() and int(value) > 0:
            return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _find_getcpu() -> Callable[[], int | None]:
    """Return what tells the calling thread's processor; it says None where none can be kept off it."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError, AttributeError):
            return ctypes.PyDLL(None).sched_getcpu
    return lambda: None


_processor = _find_getcpu()


class _Job:
    """The tiles of one call; whoever asks gets the next."""

    def __init__(self, work: Callable[[int], None], tiles: int):
        self._work: Callable[[int], None] | None = work
        self._tiles = tiles
        self._next = itertools.count()  # one `next` is atomic
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self.finished = np.zeros(1, np.int64)

    def run(self) -> int:
        """Work on tiles until none is left; return how many they were, which is to be added to `finished`."""
        mine = 0
        while (work := self._work) is not None and (tile := next(self._next)) < self._tiles:
            error: BaseException | None = None
            try:
                work(tile)
            except BaseException as caught:
                error = caught
            self._done.put(error)
            mine += 1
        return mine

    def close(self) -> None:
        """Let nobody begin with a tile any more; who has begun is not waited for."""
        self._work = None

    def wait(self, mine: int) -> None:
        """Wait until all tiles but `mine` are finished; raise the first error of any of them."""
        if mine < self._tiles:
            wait(self.finished, 0, self._tiles - mine, _OFFERS)
        errors = [self._done.get() for _ in range(self._tiles)]
        for error in errors:
            if error is not None:
                raise error


class _Pool:
    """Daemon threads that wait for jobs; there are as many as the largest call needed so far."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._offered = np.zeros(1, np.int64)  # changes with every offer; nothing depends on the number
        self._threads: list[threading.Thread] = []
        self._avoided: int | None = None  # the processor that they keep off
        self._lock = threading.Lock()

    def offer(self, job: _Job, times: int) -> None:
        """Let up to that many threads help with the job."""
        if len(self._threads) < times:
            with self._lock:
                while len(self._threads) < times:
                    thread = threading.Thread(target=self._serve, name="rnnkit", daemon=True)
                    thread.start()  # by its end there is a native_id
                    self._threads.append(thread)
                self._avoided = None  # the new ones keep off nothing yet
        self._make_way()
        for _ in range(times):
            self._jobs.put(job)
        self._offered[0] += 1

    def _make_way(self) -> None:
        """Keep the threads off the processor on which the caller runs, if there are others enough."""
        here = _processor()
        if here is None or here == self._avoided:
            return
        self._avoided = here
        processors = os.sched_getaffinity(0)
        if len(processors) > len(self._threads):
            processors = processors - {here}
        for thread in self._threads:
            assert thread.native_id is not None  # it has been started
            with suppress(OSError):  # a system that forbids it
                os.sched_setaffinity(thread.native_id, processors)

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            mine = job.run()
            seen = int(self._offered[0])
            # The caller learns of it in compiled code: else it would run into the interpreter's lock.
            add_and_wait(job.finished, mine, self._offered, seen + 1 if self._jobs.empty() else seen, _OFFERS)
            del job  # its arrays


_pool = _Pool()


def _forget_threads() -> None:
    """Begin anew in a forked child, which has none of its parent's threads."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@contextmanager
def helped(helpers: int, work: Callable[[], None], abandon: Callable[[], None]) -> Iterator[None]:
    """Let up to that many threads do `work` while the block runs.

    `abandon` is called after the block; it must make `work` return, and touch nothing any more. Nobody
    waits until it has, and its errors are nobody's: helpers that fail were not there.
    """
    job = _Job(lambda _: work(), helpers)
    _pool.offer(job, helpers)
    try:
        yield
    finally:
        abandon()
        job.close()


def run_tiles(work: Callable[[int], None], tiles: int, threads: int) -> None:
    """Call work(0), ..., work(tiles - 1) on up to that many threads, this one included."""
    helpers = min(threads, tiles) - 1
    if helpers < 1:
        for tile in range(tiles):
            work(tile)
        return
    job = _Job(work, tiles)
    _pool.offer(job, helpers)
    job.wait(job.run())
