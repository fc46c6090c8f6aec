"""What a training step needs besides its layers: the loss and the optimiser."""

from __future__ import annotations

from typing import Any

from ..._array import namespace_of
from ..._typing import Array
from . import _loader, _persistent
from ._dtypes import name_of, wide_of
from ._step import vector_at, vector_of

_WARP = 32
# Threads of a block; to be measured.
_THREADS = 256
# And of one that goes through a whole row or vector by itself, which wants as many loads under way.
_THREADS_ALONE = 512


def softmax_cross_entropy(
    logits: Array, targets: Array, counts: Array | None, gradient: bool = True
) -> tuple[Array, Array | None]:
    """Return the mean loss () of the rows of logits (M, V) that count, and its gradient (M, V) if wanted.

    Two launches, the rows and their mean; with `counts` (M,) one before them. Sums have one order.
    """
    xp, (M, V) = namespace_of(logits), logits.shape
    # All come through a reshape, which keeps the strides of a user's own array.
    logits, targets = xp.ascontiguousarray(logits), xp.ascontiguousarray(targets)
    dtype, wide = name_of(logits.dtype), wide_of(logits.dtype)
    losses, loss = xp.empty((M,), dtype=wide), xp.empty((), dtype=wide)
    d_logits, n = xp.empty((M, V), dtype=logits.dtype) if gradient else None, None

    def launch(name: str, blocks: int, lanes: int, arguments: tuple[Any, ...], vector: int = 1) -> None:
        threads = min(_THREADS_ALONE, -(-lanes // _WARP) * _WARP)
        room = threads // _WARP * wide.itemsize
        kernel = _loader.kernel("cross_entropy", name, dtype, vector)
        kernel((blocks,), (threads,), _loader.or_null(arguments), room)

    if counts is not None:
        counts, n = xp.ascontiguousarray(counts), xp.empty((), dtype=wide)
        launch("cross_entropy_count", 1, M, (counts, n, M))
    vector = vector_of(V, (logits, d_logits))
    rows = logits, targets, counts, n, losses, d_logits, V
    launch("cross_entropy_rows", M, -(-V // vector), rows, vector)
    launch("cross_entropy_mean", 1, M, (losses, n, loss, M))
    return loss, d_logits


def adam(
    flat: Array, d_flat: Array, mean: Array, square: Array, *, betas: tuple[float, float], steps: int,
    lr: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Change flat, mean and square (N,) in place by a step of Adam: one launch, which reads each once."""
    N = flat.shape[0]
    if not N:
        return
    vector = vector_at(flat, d_flat, mean, square)
    launch = _loader.kernel("adam", "adam", name_of(flat.dtype), vector)
    arguments = flat, d_flat, mean, square, *_numbers(betas, steps, lr, eps, weight_decay), N
    launch((-(-N // (vector * _THREADS)),), (_THREADS,), arguments)


def _numbers(
    betas: tuple[float, float], steps: int, lr: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Return what all elements of a step of Adam have in common, as adam.cuh names it."""
    beta_1, beta_2 = betas
    step_size, root = lr / (1.0 - beta_1**steps), (1.0 - beta_2**steps) ** 0.5
    return tuple(map(float, (beta_1, beta_2, 1.0 - lr * weight_decay, step_size, root, eps)))


def clip(flat: Array, max_norm: float) -> Array:
    """Scale flat (N,) in place to a norm of at most `max_norm` and return the norm that it had, ().

    Two launches: sums of squares, and the scaling; the same bits every time.
    """
    N, dtype = flat.shape[0], name_of(flat.dtype)
    xp, wide = namespace_of(flat), wide_of(flat.dtype)
    vector = vector_at(flat)
    # Each thread of the second launch adds one of the sums.
    blocks = max(1, min(_THREADS_ALONE, -(-N // (vector * _THREADS_ALONE))))
    sums, norm = xp.empty((blocks,), dtype=wide), xp.empty((), dtype=wide)
    room = _THREADS_ALONE // _WARP * wide.itemsize
    for name, arguments in [
        ("clip_sums", (flat, sums, N)),
        ("clip_scale", (flat, sums, norm, float(max_norm), N)),
    ]:
        _loader.kernel("clip", name, dtype, vector)((blocks,), (_THREADS_ALONE,), arguments, room)
    return norm


def clipped_adam(
    flat: Array, d_flat: Array, mean: Array, square: Array, *, max_norm: float,
    betas: tuple[float, float], steps: int, lr: float, eps: float, weight_decay: float,
) -> Array:  # fmt: skip
    """Take a step of Adam with d_flat (N,) scaled to a norm of at most `max_norm`; return its norm, ().

    One launch that leaves d_flat as it is, where blocks may wait for each other; else `clip` and `adam`.
    """
    if not _persistent.blocks_may_wait():
        norm = clip(d_flat, max_norm)
        adam(
            flat, d_flat, mean, square,
            betas=betas, steps=steps, lr=lr, eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
        return norm
    error = _loader.error_flag()
    error.check()
    N, dtype = flat.shape[0], name_of(flat.dtype)
    xp, wide = namespace_of(flat), wide_of(flat.dtype)
    vector = vector_at(flat, d_flat, mean, square)
    # All of them must be there at the same time; and each thread adds one of the sums, as in `clip`.
    most = min(_loader.limits().multiprocessors, _THREADS_ALONE)
    blocks = max(1, min(most, -(-N // (vector * _THREADS_ALONE))))
    sums, norm = xp.empty((blocks,), dtype=wide), xp.empty((), dtype=wide)
    flags = xp.zeros(1 + blocks, dtype=xp.uint32)
    launch = _loader.kernel("clipped_adam", "clipped_adam", dtype, vector, cooperative=True)
    launch(
        (1, blocks),
        (_THREADS_ALONE,),
        (
            flat, d_flat, mean, square, sums, norm, flags, error.address, float(max_norm),
            *_numbers(betas, steps, lr, eps, weight_decay), N,
        ),
        _THREADS_ALONE // _WARP * wide.itemsize,
    )  # fmt: skip
    return norm
