"""What lies around the scans: large products, and the gradient of a table of rows."""

from __future__ import annotations

from ..._array import namespace_of
from ..._typing import Array
from . import _loader
from ._dtypes import name_of, wide_of
from ._step import vector_of

# Threads of a block that adds up the rows of one token; it looks through as many tokens at a time.
_THREADS = 128


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """Return a @ b for 2-D arrays, in `out` if given; half precision is summed and returned in float32.

    Two arrays of the same half precision are multiplied as they are; a mixed pair is widened first.
    """
    xp, wide = namespace_of(a), wide_of(a.dtype)
    if a.dtype != b.dtype:
        a, b = xp.astype(a, wide, copy=False), xp.astype(b, wide, copy=False)
    fits = out is not None and out.dtype == wide and out.flags.c_contiguous
    result = out if fits else xp.empty((a.shape[0], b.shape[1]), dtype=wide)
    _loader.product(_ordered(a), _ordered(b), result)(0)
    if out is None or fits:
        return result
    out[...] = xp.astype(result, out.dtype, copy=False)
    return out


def _ordered(matrix: Array) -> Array:
    """Return the matrix in C or Fortran order: itself but for a cut-out."""
    if matrix.flags.c_contiguous or matrix.flags.f_contiguous:
        return matrix
    return namespace_of(matrix).asarray(matrix, copy=True)


def embedding_backward(d_rows: Array, index: Array, num_rows: int) -> Array:
    """Return the gradient (num_rows, N) of the table whose rows `index` (M,) gave `d_rows` (M, N).

    One launch without atomics: the same bits every time, and no sort, which would wait for the device. It
    reads the whole index once for each row of the table.
    """
    xp = namespace_of(d_rows)
    M, N = d_rows.shape
    # Both come through a reshape, which keeps the strides of a user's own array.
    d_rows = xp.ascontiguousarray(d_rows)
    index = xp.ascontiguousarray(xp.astype(index, xp.int64, copy=False))
    d_table = xp.empty((num_rows, N), dtype=d_rows.dtype)
    vector = vector_of(N, (d_rows, d_table))
    launch = _loader.kernel("embedding", "embedding_backward", name_of(d_rows.dtype), vector)
    grid = num_rows, -(-N // (vector * _THREADS))
    shared = 4 * (_THREADS + _THREADS // 32)
    launch(grid, (_THREADS,), (d_rows, index, d_table, M, N), shared)
    return d_table
