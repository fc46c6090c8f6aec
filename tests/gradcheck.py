"""The gradient check: one central difference along a random direction against one inner product."""

from __future__ import annotations

import numpy as np

# A central difference with step h errs by O(h^2) + O(eps / h): for float64 about 1e-10 at h = 1e-5. 1e-6
# leaves room for functions that bend.
TOLERANCE = 1e-6
STEP = 1e-5


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
        assert abs(numeric - exact) <= TOLERANCE * scale, (
            f"{label} d_{name}: numeric {numeric:.12g}, exact {exact:.12g}"
        )
