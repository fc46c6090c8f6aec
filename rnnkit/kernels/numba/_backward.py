"""The compiled scans back: one tile of the batch, from its last time step to its first.

What is said in `_forward` holds here too. A step begins with the product that the step before it has left, so
that one meeting of a team's members a step is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._pieces import (
    blocks_to_rows,
    clear_padding,
    compiled,
    product,
    row_stride,
    rows_to_blocks,
    still_active,
)
from ._simd import lanes, load, load_part, store, store_part, tanh, where_positive
from ._team import enter, next_phase


@compiled
def lstm_backward(
    order: Any, steps: Any, gates: Any, c_prev: Any, d_output: Any, d_h_n: Any, d_c_n: Any, panels: Any,
    d_h_0: Any, d_c_0: Any, T: int, B: int, H: int, reverse: bool, team: Any, shared: Any,
    leader: bool,
) -> None:  # fmt: skip
    """Turn the saved gates into d_gates, in place; compute d_h_0 and d_c_0."""
    U, b = lanes(gates), order.size
    blocks, stride = (H + U - 1) // U, row_stride(4 * H, U)
    state, twice = blocks * b * U, 2 * b * stride
    room = shared if shared.size else np.empty(twice + 2 * state, gates.dtype)
    d_z, d_h, d_c = room[:twice], room[twice : twice + state], room[twice + state :]
    if leader:
        clear_padding(gates, order, steps, T, B, 4 * H)
        rows_to_blocks(d_h_n, order, H, d_h)
        rows_to_blocks(d_c_n, order, H, d_c)
    me, active, last = enter(team, leader), 0, steps[0] + 1
    phase, members = next_phase(team, me, 0, last)
    while phase <= last:
        step = phase - 1
        low, high = blocks * me // members, blocks * (me + 1) // members
        now, before = (step % 2) * b * stride, (1 - step % 2) * b * stride
        t = step if reverse else steps[0] - 1 - step
        if step > 0:
            active = still_active(active, steps, t - 1 if reverse else t + 1)
            product(
                d_z, before, stride, active, panels, low * 4 * H * U, 4 * H, high - low,
                d_h, low * b * U, b * U, True,
            )  # fmt: skip
        active = still_active(active, steps, t) if phase < last else 0
        for r in range(active):
            row = t * B + order[r]
            for j in range(low, high):
                n, here = min(U, H - j * U), (j * b + r) * U
                at, to, col = row * 4 * H + j * U, row * H + j * U, now + r * stride + j * U
                i, f = load_part(gates, at, n), load_part(gates, at + H, n)
                g, o = load_part(gates, at + 2 * H, n), load_part(gates, at + 3 * H, n)
                c_old = load_part(c_prev, to, n)
                tanh_c = tanh(f * c_old + i * g)
                d_h_t = load(d_h, here) + load_part(d_output, to, n)
                d_c_t = load(d_c, here) + d_h_t * o * (1.0 - tanh_c * tanh_c)
                store(d_c, here, d_c_t * f)
                d_i = d_c_t * g * i * (1.0 - i)
                d_f = d_c_t * c_old * f * (1.0 - f)
                d_g = d_c_t * i * (1.0 - g * g)
                d_o = d_h_t * tanh_c * o * (1.0 - o)
                store_part(gates, at, d_i, n)
                store_part(gates, at + H, d_f, n)
                store_part(gates, at + 2 * H, d_g, n)
                store_part(gates, at + 3 * H, d_o, n)
                store_part(d_z, col, d_i, n)
                store_part(d_z, col + H, d_f, n)
                store_part(d_z, col + 2 * H, d_g, n)
                store_part(d_z, col + 3 * H, d_o, n)
        phase, members = next_phase(team, me, phase, last)
    if me > 0:
        return
    blocks_to_rows(d_h, order, H, d_h_0)
    blocks_to_rows(d_c, order, H, d_c_0)


@compiled
def gru_backward(
    order: Any, steps: Any, gates: Any, recurrent_n: Any, h_0: Any, output: Any, d_output: Any, d_h_n: Any,
    panels: Any, d_h_0: Any, T: int, B: int, H: int, reverse: bool, team: Any, shared: Any,
    leader: bool,
) -> None:  # fmt: skip
    """Turn the saved gates and recurrent_n into d_gates and d_recurrent_n, in place; compute d_h_0."""
    U, b = lanes(gates), order.size
    blocks, stride = (H + U - 1) // U, row_stride(3 * H, U)
    room = shared if shared.size else np.empty(2 * b * stride + blocks * b * U, gates.dtype)
    d_w, d_h = room[: 2 * b * stride], room[2 * b * stride :]
    if leader:
        rows_to_blocks(d_h_n, order, H, d_h)
        clear_padding(gates, order, steps, T, B, 3 * H)
        clear_padding(recurrent_n, order, steps, T, B, H)
    me, active, last = enter(team, leader), 0, steps[0] + 1
    phase, members = next_phase(team, me, 0, last)
    while phase <= last:
        step = phase - 1
        low, high = blocks * me // members, blocks * (me + 1) // members
        now, before = (step % 2) * b * stride, (1 - step % 2) * b * stride
        t = step if reverse else steps[0] - 1 - step
        if step > 0:
            active = still_active(active, steps, t - 1 if reverse else t + 1)
            product(
                d_w, before, stride, active, panels, low * 3 * H * U, 3 * H, high - low,
                d_h, low * b * U, b * U, False,
            )  # fmt: skip
        active = still_active(active, steps, t) if phase < last else 0
        for r in range(active):
            row = t * B + order[r]
            t_prev = t + 1 if reverse else t - 1
            initial = t_prev < 0 or t_prev >= steps[r]
            for j in range(low, high):
                n, here = min(U, H - j * U), (j * b + r) * U
                at, to, col = row * 3 * H + j * U, row * H + j * U, now + r * stride + j * U
                reset, update = load_part(gates, at, n), load_part(gates, at + H, n)
                candidate, w_n = load_part(gates, at + 2 * H, n), load_part(recurrent_n, to, n)
                if initial:
                    h_old = load_part(h_0, order[r] * H + j * U, n)
                else:
                    h_old = load_part(output, (t_prev * B + order[r]) * H + j * U, n)
                d_h_t = load(d_h, here) + load_part(d_output, to, n)
                d_n = d_h_t * (1.0 - update) * (1.0 - candidate * candidate)
                d_r = d_n * w_n * reset * (1.0 - reset)
                d_u = d_h_t * (h_old - candidate) * update * (1.0 - update)
                d_w_n = d_n * reset
                store(d_h, here, d_h_t * update)  # the product below adds to it
                store_part(gates, at, d_r, n)
                store_part(gates, at + H, d_u, n)
                store_part(gates, at + 2 * H, d_n, n)
                store_part(recurrent_n, to, d_w_n, n)
                store_part(d_w, col, d_r, n)
                store_part(d_w, col + H, d_u, n)
                store_part(d_w, col + 2 * H, d_w_n, n)
        phase, members = next_phase(team, me, phase, last)
    if me > 0:
        return
    blocks_to_rows(d_h, order, H, d_h_0)


@compiled
def rnn_backward(
    order: Any, steps: Any, output: Any, d_output: Any, d_h_n: Any, panels: Any, d_gates: Any, d_h_0: Any,
    T: int, B: int, H: int, rectified: bool, reverse: bool, team: Any, shared: Any, leader: bool,
) -> None:  # fmt: skip
    """Compute d_gates and d_h_0."""
    U, b = lanes(d_gates), order.size
    blocks, stride = (H + U - 1) // U, row_stride(H, U)
    room = shared if shared.size else np.empty(2 * b * stride + blocks * b * U, d_gates.dtype)
    d_z, d_h = room[: 2 * b * stride], room[2 * b * stride :]
    if leader:
        rows_to_blocks(d_h_n, order, H, d_h)
        clear_padding(d_gates, order, steps, T, B, H)
    me, active, last = enter(team, leader), 0, steps[0] + 1
    phase, members = next_phase(team, me, 0, last)
    while phase <= last:
        step = phase - 1
        low, high = blocks * me // members, blocks * (me + 1) // members
        now, before = (step % 2) * b * stride, (1 - step % 2) * b * stride
        t = step if reverse else steps[0] - 1 - step
        if step > 0:
            active = still_active(active, steps, t - 1 if reverse else t + 1)
            product(
                d_z, before, stride, active, panels, low * H * U, H, high - low,
                d_h, low * b * U, b * U, True,
            )  # fmt: skip
        active = still_active(active, steps, t) if phase < last else 0
        for r in range(active):
            row = (t * B + order[r]) * H
            for j in range(low, high):
                n = min(U, H - j * U)
                h = load_part(output, row + j * U, n)
                d_a = load(d_h, (j * b + r) * U) + load_part(d_output, row + j * U, n)
                d_a = where_positive(h, d_a) if rectified else d_a * (1.0 - h * h)
                store_part(d_gates, row + j * U, d_a, n)
                store(d_z, now + r * stride + j * U, d_a)
        phase, members = next_phase(team, me, phase, last)
    if me > 0:
        return
    blocks_to_rows(d_h, order, H, d_h_0)
