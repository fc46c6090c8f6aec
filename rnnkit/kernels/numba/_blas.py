"""Large matrix products on our own threads, with BLAS on one thread each.

BLAS keeps its threads awake for some 20 ms after each product, in case there is another. In those 20 ms the
scan runs, on threads that then share the cores with idling ones: on two cores it took 6.6 ms instead of 4.1
(T=100, B=32, H=128), and 129 instead of 92 with the products around it (T=50, B=64, H=512; Zen 3, OpenBLAS
0.3.31). So a product is cut into as many parts as there are threads, which then all go on to the scan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ._threads import run_tiles, thread_limit

# Multiplications below which a product stays on its thread, as for a scan.
_SMALL = 4_000_000


@cache
def libraries() -> list[Any]:
    """Return the loaded BLAS libraries whose thread counts can be set."""
    return [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]


class _Alone:
    """Holds BLAS at one thread while any call of ours is under way, and gives back what it had."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before: list[int] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._depth == 0:
                self._before = [lib.get_num_threads() for lib in libraries()]
                self._set([1] * len(self._before))
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._set(self._before)

    def _set(self, counts: list[int]) -> None:
        for lib, count, before in zip(libraries(), counts, self._before, strict=True):
            if before != 1:
                lib.set_num_threads(count)


_alone = _Alone()


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """Return a @ b for 2-D arrays of one floating-point dtype, in `out` if given."""
    (M, K), N = a.shape, b.shape[1]
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
