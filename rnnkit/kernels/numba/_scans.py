"""The compiled scans: one tile of the batch, from its first time step to its last.

The maths is that of `rnnkit.kernels.reference`, in its order. Every function takes the tile's sequences
as `order` (indices into the batch, longest first) and `steps` (how many each has); all arrays are flat. A
tile reads and writes only rows of its own sequences, so tiles may run at the same time.

`team`, `shared` and `leader` are for several threads on one tile (see `_team`), each of which computes the
blocks `low` to `high` of the hidden units. Members may be more at the next step, so all states are in
`shared`. What all of them read, h or d_z, is there twice: a step reads one half and writes the other, so that
one meeting a step is enough. For the same reason a step back begins with the product that the step before it
has left. Nothing is allocated after `enter`: a member that failed would leave the others waiting.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._pieces import (
    LARGEST_GROUP,
    blocks_to_rows,
    clear_padding,
    compiled,
    final_states,
    group_size,
    prefetch_rows,
    product,
    put_states,
    row_stride,
    rows_to_blocks,
    sigmoid,
    still_active,
)
from ._simd import lanes, load, load_part, relu, store, store_part, tanh, where_positive
from ._team import enter, next_phase


@compiled
def lstm_forward(
    order: Any, steps: Any, gates: Any, h_0: Any, c_0: Any, panels: Any, output: Any, h_n: Any, c_n: Any,
    c_prev: Any, T: int, B: int, H: int, reverse: bool, save: bool, team: Any, shared: Any,
    leader: bool,
) -> None:  # fmt: skip
    """Compute output, h_n, c_n; with `save` also c_prev, and gates after their nonlinearity, in place."""
    U, b = lanes(gates), order.size
    blocks, stride = (H + U - 1) // U, row_stride(H, U)
    room = shared if shared.size else np.empty(2 * b * stride + blocks * b * U, gates.dtype)
    h, c = room[: 2 * b * stride], room[2 * b * stride :]
    if leader:
        clear_padding(output, order, steps, T, B, H)
        put_states(h_0, order, H, stride, h)
        rows_to_blocks(c_0, order, H, c)
    rows = min(b, LARGEST_GROUP)
    z = np.empty(4 * rows * U, gates.dtype)
    me, active = enter(team, leader), 0
    phase, members = next_phase(team, me, 0, steps[0])
    while phase <= steps[0]:
        step = phase - 1
        low, high = blocks * me // members, blocks * (me + 1) // members
        t = steps[0] - 1 - step if reverse else step
        active = still_active(active, steps, t)
        now, new = (step % 2) * b * stride, (1 - step % 2) * b * stride
        for j in range(low, high):
            n = min(U, H - j * U)
            last = j * U + n - 1
            start = 0
            while start < active:
                count = group_size(active - start)
                prefetch_rows(gates, t * B * 4 * H + last, order, start, count, 4 * H, 4, H)
                prefetch_rows(output, t * B * H + last, order, start, count, H, 1, 0)
                if save:
                    prefetch_rows(c_prev, t * B * H + last, order, start, count, H, 1, 0)
                product(
                    h, now + start * stride, stride, count, panels, j * 4 * H * U, H, 4,
                    z, 0, rows * U, True,
                )  # fmt: skip
                for r in range(start, start + count):
                    q = r - start
                    row = t * B + order[r]
                    at, to = row * 4 * H + j * U, row * H + j * U
                    i = sigmoid(load_part(gates, at, n) + load(z, q * U))
                    f = sigmoid(load_part(gates, at + H, n) + load(z, (rows + q) * U))
                    g = tanh(load_part(gates, at + 2 * H, n) + load(z, (2 * rows + q) * U))
                    o = sigmoid(load_part(gates, at + 3 * H, n) + load(z, (3 * rows + q) * U))
                    c_old = load(c, (j * b + r) * U)
                    c_new = f * c_old + i * g
                    h_new = o * tanh(c_new)
                    store(c, (j * b + r) * U, c_new)
                    store(h, new + r * stride + j * U, h_new)
                    store_part(output, to, h_new, n)
                    if save:
                        store_part(gates, at, i, n)
                        store_part(gates, at + H, f, n)
                        store_part(gates, at + 2 * H, g, n)
                        store_part(gates, at + 3 * H, o, n)
                        store_part(c_prev, to, c_old, n)
                start += count
        phase, members = next_phase(team, me, phase, steps[0])
    if me > 0:
        return
    final_states(h, order, steps, reverse, H, stride, h_n)
    blocks_to_rows(c, order, H, c_n)


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
def gru_forward(
    order: Any, steps: Any, gates: Any, h_0: Any, bias_hn: Any, panels: Any, output: Any, h_n: Any,
    recurrent_n: Any, T: int, B: int, H: int, reverse: bool, save: bool, team: Any, shared: Any,
    leader: bool,
) -> None:  # fmt: skip
    """Compute output, h_n; with `save` also recurrent_n, and gates after their nonlinearity, in place."""
    U, b = lanes(gates), order.size
    blocks, stride = (H + U - 1) // U, row_stride(H, U)
    h = shared if shared.size else np.empty(2 * b * stride, gates.dtype)
    if leader:
        clear_padding(output, order, steps, T, B, H)
        put_states(h_0, order, H, stride, h)
    rows = min(b, LARGEST_GROUP)
    z = np.empty(3 * rows * U, gates.dtype)
    me, active = enter(team, leader), 0
    phase, members = next_phase(team, me, 0, steps[0])
    while phase <= steps[0]:
        step = phase - 1
        low, high = blocks * me // members, blocks * (me + 1) // members
        t = steps[0] - 1 - step if reverse else step
        active = still_active(active, steps, t)
        now, new = (step % 2) * b * stride, (1 - step % 2) * b * stride
        for j in range(low, high):
            n = min(U, H - j * U)
            last = j * U + n - 1
            bias = load_part(bias_hn, j * U, n)
            start = 0
            while start < active:
                count = group_size(active - start)
                prefetch_rows(gates, t * B * 3 * H + last, order, start, count, 3 * H, 3, H)
                prefetch_rows(output, t * B * H + last, order, start, count, H, 1, 0)
                if save:
                    prefetch_rows(recurrent_n, t * B * H + last, order, start, count, H, 1, 0)
                product(
                    h, now + start * stride, stride, count, panels, j * 3 * H * U, H, 3,
                    z, 0, rows * U, True,
                )  # fmt: skip
                for r in range(start, start + count):
                    q = r - start
                    row = t * B + order[r]
                    at, to = row * 3 * H + j * U, row * H + j * U
                    reset = sigmoid(load_part(gates, at, n) + load(z, q * U))
                    update = sigmoid(load_part(gates, at + H, n) + load(z, (rows + q) * U))
                    w_n = load(z, (2 * rows + q) * U) + bias
                    candidate = tanh(load_part(gates, at + 2 * H, n) + reset * w_n)
                    h_new = (1.0 - update) * candidate + update * load(h, now + r * stride + j * U)
                    store(h, new + r * stride + j * U, h_new)
                    store_part(output, to, h_new, n)
                    if save:
                        store_part(gates, at, reset, n)
                        store_part(gates, at + H, update, n)
                        store_part(gates, at + 2 * H, candidate, n)
                        store_part(recurrent_n, to, w_n, n)
                start += count
        phase, members = next_phase(team, me, phase, steps[0])
    if me > 0:
        return
    final_states(h, order, steps, reverse, H, stride, h_n)


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
def rnn_forward(
    order: Any, steps: Any, gates: Any, h_0: Any, panels: Any, output: Any, h_n: Any, T: int, B: int,
    H: int, rectified: bool, reverse: bool, team: Any, shared: Any, leader: bool,
) -> None:  # fmt: skip
    """Compute output and h_n."""
    U, b = lanes(gates), order.size
    blocks, stride = (H + U - 1) // U, row_stride(H, U)
    h = shared if shared.size else np.empty(2 * b * stride, gates.dtype)
    if leader:
        clear_padding(output, order, steps, T, B, H)
        put_states(h_0, order, H, stride, h)
    rows = min(b, LARGEST_GROUP)
    z = np.empty(4 * rows * U, gates.dtype)
    me, active = enter(team, leader), 0
    phase, members = next_phase(team, me, 0, steps[0])
    while phase <= steps[0]:
        step = phase - 1
        low, high = blocks * me // members, blocks * (me + 1) // members
        t = steps[0] - 1 - step if reverse else step
        active = still_active(active, steps, t)
        now, new = (step % 2) * b * stride, (1 - step % 2) * b * stride
        for first in range(low, high, 4):  # four blocks at a time, like the four gates of an LSTM
            group = min(4, high - first)
            last = min((first + group) * U, H) - 1
            start = 0
            while start < active:
                count = group_size(active - start)
                prefetch_rows(gates, t * B * H + last, order, start, count, H, 1, 0)
                prefetch_rows(output, t * B * H + last, order, start, count, H, 1, 0)
                product(
                    h, now + start * stride, stride, count, panels, first * H * U, H, group,
                    z, 0, rows * U, True,
                )  # fmt: skip
                for r in range(start, start + count):
                    q = r - start
                    row = (t * B + order[r]) * H
                    for j in range(first, first + group):
                        n = min(U, H - j * U)
                        a = load_part(gates, row + j * U, n) + load(z, ((j - first) * rows + q) * U)
                        h_new = relu(a) if rectified else tanh(a)
                        store(h, new + r * stride + j * U, h_new)
                        store_part(output, row + j * U, h_new, n)
                start += count
        phase, members = next_phase(team, me, phase, steps[0])
    if me > 0:
        return
    final_states(h, order, steps, reverse, H, stride, h_n)


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
