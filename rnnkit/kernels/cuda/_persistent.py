"""Scans whose whole time loop is one launch: whether to take them, and how; persistent.cuh explains them.

Off unless the environment variable ``RNNKIT_PERSISTENT`` is 1: they have never run on a device.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np

from ..._array import namespace_of
from ..._typing import Array
from . import _loader
from ._plan import LEAST_CAPABILITY, Limits, Plan, Scan, plan

_PIECE = 16  # bytes: the longest load of a thread

_plan = lru_cache(maxsize=256)(plan)


def enabled() -> bool:
    """Whether the user wants launches whose blocks wait for each other."""
    return os.environ.get("RNNKIT_PERSISTENT", "0") == "1"


def blocks_may_wait() -> bool:
    """Whether the user wants blocks to wait for each other, and the current device lets them."""
    if not enabled():
        return False
    limits: Limits = _loader.limits()
    return limits.multiprocessors > 0 and limits.capability >= LEAST_CAPABILITY


def chosen(cell: str, backward: bool, dtype: str, T: int, B: int, H: int) -> Plan | None:
    """Return how to lay out a scan in one launch, or None where it goes step by step."""
    if not enabled() or T < 2:
        return None
    layout = layout_of(cell, backward, dtype, B, H)
    return layout if isinstance(layout, Plan) else None


def layout_of(cell: str, backward: bool, dtype: str, B: int, H: int) -> Plan | str:
    """Return the layout on the current device, or why there is none."""
    limits: Limits = _loader.limits()
    tf32 = _loader.precision("float32") == "TF32"
    # Groups are multiples of 8 sequences, and each layout is a variant that is compiled at its first use.
    return _plan(Scan(cell, backward, dtype, tf32, -(-B // 8) * 8, H), limits)


def there(
    layout: Plan, cell: str, weight_hh: Array, h_0: Array, output: Array, args: tuple[Any, ...],
    lengths: Array | None, reverse: bool,
) -> None:  # fmt: skip
    """Launch the forward scan of a cell.

    Parameters
    ----------
    layout : Plan
    cell : str
    weight_hh : array (G*H, H)
    h_0 : array (B, H)
    output : array (T, B, H)
    args : tuple
        The kernel's arguments between the weights and those that all kernels have.
    lengths : array (B,) or None
    reverse : bool
    """
    weights, dtype, reads = _rows_of_pieces(weight_hh, h_0.dtype), str(h_0.dtype), (h_0, output)
    args = weights, *args
    _launch(layout, f"{cell}_forward", dtype, args, weights, reads, output.shape, lengths, reverse)


def back(
    layout: Plan, cell: str, weight_hh: Array, d_output: Array, args: tuple[Any, ...],
    lengths: Array | None, reverse: bool,
) -> None:  # fmt: skip
    """Launch the backward scan of a cell; see `there`."""
    xp, (_, B, _) = namespace_of(d_output), d_output.shape
    dtype = np.dtype(d_output.dtype if layout.product == "half" else np.float32)
    weights = _rows_of_pieces(weight_hh.T, dtype)
    # What the blocks of a group tell each other.
    exchange = xp.empty((2, B, weight_hh.shape[0]), dtype=dtype) if layout.grid else None
    args, reads = (weights, exchange, *args), () if exchange is None else (exchange,)
    _launch(
        layout,
        f"{cell}_backward",
        str(d_output.dtype),
        args,
        weights,
        reads,
        d_output.shape,
        lengths,
        reverse,
    )


def _rows_of_pieces(matrix: Array, dtype: Any) -> Array:
    """Return a matrix with rows of a multiple of 16 bytes, itself where it has them; the rest is zeros."""
    (rows, columns), piece = matrix.shape, _PIECE // dtype.itemsize
    pitch = -(-columns // piece) * piece
    if _in_pieces(matrix) and matrix.flags.c_contiguous and matrix.dtype == dtype:
        return matrix
    xp = namespace_of(matrix)
    result: Array = xp.zeros((rows, pitch), dtype=dtype)
    result[:, :columns] = xp.astype(matrix, dtype, copy=False)
    return result


def _in_pieces(array: Array) -> bool:
    """Whether each row can be loaded by 16 bytes."""
    return array.shape[-1] * array.itemsize % _PIECE == 0 and _loader.address(array) % _PIECE == 0


def _launch(
    layout: Plan, name: str, dtype: str, args: tuple[Any, ...], weights: Array,
    reads: tuple[Array, ...], shape: tuple[int, int, int], lengths: Array | None, reverse: bool,
) -> None:  # fmt: skip
    """Launch a kernel, of the file of the same name; what it multiplies lies in `reads`."""
    error = _loader.error_flag()
    error.check()
    (T, B, H), aligned = shape, all(map(_in_pieces, reads))
    kernel = _loader.kernel(
        f"persistent_{name}", f"{name}_persistent", dtype, cooperative=layout.grid,
        macros=(*layout.macros(), ("ALIGNED", int(aligned))),
    )  # fmt: skip
    blocks, flags = layout.blocks(H) * layout.groups(B), None
    if layout.grid:
        xp = namespace_of(weights)
        flags = xp.zeros(blocks + 1, dtype=xp.uint32)
    args = (*args, lengths, flags, error.address, T, B, H, int(reverse), weights.shape[1])
    # As (1, n): CuPy shrinks a cooperative grid (n, 1) that does not fit, but raises for this one.
    kernel((1, blocks), (layout.threads,), args, layout.shared)
