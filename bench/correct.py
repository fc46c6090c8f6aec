"""Whether a side's results are right, before its time is worth anything.

The measure is rnnkit's reference kernel in float64. Every float32 side, the peers included, is held
against it, so two sides that agree with each other but are both wrong do not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Of outputs the largest absolute error, of gradients the norm of the error over the norm: what rnnkit
# promises in float32 against torch.
TOLERANCE = 1e-5


def max_error(results: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Return the largest error of any result; infinite where one is missing, misshapen or not finite.

    Parameters
    ----------
    results, expected : mapping of str to array
        A name that begins with ``d_`` is a gradient.
    """
    if results.keys() != expected.keys():
        return float("inf")
    return max((_error(name, results[name], expected[name]) for name in expected), default=0.0)


def _error(name: str, got: Any, wanted: Any) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    if got.shape != wanted.shape or not np.all(np.isfinite(got)):
        return float("inf")
    difference = got - wanted
    if name.startswith("d_"):
        return float(np.linalg.norm(difference) / max(np.linalg.norm(wanted), np.finfo(np.float64).tiny))
    return float(np.max(np.abs(difference), initial=0.0))


def is_right(error: float, tolerance: float = TOLERANCE) -> bool:
    """Whether an error is small enough for a time to count."""
    return error <= tolerance
