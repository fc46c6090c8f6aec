"""The softmax cross-entropy of the NumPy kernels: block by block, and only the rows that count."""

from __future__ import annotations

import numpy as np

from .._typing import Array

# Numbers of logits that are worked on at a time: with their exponentials they stay in a second-level cache.
_BLOCK = 1 << 15


def softmax_cross_entropy(
    logits: Array, targets: Array, counts: Array | None, gradient: bool = True
) -> tuple[Array, Array | None]:
    """Return the mean loss () of the rows of logits (M, V) that count, and its gradient (M, V) if wanted.

    On the host targets that count were found to lie in [0, V); the others may be anything.
    """
    M, V = logits.shape
    chosen = None if counts is None else np.flatnonzero(counts)
    n, size = M if chosen is None else chosen.size, max(1, _BLOCK // V)
    losses, work = np.empty(n, logits.dtype), np.empty((min(n, size), V), logits.dtype)
    d_logits = None
    if gradient:
        d_logits = np.empty_like(logits) if chosen is None else np.zeros_like(logits)
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        rows = block if chosen is None else chosen[block]
        z, target = logits[rows], targets[rows]
        picked = np.arange(target.size), target
        exp_z = work[: target.size]
        np.subtract(z, z.max(axis=1, keepdims=True), exp_z)
        loss = losses[block]
        np.negative(exp_z[picked], loss)
        np.exp(exp_z, exp_z)
        total = exp_z.sum(axis=1)
        loss += np.log(total)
        if d_logits is not None:
            exp_z *= (1.0 / (total * n))[:, None]
            exp_z[picked] -= 1.0 / n
            d_logits[rows] = exp_z
    return losses.sum() / max(n, 1), d_logits
