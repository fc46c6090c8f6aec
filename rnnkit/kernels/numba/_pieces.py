"""What the compiled scans share: packed weights, the recurrent product, ragged batches.

A *panel* is a matrix of K rows and as many columns as a vector has lanes; a *block* is that many hidden
units. Small matrices that only a scan sees (c, d_h, d_c and the sums z) are stored block by block, each
(rows, lanes), so that one vector is one hidden block of one sequence.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ._simd import ROWS, dot_block, lanes, load, load_part, prefetch, store, store_part, tanh, transpose


def _hash_of_sources() -> str:
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


_SOURCES = _hash_of_sources()


def compiled(function: Any) -> Any:
    """Compile a function for numba, and keep the code on disk until any file of this package changes.

    numba itself looks at the function's own file alone, and would go on using code into which an old version
    of another file was compiled. Where its cache cannot be told so, there is none.

    It runs without the interpreter's lock, so that tiles run side by side, and without checks: every index is
    a sum of loops.
    """
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    dispatcher = njit(cache=True, **options)(function)
    try:
        file = dispatcher._cache._cache_file
        file._source_stamp = (file._source_stamp, _SOURCES)
    except AttributeError:
        return njit(**options)(function)
    return dispatcher


# Rows of a panel that are done before the next panel: 512 x 64 bytes of weights fit an L1 cache, more do
# not. h (32, 512) times weight_hh, float32, one thread: 96 GFLOP/s; with 256 rows 87.
DEPTH = 512
# Sequences whose gates of a block are computed together: their rows often lie a power of two apart in memory,
# and then more of them have no place in the caches at the same time. The last group may be larger.
GROUP = 4 * ROWS
LARGEST_GROUP = GROUP + ROWS
# Rows of a matrix that are packed before the same rows of the next columns: each may be on a memory page of
# its own, and a processor keeps the addresses of about 64 at hand.
PAGES = 32


@compiled
def pack_forward(weight: Any, gates: int, H: int, K: int, panels: Any, low: int, high: int) -> None:
    """Pack the transpose of weight (gates * H, K): for each block the panels (K, lanes) of all its gates.

    Only the blocks from `low` to `high`, so that threads can share the work.
    """
    U = lanes(weight)
    square = np.empty(2 * U * U, weight.dtype)
    for block in range(low, high):
        first, at = block * U, block * gates * K * U
        n = min(U, H - first)
        for gate in range(gates):
            row = (gate * H + first) * K
            # Where the next rows begin: so many short ones no processor foresees. After a scan, whose arrays
            # have taken the caches, (512, 128) weights took 66 to 93 us without this, 41 to 64 with it.
            ahead = row + H * K if gate + 1 < gates else (first + U) * K
            for k in range(0, K, U):
                depth = min(U, K - k)
                for u in range(U):
                    prefetch(weight, min(ahead + u * K + k, weight.size - 1))
                if n == U and depth == U:
                    transpose(weight, row + k, K, panels, at + k * U)
                    continue
                for u in range(U):
                    here = depth if u < n else 0
                    store(square, u * U, load_part(weight, row + u * K + k, here))
                transpose(square, 0, U, square, U * U)
                for i in range(depth):
                    store(panels, at + (k + i) * U, load(square, (U + i) * U))
            at += K * U


@compiled
def pack_backward(weight: Any, K: int, H: int, panels: Any, low: int, high: int) -> None:
    """Pack weight (K, H) as it is: for each block, from `low` to `high`, a panel (K, lanes)."""
    U = lanes(weight)
    for k in range(0, K, PAGES):
        end = min(k + PAGES, K)
        for block in range(low, high):
            first, at = block * U, block * K * U
            n = min(U, H - first)
            for row in range(k, end):
                store(panels, at + row * U, load_part(weight, row * H + first, n))


@compiled
def product(
    a: Any, a_at: int, a_stride: int, rows: int, w: Any, w_at: int, K: int, panels: int, z: Any, z_at: int,
    z_stride: int, fresh: bool,
) -> None:  # fmt: skip
    """Multiply a (rows, K) with adjacent panels; z of panel p begins at z_at + p * z_stride.

    Unless `fresh`, what is in z is added.
    """
    U = lanes(w)
    w_stride = K * U
    if rows <= 2:
        # Few sums are in flight: what counts is the rate at which weights come in, from several panels.
        p = 0
        if rows == 1:
            while p + 4 <= panels:
                dot_block(
                    1, 4, a, a_at, a_stride, w, w_at + p * w_stride, w_stride, K,
                    z, z_at + p * z_stride, z_stride, fresh,
                )  # fmt: skip
                p += 4
        else:
            while p + 2 <= panels:
                dot_block(
                    2, 2, a, a_at, a_stride, w, w_at + p * w_stride, w_stride, K,
                    z, z_at + p * z_stride, z_stride, fresh,
                )  # fmt: skip
                p += 2
        while p < panels:
            dot_block(
                rows, 1, a, a_at, a_stride, w, w_at + p * w_stride, w_stride, K,
                z, z_at + p * z_stride, z_stride, fresh,
            )  # fmt: skip
            p += 1
        return
    groups = (rows + ROWS - 1) // ROWS
    for k in range(0, K, DEPTH):
        depth = min(DEPTH, K - k)
        for p in range(panels):
            row = 0
            for group in range(groups):  # of equal size, but for one row: a group of one would be slow
                n = (rows - row + groups - group - 1) // (groups - group)
                dot_block(
                    n, 1, a, a_at + row * a_stride + k, a_stride,
                    w, w_at + p * w_stride + k * U, w_stride, depth,
                    z, z_at + p * z_stride + row * U, z_stride, fresh and k == 0,
                )  # fmt: skip
                row += n


@compiled
def still_active(active: int, steps: Any, t: int) -> int:
    """Return how many sequences have a step t; they come first, as `steps` never increases."""
    while active > 0 and steps[active - 1] <= t:
        active -= 1
    while active < steps.size and steps[active] > t:
        active += 1
    return active


@compiled
def group_size(left: int) -> int:
    """Return how many of the sequences that are left make the next group, so that the last is not tiny."""
    return left if left <= LARGEST_GROUP else GROUP


@compiled
def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x)) of a vector."""
    return 0.5 * tanh(0.5 * x) + 0.5


