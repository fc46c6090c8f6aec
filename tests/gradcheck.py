"""The gradient check: one central difference along a random direction against one inner product."""

from __future__ import annotations

import numpy as np

# A central difference with step h errs by O(h^2) + O(eps |f| / h): for float64 about 1e-10 at h = 1e-5 where
# f is about 1. 1e-6 leaves room for functions that bend.
TOLERANCE = 1e-6
STEP = 1e-5
# The second term, in units of eps |f| / h. It matters where f is large and the derivative along the direction
# happens to be small: a relu network with f = 168 and h = 1e-6 erred by 1.4e-8, which is one unit in the last
# place of f, at a derivative of 4e-4.
ROUNDING = 8


def check_directional(f, point, gradient, rng, label="", step=STEP):
    """Assert that `gradient` is the derivative of the scalar function `f` at `point`.

    Parameters
    ----------
    f : callable
        From a dict of arrays to a number.
    point, gradient : dict of str to numpy.ndarray
        Float64. Each entry is checked along a direction of its own, with all others fixed, so that errors
        in a small parameter cannot hide behind a large one.
    step : float
        Smaller where `f` has kinks, so that the two ends rarely lie on two sides of one.
    """
    for name, value in point.items():
        direction = rng.standard_normal(value.shape)
        direction /= max(np.linalg.norm(direction), 1e-300)
        plus = f({**point, name: value + step * direction})
        minus = f({**point, name: value - step * direction})
        numeric = (plus - minus) / (2 * step)
        exact = float(np.sum(gradient[name] * direction))
        scale = max(abs(numeric), abs(exact), 1e-3 * float(np.linalg.norm(gradient[name])), 1e-6)
        rounding = ROUNDING * np.finfo(np.float64).eps * max(abs(plus), abs(minus)) / step
        assert abs(numeric - exact) <= TOLERANCE * scale + rounding, (
            f"{label} d_{name}: numeric {numeric:.12g}, exact {exact:.12g}"
        )
