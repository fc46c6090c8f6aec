"""What the scans of the three cells share: grids, vectors, and the order of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..._array import namespace_of
from ..._typing import Array
from . import _loader

Step = Callable[[int], None]

_WARP = 32
# Few enough that a batch of a few dozen rows spreads over a hundred multiprocessors; to be measured.
_THREADS = 128
# 16 bytes of float32, the longest load of a thread; the halves then travel by 8, doubles by twice 16.
_VECTOR = 4


def elementwise(file: str, name: str, dtype: str, rows: int, columns: int, args: tuple[Any, ...]) -> Step:
    """Return a function of t that launches an elementwise kernel for each of (rows, columns) elements.

    The kernel gets `args`, `columns` and t. Arrays are in C order, rows a multiple of `columns` long.
    """
    if not rows:
        return lambda t: None
    vector = vector_of(columns, args)
    lanes = -(-columns // vector)
    threads = min(_THREADS, -(-lanes // _WARP) * _WARP)
    grid, args = (rows, -(-lanes // threads)), _loader.or_null((*args, columns))
    return _loader.each_step(file, name, dtype, vector, grid, threads, args)


def vector_of(columns: int, args: tuple[Any, ...]) -> int:
    """Return how many elements a thread can load at once: every row must begin on a multiple of it.

    Integers, such as lengths, are loaded one by one.
    """
    arrays = [array for array in args if hasattr(array, "strides") and array.dtype.kind != "i"]
    return 1 if columns % _VECTOR else vector_at(*arrays)


def vector_at(*arrays: Array) -> int:
    """Return how many elements a thread can load at once from where the arrays begin."""
    aligned = [_loader.address(array) % min(16, _VECTOR * array.itemsize) == 0 for array in arrays]
    return _VECTOR if all(aligned) else 1


def steps(sequence: Array, reverse: bool) -> range:
    """Return the time steps (T, ...) in the order of a scan."""
    T = sequence.shape[0]
    return range(T - 1, -1, -1) if reverse else range(T)


def copy_as(array: Array, dtype: Any) -> Array:
    """Return a copy of the dtype, which a scan may overwrite and return."""
    result: Array = namespace_of(array).astype(array, dtype, copy=True)
    return result


def run(order: range, *calls: Step) -> None:
    """Make all calls for each step."""
    for t in order:
        for call in calls:
            call(t)
