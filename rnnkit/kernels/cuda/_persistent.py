"""Scans whose whole time loop is one launch: whether to take them, and the launch; persistent.cuh explains them.

Off unless the environment variable ``RNNKIT_PERSISTENT`` is 1: they have never run on a device.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from ..._array import namespace_of
from ..._typing import Array
from . import _loader
from ._plan import Limits, Plan, Scan, plan

_plan = lru_cache(maxsize=256)(plan)


def enabled() -> bool:
    """Whether the user wants scans in one launch."""
    return os.environ.get("RNNKIT_PERSISTENT", "0") == "1"


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
    return _plan(Scan(cell, backward, dtype, tf32, B, H), limits)


def launch(
    layout: Plan, name: str, dtype: str, shape: tuple[int, int, int], row: int, operands: tuple[Array | None, ...],
    args: tuple[Any, ...], lengths: Array | None, reverse: bool,
) -> None:  # fmt: skip
    """Launch the kernel `name` of the file persistent_`name`.cu.

    Parameters
    ----------
    layout : Plan
    name, dtype : str
    shape : (int, int, int)
        T, B, H.
    row : int
        How many numbers of a sequence are multiplied.
    operands : tuple of arrays
        In which their rows lie.
    args : tuple
        The arguments before those that all kernels have in common.
    """
    T, B, H = shape
    error = _loader.error_flag()
    error.check()
    aligned = all(
        row * array.itemsize % 16 == 0 and _loader.address(array) % 16 == 0
        for array in operands
        if array is not None
    )
    kernel = _loader.kernel(
        f"persistent_{name}", f"{name}_persistent", dtype, macros=(*layout.macros(), ("ALIGNED", int(aligned))),
        cooperative=layout.grid,
    )  # fmt: skip
    blocks, flags = layout.blocks(H) * layout.groups(B), None
    if layout.grid:
        xp = namespace_of(args[0])
        flags = xp.zeros(blocks + 1, dtype=xp.uint32)
    args = (*args, lengths, flags, error.address, T, B, H, int(reverse))
    # As (1, n): CuPy shrinks a cooperative grid (n, 1) that does not fit, but raises for this one.
    kernel((1, blocks), (layout.threads,), args, layout.shared)


def exchange(layout: Plan, d_h_n: Array, gates: int) -> Array | None:
    """Return (2, B, gates * H) for what the blocks of a group tell each other on the way back, if they do."""
    if not layout.grid:
        return None
    (B, H), xp = d_h_n.shape, namespace_of(d_h_n)
    dtype = d_h_n.dtype if layout.product == "half" else xp.float32
    told: Array = xp.empty((2, B, gates * H), dtype=dtype)
    return told
