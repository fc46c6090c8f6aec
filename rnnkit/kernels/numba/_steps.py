"""A few time steps, input projection included: no packed weights, no tiles, one call of compiled code.

With few steps and sequences a weight is used so seldom that packing costs more than it saves. Each row of the
weights is multiplied as it lies in memory, and the lanes of its sum are added up at the end.
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
def lstm_short(
    x: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, output: Any, h: Any, c: Any, T: int
) -> None:
    """Compute output (T, B, H), advance h and c (B, H) in place; the biases have 4H elements, or none."""
    U, I, H = lanes(x), weight_ih.shape[1], weight_hh.shape[1]
    B, z, bias = h.size // H, np.empty(4 * H, x.dtype), np.zeros(4 * H, x.dtype)
    if bias_ih.size > 0:
        for k in range(4 * H):
            bias[k] = bias_ih[k] + bias_hh[k]
    for row in range(T * B):
        state = (row % B) * H
        for k in range(4 * H):
            z[k] = bias[k]
        add_product(x, row * I, I, weight_ih, H, z)
        add_product(h, state, H, weight_hh, H, z)
        for j in range(0, H, U):
            n, at = min(U, H - j), state + j
            i, f = sigmoid(load_part(z, j, n)), sigmoid(load_part(z, H + j, n))
            g, o = tanh(load_part(z, 2 * H + j, n)), sigmoid(load_part(z, 3 * H + j, n))
            c_t = f * load_part(c, at, n) + i * g
            h_t = o * tanh(c_t)
            store_part(c, at, c_t, n)
            store_part(h, at, h_t, n)
            store_part(output, row * H + j, h_t, n)
