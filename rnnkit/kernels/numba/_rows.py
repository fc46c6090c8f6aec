"""Rows of a table: the sum of those that each index stands for."""

from __future__ import annotations

from typing import Any

from ._pieces import compiled


@compiled
def add_rows(d_rows: Any, index: Any, total: Any, columns: int, first: int, last: int) -> None:
    """Add the columns first to last of each row of d_rows (M, columns) to row index[m] of `total`.

    Threads take columns, not rows: each sum is made by one of them, in the order of the rows.
    """
    for m in range(index.size):
        source, target = m * columns, index[m] * columns
        for k in range(first, last):
            total[target + k] += d_rows[source + k]
