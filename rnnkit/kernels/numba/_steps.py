"""A single time step, for streams: no packed weights, no tiles, one call of compiled code.

With one sequence a weight is used once, so packing would cost more than the product. Each row of the weights
is multiplied as it lies in memory, and the lanes of its sum added up at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._pieces import compiled, sigmoid
from ._simd import lanes, load, load_part, multiply_add, store_part, tanh, total


@compiled
def add_product(x: Any, at: int, size: int, weight: Any, rows: int, z: Any) -> None:
    """Add weight (4 * rows, size) times x[at : at + size] to z, four rows at a time."""
    U = lanes(x)
    whole, rest, gate = size - size % U, size % U, rows * size
    for row in range(rows):
        w = row * size
        a = b = c = d = load_part(x, at, 0)  # zeros
        for k in range(0, whole, U):
            part = load(x, at + k)
            a = multiply_add(load(weight, w + k), part, a)
            b = multiply_add(load(weight, w + gate + k), part, b)
            c = multiply_add(load(weight, w + 2 * gate + k), part, c)
            d = multiply_add(load(weight, w + 3 * gate + k), part, d)
        if rest > 0:
            part, w = load_part(x, at + whole, rest), w + whole
            a = multiply_add(load_part(weight, w, rest), part, a)
            b = multiply_add(load_part(weight, w + gate, rest), part, b)
            c = multiply_add(load_part(weight, w + 2 * gate, rest), part, c)
            d = multiply_add(load_part(weight, w + 3 * gate, rest), part, d)
        z[row] += total(a)
        z[rows + row] += total(b)
        z[2 * rows + row] += total(c)
        z[3 * rows + row] += total(d)


@compiled
def lstm_step(
    x: Any, h: Any, c: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, h_new: Any, c_new: Any
) -> None:
    """Compute h_new and c_new (B, H); the biases have 4H elements, or none."""
    U, I, H = lanes(x), weight_ih.shape[1], weight_hh.shape[1]
    z = np.zeros(4 * H, x.dtype)
    for b in range(h.size // H):
        for k in range(4 * H):
            z[k] = bias_ih[k] + bias_hh[k] if bias_ih.size else 0.0
        add_product(x, b * I, I, weight_ih, H, z)
        add_product(h, b * H, H, weight_hh, H, z)
        for j in range(0, H, U):
            n, at = min(U, H - j), b * H + j
            i, f = sigmoid(load_part(z, j, n)), sigmoid(load_part(z, H + j, n))
            g, o = tanh(load_part(z, 2 * H + j, n)), sigmoid(load_part(z, 3 * H + j, n))
            state = f * load_part(c, at, n) + i * g
            store_part(c_new, at, state, n)
            store_part(h_new, at, o * tanh(state), n)
