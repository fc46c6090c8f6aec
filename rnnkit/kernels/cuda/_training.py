"""What a training step needs besides its layers: the optimiser, in one launch."""

from __future__ import annotations

from ..._typing import Array
from . import _loader
from ._step import vector_at

# Threads of a block; to be measured.
_THREADS = 256


def adam(
    flat: Array, d_flat: Array, mean: Array, square: Array, *, betas: tuple[float, float], steps: int,
    lr: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Change flat, mean and square (N,) in place by a step of Adam: one launch, which reads each once."""
    N = flat.shape[0]
    if not N:
        return
    beta_1, beta_2 = betas
    step_size, root = lr / (1.0 - beta_1**steps), (1.0 - beta_2**steps) ** 0.5
    numbers = beta_1, beta_2, 1.0 - lr * weight_decay, step_size, root, eps
    vector = vector_at(flat, d_flat, mean, square)
    launch = _loader.kernel("adam", "adam", str(flat.dtype), vector)
    arguments = flat, d_flat, mean, square, *map(float, numbers), N
    launch((-(-N // (vector * _THREADS)),), (_THREADS,), arguments)
