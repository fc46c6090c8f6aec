"""The compiled scans: one tile of the batch, from its first time step to its last.

The maths is that of `rnnkit.kernels.reference`, in its order. Every function takes the tile's sequences
as `order` (indices into the batch, longest first) and `steps` (how many each has); all arrays are flat. A
tile reads and writes only rows of its own sequences, so tiles may run at the same time.

The input's share of the gates is computed for `chunk` steps at once, so that its product has rows enough,
into z, which stays in the caches: `_input` says what `source` is, and where a row of z lies. A step's
recurrent products go to w, and both are added up when the gates are computed: a long sum that began with the
input's share would be rounded more coarsely.

`team`, `shared` and `leader` are for several threads on one tile (see `_team`), each of which computes the
blocks `low` to `high` of the hidden units. Members may be more at the next step, so all states are in
`shared`. What all of them read, h, is there twice: a step reads one half and writes the other, so that one
meeting a step is enough. Nothing is allocated after `enter`: a member that failed would leave the others
waiting.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._input import add_input, chunk_of, gather_rows, room_of, row_starts, z_stride_of
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
)
from ._simd import lanes, load, load_part, relu, store, store_part, tanh
from ._team import enter, next_phase


@compiled
def lstm_forward(
    order: Any, steps: Any, source: Any, bias: Any, h_0: Any, c_0: Any, panels: Any, output: Any, h_n: Any,
    c_n: Any, gates: Any, c_prev: Any, T: int, B: int, H: int, reverse: bool, save: bool, team: Any,
    shared: Any, leader: bool,
) -> None:  # fmt: skip
    """Compute output, h_n, c_n; with `save` also c_prev, and gates after their nonlinearity."""
    U, b, (width, chunk) = lanes(output), order.size, source[3:]
    blocks, stride, z_stride = (H + U - 1) // U, row_stride(H, U), z_stride_of(chunk, b, U)
    room = shared if shared.size else np.empty(room_of(b, 4, H, width, chunk, U), output.dtype)
    h, c, rest = room[: 2 * b * stride], room[2 * b * stride :], 2 * b * stride + blocks * b * U
    z, rows = room[rest:], room[rest + 4 * blocks * z_stride :]
    starts, w_stride = row_starts(steps, reverse), min(b, LARGEST_GROUP) * U
    w = np.empty(4 * w_stride, output.dtype)
    if leader:
        clear_padding(output, order, steps, T, B, H)
        put_states(h_0, order, H, stride, h)
        rows_to_blocks(c_0, order, H, c)
        gather_rows(source, order, starts, 0, reverse, B, rows)
    me, last = enter(team, leader), steps[0] + (steps[0] + chunk - 1) // chunk
    phase, members = next_phase(team, me, 0, last)
    while phase <= last:
        low, high = blocks * me // members, blocks * (me + 1) // members
        first, step = chunk_of(phase, chunk)
        if step < first:
            add_input(source, order, starts, first, reverse, B, 4, H, low, high, rows, z, z_stride)
            phase, members = next_phase(team, me, phase, last)
            continue
        t = steps[0] - 1 - step if reverse else step
        base, active = starts[step] - starts[first], starts[step + 1] - starts[step]
        now, new = (step % 2) * b * stride, (1 - step % 2) * b * stride
        for j in range(low, high):
            n = min(U, H - j * U)
            at_end = j * U + n - 1
            b_i, b_f = load_part(bias, j * U, n), load_part(bias, H + j * U, n)
            b_g, b_o = load_part(bias, 2 * H + j * U, n), load_part(bias, 3 * H + j * U, n)
            start = 0
            while start < active:
                count = group_size(active - start)
                prefetch_rows(output, t * B * H + at_end, order, start, count, H, 1, 0)
                if save:
                    prefetch_rows(gates, t * B * 4 * H + at_end, order, start, count, 4 * H, 4, H)
                    prefetch_rows(c_prev, t * B * H + at_end, order, start, count, H, 1, 0)
                product(
                    h, now + start * stride, stride, count, panels, j * 4 * H * U, H, 4, w, 0, w_stride, True
                )
                for r in range(start, start + count):
                    p, q = (r - start) * U, 4 * j * z_stride + (base + r) * U
                    row = t * B + order[r]
                    at, to = row * 4 * H + j * U, row * H + j * U
                    i = sigmoid(load(z, q) + load(w, p) + b_i)
                    f = sigmoid(load(z, q + z_stride) + load(w, p + w_stride) + b_f)
                    g = tanh(load(z, q + 2 * z_stride) + load(w, p + 2 * w_stride) + b_g)
                    o = sigmoid(load(z, q + 3 * z_stride) + load(w, p + 3 * w_stride) + b_o)
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
        if leader and step + 1 == first + chunk:
            gather_rows(source, order, starts, step + 1, reverse, B, rows)
        phase, members = next_phase(team, me, phase, last)
    if me > 0:
        return
    final_states(h, order, steps, reverse, H, stride, h_n)
    blocks_to_rows(c, order, H, c_n)


@compiled
def gru_forward(
    order: Any, steps: Any, source: Any, bias: Any, h_0: Any, bias_hn: Any, panels: Any, output: Any,
    h_n: Any, gates: Any, recurrent_n: Any, T: int, B: int, H: int, reverse: bool, save: bool, team: Any,
    shared: Any, leader: bool,
) -> None:  # fmt: skip
    """Compute output, h_n; with `save` also recurrent_n, and gates after their nonlinearity."""
    U, b, (width, chunk) = lanes(output), order.size, source[3:]
    blocks, stride, z_stride = (H + U - 1) // U, row_stride(H, U), z_stride_of(chunk, b, U)
    room = shared if shared.size else np.empty(room_of(b, 3, H, width, chunk, U), output.dtype)
    h, z = room[: 2 * b * stride], room[2 * b * stride :]
    rows = z[3 * blocks * z_stride :]
    starts, w_stride = row_starts(steps, reverse), min(b, LARGEST_GROUP) * U
    w = np.empty(3 * w_stride, output.dtype)
    if leader:
        clear_padding(output, order, steps, T, B, H)
        put_states(h_0, order, H, stride, h)
        gather_rows(source, order, starts, 0, reverse, B, rows)
    me, last = enter(team, leader), steps[0] + (steps[0] + chunk - 1) // chunk
    phase, members = next_phase(team, me, 0, last)
    while phase <= last:
        low, high = blocks * me // members, blocks * (me + 1) // members
        first, step = chunk_of(phase, chunk)
        if step < first:
            add_input(source, order, starts, first, reverse, B, 3, H, low, high, rows, z, z_stride)
            phase, members = next_phase(team, me, phase, last)
            continue
        t = steps[0] - 1 - step if reverse else step
        base, active = starts[step] - starts[first], starts[step + 1] - starts[step]
        now, new = (step % 2) * b * stride, (1 - step % 2) * b * stride
        for j in range(low, high):
            n = min(U, H - j * U)
            at_end = j * U + n - 1
            b_r, b_u = load_part(bias, j * U, n), load_part(bias, H + j * U, n)
            b_in, b_hn = load_part(bias, 2 * H + j * U, n), load_part(bias_hn, j * U, n)
            start = 0
            while start < active:
                count = group_size(active - start)
                prefetch_rows(output, t * B * H + at_end, order, start, count, H, 1, 0)
                if save:
                    prefetch_rows(gates, t * B * 3 * H + at_end, order, start, count, 3 * H, 3, H)
                    prefetch_rows(recurrent_n, t * B * H + at_end, order, start, count, H, 1, 0)
                product(
                    h, now + start * stride, stride, count, panels, j * 3 * H * U, H, 3, w, 0, w_stride, True
                )
                for r in range(start, start + count):
                    p, q = (r - start) * U, 3 * j * z_stride + (base + r) * U
                    row = t * B + order[r]
                    at, to = row * 3 * H + j * U, row * H + j * U
                    reset = sigmoid(load(z, q) + load(w, p) + b_r)
                    update = sigmoid(load(z, q + z_stride) + load(w, p + w_stride) + b_u)
                    recurrent = load(w, p + 2 * w_stride) + b_hn
                    candidate = tanh(load(z, q + 2 * z_stride) + b_in + reset * recurrent)
                    h_new = (1.0 - update) * candidate + update * load(h, now + r * stride + j * U)
                    store(h, new + r * stride + j * U, h_new)
                    store_part(output, to, h_new, n)
                    if save:
                        store_part(gates, at, reset, n)
                        store_part(gates, at + H, update, n)
                        store_part(gates, at + 2 * H, candidate, n)
                        store_part(recurrent_n, to, recurrent, n)
                start += count
        if leader and step + 1 == first + chunk:
            gather_rows(source, order, starts, step + 1, reverse, B, rows)
        phase, members = next_phase(team, me, phase, last)
    if me > 0:
        return
    final_states(h, order, steps, reverse, H, stride, h_n)


@compiled
def rnn_forward(
    order: Any, steps: Any, source: Any, bias: Any, h_0: Any, panels: Any, output: Any, h_n: Any, T: int,
    B: int, H: int, rectified: bool, reverse: bool, team: Any, shared: Any, leader: bool,
) -> None:  # fmt: skip
    """Compute output and h_n."""
    U, b, (width, chunk) = lanes(output), order.size, source[3:]
    blocks, stride, z_stride = (H + U - 1) // U, row_stride(H, U), z_stride_of(chunk, b, U)
    room = shared if shared.size else np.empty(room_of(b, 1, H, width, chunk, U), output.dtype)
    h, z = room[: 2 * b * stride], room[2 * b * stride :]
    rows = z[blocks * z_stride :]
    starts, w_stride = row_starts(steps, reverse), min(b, LARGEST_GROUP) * U
    w = np.empty(4 * w_stride, output.dtype)
    if leader:
        clear_padding(output, order, steps, T, B, H)
        put_states(h_0, order, H, stride, h)
        gather_rows(source, order, starts, 0, reverse, B, rows)
    me, last = enter(team, leader), steps[0] + (steps[0] + chunk - 1) // chunk
    phase, members = next_phase(team, me, 0, last)
    while phase <= last:
        low, high = blocks * me // members, blocks * (me + 1) // members
        first, step = chunk_of(phase, chunk)
        if step < first:
            add_input(source, order, starts, first, reverse, B, 1, H, low, high, rows, z, z_stride)
            phase, members = next_phase(team, me, phase, last)
            continue
        t = steps[0] - 1 - step if reverse else step
        base, active = starts[step] - starts[first], starts[step + 1] - starts[step]
        now, new = (step % 2) * b * stride, (1 - step % 2) * b * stride
        for j in range(low, high, 4):  # four blocks at a time, like the four gates of an LSTM
            group = min(4, high - j)
            at_end = min((j + group) * U, H) - 1
            start = 0
            while start < active:
                count = group_size(active - start)
                prefetch_rows(output, t * B * H + at_end, order, start, count, H, 1, 0)
                product(
                    h, now + start * stride, stride, count, panels, j * H * U, H, group, w, 0, w_stride, True
                )
                for r in range(start, start + count):
                    row = (t * B + order[r]) * H
                    for k in range(j, j + group):
                        n, p = min(U, H - k * U), (k - j) * w_stride + (r - start) * U
                        a = load(z, k * z_stride + (base + r) * U) + load(w, p) + load_part(bias, k * U, n)
                        h_new = relu(a) if rectified else tanh(a)
                        store(h, new + r * stride + k * U, h_new)
                        store_part(output, row + k * U, h_new, n)
                start += count
        if leader and step + 1 == first + chunk:
            gather_rows(source, order, starts, step + 1, reverse, B, rows)
        phase, members = next_phase(team, me, phase, last)
    if me > 0:
        return
    final_states(h, order, steps, reverse, H, stride, h_n)
