"""Kernels for NumPy arrays, in NumPy alone."""

from __future__ import annotations

import numpy as np

from .._typing import Array
from ._case import Case


def why_not(name: str, case: Case) -> str | None:
    """Say why this module cannot serve `case`, or None."""
    return None


def embedding_backward(d_rows: Array, index: Array, num_rows: int) -> Array:
    """Sort the rows by index, then add up each run: linear in the rows, whatever the table's size."""
    total = np.zeros((num_rows, d_rows.shape[1]), d_rows.dtype)
    if index.size:
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        total[ordered[starts]] = np.add.reduceat(d_rows[order], starts, axis=0)
    return total