@compiled
def clear_padding(array: Any, order: Any, steps: Any, T: int, B: int, N: int) -> None:
    """Set array (T, B, N) to zero behind each sequence's end."""
    for r in range(order.size):
        for t in range(steps[r], T):
            at = (t * B + order[r]) * N
            for k in range(N):
                array[at + k] = 0.0


@compiled
def rows_to_blocks(array: Any, order: Any, H: int, blocks: Any) -> None:
    """Copy rows of array (B, H) into blocks (., rows, lanes), with zeros behind H."""
    U, rows = lanes(array), order.size
    for r in range(rows):
        for j in range((H + U - 1) // U):
            n = min(U, H - j * U)
            store(blocks, (j * rows + r) * U, load_part(array, order[r] * H + j * U, n))


@compiled
def blocks_to_rows(blocks: Any, order: Any, H: int, array: Any) -> None:
    """Copy blocks (., rows, lanes) into rows of array (B, H)."""
    U, rows = lanes(array), order.size
    for r in range(rows):
        for j in range((H + U - 1) // U):
            n = min(U, H - j * U)
            store_part(array, order[r] * H + j * U, load(blocks, (j * rows + r) * U), n)


@compiled
def put_states(h_0: Any, order: Any, H: int, stride: int, h: Any) -> None:
    """Copy rows of h_0 (B, H) into both halves of h: they hold h before and after a step, in turns."""
    rows = order.size
    for r in range(rows):
        for k in range(H):
            h[r * stride + k] = h[(rows + r) * stride + k] = h_0[order[r] * H + k]


@compiled
def final_states(h: Any, order: Any, steps: Any, reverse: bool, H: int, stride: int, h_n: Any) -> None:
    """Copy the last states into h_n (B, H), from where each one's last step left it."""
    rows = order.size
    for r in range(rows):
        last = steps[0] if reverse else steps[r]
        at = ((last % 2) * rows + r) * stride
        for k in range(H):
            h_n[order[r] * H + k] = h[at + k]


@compiled
def row_stride(N: int, U: int) -> int:
    """Return a distance for rows of N: no power of two, which would put all rows into one set of a cache."""
    return (N + U - 1) // U * U + U


@compiled
def prefetch_rows(
    array: Any, at: int, order: Any, first: int, count: int, stride: int, parts: int, part: int
) -> None:
    """Bring near array[at + order[r] * stride + k * part] of `count` rows, k < parts, while a product runs.

    Rows lie far apart, so that the processor does not foresee them: without this the
    forward scan of an LSTM took 9.9 ms instead of 6.7 at T=100, B=32, H=128.
    """
    for r in range(first, first + count):
        here = at + order[r] * stride
        for k in range(parts):
            prefetch(array, here + k * part)
