"""The input's share of the gates inside a scan: for some steps at once, while it is in the caches.

A scan's `source` is a tuple (rows, index, weight_ih, width, chunk). Step t of sequence b reads row
index[t * B + b], or where `index` is empty row t * B + b. Rows of `width` numbers are multiplied with
weight_ih, which is in panels; where that is empty a row is itself the share (G * H) of the gates.

Steps are done in chunks of so many. The live rows of a chunk stand close together, in the order of the scan's
steps: those of a step begin at starts[step] - starts[first], where `first` is the chunk's first step. z holds
for each panel, block by block and gate by gate, `z_stride` apart, one vector a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._pieces import compiled, product, row_stride
from ._simd import lanes, load_part, store, store_part


@compiled
def row_starts(steps: Any, reverse: bool) -> Any:
    """Return (steps[0] + 1,): how many live rows the steps of a scan before each have."""
    starts = np.zeros(steps[0] + 1 if steps.size else 1, np.int64)
    T = starts.size - 1
    active = 0 if reverse else steps.size
    for step in range(T):
        t = T - 1 - step if reverse else step
        while active > 0 and steps[active - 1] <= t:
            active -= 1
        while active < steps.size and steps[active] > t:
            active += 1
        starts[step + 1] = starts[step] + active
    return starts


@compiled
def chunk_of(phase: int, chunk: int) -> Any:
    """Return the first step of a phase's chunk and the phase's own step, which is below it for the input."""
    number, within = (phase - 1) // (chunk + 1), (phase - 1) % (chunk + 1)
    return number * chunk, number * chunk + within - 1


@compiled
def z_stride_of(chunk: int, b: int, U: int) -> int:
    """Return how far apart panels of z lie: an odd number of vectors, so that they share no cache sets."""
    return (chunk * b // 2 * 2 + 1) * U


@compiled
def room_of(b: int, G: int, H: int, width: int, chunk: int, U: int) -> Any:
    """Return how many numbers a scan works on: h twice, one more state, z, and the gathered rows."""
    blocks = (H + U - 1) // U
    states = 2 * b * row_stride(H, U) + blocks * b * U
    return states + G * blocks * z_stride_of(chunk, b, U) + chunk * b * row_stride(width, U)


@compiled
def gather_rows(
    source: Any, order: Any, starts: Any, first: int, reverse: bool, B: int, chunk_rows: Any
) -> None:
    """Copy what a chunk multiplies into `chunk_rows`: close together, and never a power of two apart."""
    rows, index, weight_ih, width, chunk = source
    if weight_ih.size == 0:
        return
    U, T = lanes(rows), starts.size - 1
    stride = row_stride(width, U)
    for step in range(first, min(first + chunk, T)):
        t, to = T - 1 - step if reverse else step, (starts[step] - starts[first]) * stride
        for r in range(starts[step + 1] - starts[step]):
            at = t * B + order[r]
            at = (index[at] if index.size else at) * width
            for k in range(0, width, U):
                store_part(chunk_rows, to + k, load_part(rows, at + k, width - k), width - k)
            to += stride


@compiled
def add_input(
    source: Any, order: Any, starts: Any, first: int, reverse: bool, B: int, G: int, H: int, low: int,
    high: int, chunk_rows: Any, z: Any, z_stride: int,
) -> None:  # fmt: skip
    """Put the input's share of a chunk's gates into z, for the blocks from `low` to `high`."""
    rows, index, weight_ih, width, chunk = source
    U, T = lanes(z), starts.size - 1
    last = min(first + chunk, T)
    if weight_ih.size > 0:
        product(
            chunk_rows, 0, row_stride(width, U), starts[last] - starts[first], weight_ih, low * G * width * U,
            width, (high - low) * G, z, low * G * z_stride, z_stride, True,
        )  # fmt: skip
        return
    for step in range(first, last):
        t, to = T - 1 - step if reverse else step, (starts[step] - starts[first]) * U
        for r in range(starts[step + 1] - starts[step]):
            at = t * B + order[r]
            at = (index[at] if index.size else at) * G * H
            for j in range(low, high):
                for gate in range(G):
                    values = load_part(rows, at + gate * H + j * U, H - j * U)
                    store(z, (j * G + gate) * z_stride + to, values)
            to += U
