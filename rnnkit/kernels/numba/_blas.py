"""Large matrix products on our own threads, with BLAS on one thread each.

BLAS keeps its threads awake for some 20 ms after each product, in case there is another. In those 20 ms the
scan runs, on threads that then share the cores with idling ones: on two cores it took 6.6 ms instead of 4.1
(T=100, B=32, H=128), and 129 instead of 92 with the products around it (T=50, B=64, H=512; Zen 3, OpenBLAS
0.3.31). So a product is cut into as many parts as there are threads, which then all go on to the scan.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ._threads import run_tiles, thread_limit

# Multiplications below which a product stays on its thread, as for a scan.
_SMALL = 4_000_000
# Multiplications up to which OpenBLAS takes one thread by itself: SMP_THRESHOLD_MIN times
# GEMM_MULTITHREAD_THRESHOLD in its interface/gemm.c.
_ONE_THREAD = 65536 * 4


@cache
def libraries() -> list[Any]:
    """Return the loaded BLAS libraries whose thread counts can be set."""
    return [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]


def _numpys() -> list[Any]:
    """Return NumPy's own BLAS where it has one that can be told by its folder, else all libraries."""
    own = [lib for lib in libraries() if "numpy" in os.path.basename(os.path.dirname(lib.filepath))]
    return own or libraries()


@cache
def _controls() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    """Return for each library that products use what gets and what sets its thread count.

    OpenBLAS's own functions where threadpoolctl shows them: its methods take 0.7 and 1.5 microseconds, and
    set nothing while a second thread of Python does so. The count is the whole process's.
    """
    controls: list[Any] = []
    for lib in _numpys():
        found = [lib.get_num_threads, lib.set_num_threads]
        symbol = getattr(lib, "_get_symbol", None)
        if symbol and lib.internal_api == "openblas" and lib.threading_layer == "pthreads":
            own = [symbol("openblas_get_num_threads"), symbol("openblas_set_num_threads")]
            found = found if None in own else own
        controls.append(tuple(found))
    return controls


class _Alone:
    """Holds BLAS at one thread while any call of ours is under way, and gives back what it had."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before: list[int] = []

    def __call__(self) -> _Alone:
        return self

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._before = [get() for get, _ in _controls()]
                self._set([1] * len(self._before))
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._set(self._before)

    def _set(self, counts: list[int]) -> None:
        for (_, put), count, before in zip(_controls(), counts, self._before, strict=True):
            if before != 1:
                put(count)


_alone = _Alone()


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """Return a @ b for 2-D arrays of one floating-point dtype, in `out` if given."""
    (M, K), N = a.shape, b.shape[1]
    if K == 1:  # BLAS takes 43 / 476 / 11111 us for (256, 64), (1024, 256), (4096, 1024), this 13 / 89 / 2530
        return np.multiply(a, b, out=np.empty((M, N), a.dtype) if out is None else out)
    if M * K * N <= _ONE_THREAD:
        return np.matmul(a, b, out)
    with _alone():
        threads = thread_limit()
        if threads == 1 or M * K * N < _SMALL:
            return np.matmul(a, b, out)
        if out is None:
            out = np.empty((M, N), a.dtype)
        parts = min(threads, max(M, N))

        def part(k: int) -> None:
            if M >= N:
                rows = slice(M * k // parts, M * (k + 1) // parts)
                np.matmul(a[rows], b, out=out[rows])
            else:
                columns = slice(N * k // parts, N * (k + 1) // parts)
                np.matmul(a, b[:, columns], out=out[:, columns])

        run_tiles(part, parts, threads)
        return out
