"""A few time steps, input projection included: no packed weights, no tiles, one call of compiled code.

With few steps and sequences a weight is used so seldom that packing costs more than it saves. Each row of the
weights is multiplied as it lies in memory, and the lanes of its sum are added up at the end.

The three functions fill output (T, B, H) and advance the states (1, B, H) in place. Without biases these have
no elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._pieces import compiled, sigmoid
from ._simd import lanes, load, load_part, multiply_add, relu, store_part, tanh, total


@compiled
def multiply(weight: Any, x: Any, at: int, z: Any) -> None:
    """Put weight (N, K) times x[at : at + K] to z (N,).

    Four rows at a time, a quarter of all apart: each is then one stream of the memory. Where four do not
    divide N, the last quarters overlap.
    """
    U, (N, K) = lanes(x), weight.shape
    quarter, whole = (N + 3) // 4, K - K % U
    second, third, fourth = min(quarter, N - quarter), min(2 * quarter, N - quarter), N - quarter
    for row in range(quarter):
        p, q, r, s = row * K, (second + row) * K, (third + row) * K, (fourth + row) * K
        a = b = c = d = load_part(x, at, 0)  # zeros
        for k in range(0, whole, U):
            part = load(x, at + k)
            a = multiply_add(load(weight, p + k), part, a)
            b = multiply_add(load(weight, q + k), part, b)
            c = multiply_add(load(weight, r + k), part, c)
            d = multiply_add(load(weight, s + k), part, d)
        if whole < K:
            n = K - whole
            part = load_part(x, at + whole, n)
            a = multiply_add(load_part(weight, p + whole, n), part, a)
            b = multiply_add(load_part(weight, q + whole, n), part, b)
            c = multiply_add(load_part(weight, r + whole, n), part, c)
            d = multiply_add(load_part(weight, s + whole, n), part, d)
        z[row], z[second + row], z[third + row], z[fourth + row] = total(a), total(b), total(c), total(d)


@compiled
def shares(
    x: Any, at: int, h: Any, h_at: int, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any,
    a: Any, w: Any,
) -> None:  # fmt: skip
    """Put what the input adds to the gates (G*H,) to a and what the state adds to w, with their biases."""
    multiply(weight_ih, x, at, a)
    multiply(weight_hh, h, h_at, w)
    for k in range(bias_ih.size):
        a[k] += bias_ih[k]
        w[k] += bias_hh[k]


@compiled
def rnn_short(
    x: Any, h: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, rectified: bool, output: Any
) -> None:
    """Run an RNN."""
    U, I, H, B = lanes(x), weight_ih.shape[1], weight_hh.shape[1], h.shape[1]
    a, w = np.empty(H, x.dtype), np.empty(H, x.dtype)
    for row in range(x.shape[0] * B):
        state = (row % B) * H
        shares(x, row * I, h, state, weight_ih, weight_hh, bias_ih, bias_hh, a, w)
        for j in range(0, H, U):
            n = min(U, H - j)
            z = load_part(a, j, n) + load_part(w, j, n)
            h_t = relu(z) if rectified else tanh(z)
            store_part(h, state + j, h_t, n)
            store_part(output, row * H + j, h_t, n)


@compiled
def lstm_short(
    x: Any, h: Any, c: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, output: Any
) -> None:
    """Run an LSTM."""
    U, I, H, B = lanes(x), weight_ih.shape[1], weight_hh.shape[1], h.shape[1]
    a, w = np.empty(4 * H, x.dtype), np.empty(4 * H, x.dtype)
    for row in range(x.shape[0] * B):
        state = (row % B) * H
        shares(x, row * I, h, state, weight_ih, weight_hh, bias_ih, bias_hh, a, w)
        for k in range(4 * H):
            a[k] += w[k]
        for j in range(0, H, U):
            n, at = min(U, H - j), state + j
            i, f = sigmoid(load_part(a, j, n)), sigmoid(load_part(a, H + j, n))
            g, o = tanh(load_part(a, 2 * H + j, n)), sigmoid(load_part(a, 3 * H + j, n))
            c_t = f * load_part(c, at, n) + i * g
            h_t = o * tanh(c_t)
            store_part(c, at, c_t, n)
            store_part(h, at, h_t, n)
            store_part(output, row * H + j, h_t, n)


@compiled
def gru_short(
    x: Any, h: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, output: Any
) -> None:
    """Run a GRU."""
    U, I, H, B = lanes(x), weight_ih.shape[1], weight_hh.shape[1], h.shape[1]
    a, w = np.empty(3 * H, x.dtype), np.empty(3 * H, x.dtype)
    for row in range(x.shape[0] * B):
        state = (row % B) * H
        shares(x, row * I, h, state, weight_ih, weight_hh, bias_ih, bias_hh, a, w)
        for j in range(0, H, U):
            n, at = min(U, H - j), state + j
            reset = sigmoid(load_part(a, j, n) + load_part(w, j, n))
            update = sigmoid(load_part(a, H + j, n) + load_part(w, H + j, n))
            candidate = tanh(load_part(a, 2 * H + j, n) + reset * load_part(w, 2 * H + j, n))
            h_t = (1.0 - update) * candidate + update * load_part(h, at, n)
            store_part(h, at, h_t, n)
            store_part(output, row * H + j, h_t, n)
