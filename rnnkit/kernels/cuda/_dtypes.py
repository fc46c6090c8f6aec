"""What a dtype of CuPy, which is one of NumPy, is called and summed in: found once, for that takes time."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..._array import accumulation_dtype


@cache
def name_of(dtype: Any) -> str:
    """Return the name of a dtype."""
    return str(dtype)


@cache
def wide_of(dtype: Any) -> Any:
    """Return the dtype that sums of a dtype are kept in."""
    return np.dtype(accumulation_dtype(name_of(dtype)))
