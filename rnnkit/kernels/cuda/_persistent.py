"""Scans whose whole time loop is one launch: whether to take them, and how; persistent.cuh explains them.

Off unless the environment variable ``RNNKIT_PERSISTENT`` is 1: they have never run on a device.
"""

from __future__ import annotations

import itertools
import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..._array import namespace_of
from ..._typing import Array
from . import _loader
from ._dtypes import name_of
from ._plan import LEAST_CAPABILITY, Limits, Plan, Scan, plan, step_times

_PIECE = 16  # bytes: the longest load of a thread


class Side(NamedTuple):
    """What a kernel gets for one direction.

    Attributes
    ----------
    weight_hh : array (G*H, H)
    reads : tuple of arrays
        What is multiplied with it, if it exists before the launch.
    args : tuple
        The kernel's own arrays, those that have a _2 beside them, but for weights and exchange.
    """

    weight_hh: Array
    reads: tuple[Array, ...]
    args: tuple[Any, ...]


def enabled() -> bool:
    """Whether the user wants launches whose blocks wait for each other."""
    return os.environ.get("RNNKIT_PERSISTENT", "0") == "1"


def blocks_may_wait() -> bool:
    """Whether the user wants blocks to wait for each other, and the current device lets them."""
    if not enabled():
        return False
    limits: Limits = _loader.limits()
    return limits.multiprocessors > 0 and limits.capability >= LEAST_CAPABILITY


def chosen(cell: str, backward: bool, dtype: str, T: int, B: int, H: int, directions: int = 1) -> Plan | None:
    """Return how to lay out a scan, or those of both directions of a layer, in one launch.

    None where one scan goes step by step; where two take no longer one after the other.
    """
    if not enabled() or T < 2:
        return None
    layout = layout_of(cell, backward, dtype, B, H, directions)
    return layout if isinstance(layout, Plan) and layout.directions == directions else None


def layout_of(cell: str, backward: bool, dtype: str, B: int, H: int, directions: int = 1) -> Plan | str:
    """Return the layout on the current device, or why there is none.

    For two directions it is one of both at once, or that of one where two of those take no longer.
    """
    tf32 = _loader.precision("float32") == "TF32"
    # Groups are multiples of 8 sequences, and each layout is a variant that is compiled at its first use.
    return _best(Scan(cell, backward, dtype, tf32, -(-B // 8) * 8, H, directions), _loader.limits())


@lru_cache(maxsize=256)
def _best(scan: Scan, limits: Limits) -> Plan | str:
    layout = plan(scan, limits)
    if scan.directions == 1:
        return layout
    alone = _best(scan._replace(directions=1), limits)
    if isinstance(layout, str) or isinstance(alone, str):
        return alone if isinstance(layout, str) else layout
    return layout if _seconds(layout, scan, limits) < 2 * _seconds(alone, scan, limits) else alone


def _seconds(layout: Plan, scan: Scan, limits: Limits) -> float:
    """Return the estimated seconds of a step of all directions of a layout."""
    return sum(step_times(layout, scan._replace(directions=layout.directions), limits).values())


def there(
    layout: Plan, cell: str, sides: list[Side], shape: tuple[int, int, int], lengths: Array | None,
    reverse: bool, numbers: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """Launch the forward scans of a cell: that of one direction, or those of both.

    Parameters
    ----------
    layout : Plan
    cell : str
    sides : list of Side
        As many as the layout has directions.
    shape : (T, B, H)
    lengths : array (B,) or None
    reverse : bool
        Of the first of two directions.
    numbers : tuple of int
        What the kernel gets behind the arrays and before what all kernels get.
    """
    weights = [_rows_of_pieces(side.weight_hh, side.weight_hh.dtype) for side in sides]
    dtype, reads = name_of(weights[0].dtype), [array for side in sides for array in side.reads]
    arrays = [(weight, *side.args) for weight, side in zip(weights, sides, strict=True)]
    _launch(layout, f"{cell}_forward", dtype, arrays, numbers, reads, shape, lengths, reverse)


def back(
    layout: Plan, cell: str, sides: list[Side], shape: tuple[int, int, int], lengths: Array | None,
    reverse: bool, numbers: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """Launch the backward scans of a cell; see `there`."""
    arrays, reads, (_, B, _) = [], [], shape
    stored = name_of(sides[0].weight_hh.dtype)
    dtype = np.dtype(stored if layout.product == "half" else np.float32)
    for side in sides:
        weights, exchange = _rows_of_pieces(side.weight_hh.T, dtype), None
        if layout.grid:  # what the blocks of a group tell each other
            exchange = namespace_of(weights).empty((2, B, side.weight_hh.shape[0]), dtype=dtype)
            reads.append(exchange)
        arrays.append((weights, exchange, *side.args))
    _launch(layout, f"{cell}_backward", stored, arrays, numbers, reads, shape, lengths, reverse)


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
    layout: Plan, name: str, dtype: str, arrays: list[tuple[Any, ...]], numbers: tuple[int, ...],
    reads: list[Array], shape: tuple[int, int, int], lengths: Array | None, reverse: bool,
) -> None:  # fmt: skip
    """Launch a kernel, of the file of the same name, as often as its groups need it."""
    error = _loader.error_flag()
    error.check()
    (T, B, H), aligned, weights = shape, all(map(_in_pieces, reads)), arrays[0][0]
    kernel = _loader.kernel(
        f"persistent_{name}", f"{name}_persistent", dtype, cooperative=layout.grid,
        macros=(*layout.macros(), ("ALIGNED", int(aligned))),
    )  # fmt: skip
    second = arrays[1] if layout.directions == 2 else [None] * len(arrays[0])
    own = (*itertools.chain(*zip(arrays[0], second, strict=True)), *numbers)
    groups = [min(layout.at_once, layout.groups(B) - k) for k in range(0, layout.groups(B), layout.at_once)]
    blocks = layout.blocks(H) * layout.directions
    flags: list[Array | None] = [None] * len(groups)
    if layout.grid:
        xp = namespace_of(weights)
        flags = list(xp.zeros((len(groups), groups[0] * blocks + 1), dtype=xp.uint32))
    for k, count in enumerate(groups):
        first = k * layout.at_once
        args = *own, lengths, flags[k], error.address, T, B, H, int(reverse), weights.shape[1], first
        # As (1, n): CuPy shrinks a cooperative grid (n, 1) that does not fit, but raises for this one.
        kernel((1, count * blocks), (layout.threads,), _loader.or_null(args), layout.shared)
