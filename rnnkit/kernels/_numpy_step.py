"""The pieces of one time step that the NumPy kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._typing import Array


def logistic_of_minus(z: Array, one: Array) -> None:
    """Overwrite z by 1 / (1 + exp(z)). `one` is an array: a Python number costs 0.4 us more a call."""
    np.exp(z, z)
    np.add(z, one, z)
    np.divide(one, z, z)


def dot_for(rows: int) -> Callable[[Array, Array, Array], Any]:
    """Return the function that multiplies a matrix of so few rows with the weights, into its third argument.

    OpenBLAS is slower for 2 or 3 rows at once than for one after the other: 21 and 9 us for 2 rows, H = 128
    (84 and 34 us for H = 256; one thread of a Zen 3).
    """
    return _dot_row_by_row if 1 < rows < 4 else np.dot


def _dot_row_by_row(a: Array, b: Array, out: Array) -> None:
    np.matmul(a[:, None], b, out[:, None])


def transposed(weight: Array, T: int, minus: bool = False) -> Array:
    """Return W^T, or where `minus` is wanted -W^T, except for T = 1, where the sign is better put on h.

    A transposed copy makes a product 2 to 30 % faster, 0.01 to 0.04 ns an element, and costs 1 to 3 ns an
    element (by 32 rows at a time; with a plain copy, 16 ns for H = 1024): it pays from some 100 steps on,
    and from 32 on where the weights lie in the first-level cache.
    """
    worthwhile = 32 if weight.size <= 1 << 14 else 128
    if worthwhile > T:
        return np.negative(weight).T if minus and T > 1 else weight.T
    result = np.empty(weight.shape[::-1], weight.dtype)
    for k in range(0, len(weight), 32):
        (np.negative if minus else np.positive)(weight[k : k + 32].T, result[:, k : k + 32])
    return result
