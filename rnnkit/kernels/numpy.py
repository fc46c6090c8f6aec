"""Kernels for NumPy arrays, in NumPy alone.

A time step is one matrix product and some ten calls of elementwise functions, every one of which writes
into a buffer that was allocated before the loop. What shapes the code:

- The logistic function is 1 / (1 + exp(-z)), tanh is `np.tanh`. With AVX2 (Zen 3, NumPy 2.4, float32) an
  element of exp takes 1.6 ns, of tanh 2.8 ns; in float64 5 and 14 ns. The matrix product is made with -W, so
  that subtracting `gates` from it gives -z for one pass: no other negation is needed, and the candidate of
  an LSTM, of which tanh makes -g, is kept with that sign.
- The activated gates stay where the gates came in, and the backward scan writes their gradients over them.
  A scan and its way back need (G+2)*T*B*H numbers in all: gates, output, and c (or, in a GRU, W_n h + b_n).
- Whatever in the backward scan does not depend on the gradient that comes from behind is computed for a
  block of time steps at once, as large as a cache: with few sequences that saves most of the calls.
- Sequences of different lengths are sorted once (`_schedule`), and a step works on those that have it.

Nothing at module level changes: any number of threads may call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

import numpy as np

from .._typing import Array
from ._case import Case
from ._numpy_loss import softmax_cross_entropy
from ._numpy_lstm import lstm_backward, lstm_forward
from ._numpy_step import dot_for, logistic_of_minus, transposed
from ._schedule import Schedule, after, backwards, cut, cut_scratch, enter, output, scratch, sorted_copy

__all__ = [
    "adam", "embedding_backward", "gru_backward", "gru_forward", "lstm_backward", "lstm_forward", "matmul",
    "rnn_backward", "rnn_forward", "softmax_cross_entropy", "why_not",
]  # fmt: skip


def why_not(name: str, case: Case) -> str | None:
    """Say why this module cannot serve `case`, or None."""
    if name != "embedding_backward" and case.dtype not in ("float32", "float64"):
        return f"NumPy computes {case.dtype} one number at a time"
    return None


# ---------------------------------------------------------------------------------------------- RNN


class RNNSaved(NamedTuple):
    """What `rnn_backward` needs: h (T, B, H), the state after each step, rows as in `schedule`."""

    h: Array
    schedule: Schedule
    nonlinearity: str


def rnn_forward(
    gates: Array, h_0: Array, weight_hh: Array, *, nonlinearity: str = "tanh",
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, RNNSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs."""
    T, B, H = gates.shape
    schedule = Schedule.of(T, B, lengths, reverse)
    gates = schedule.sort_steps(gates)
    weight, zero = transposed(weight_hh, T), np.zeros((), gates.dtype)
    h, initial = np.empty((T + 1, B, H), gates.dtype), schedule.sort(h_0)
    work = np.empty((B, H), gates.dtype)
    for run in schedule.runs():
        z, dot = work[: run.live], dot_for(run.live)
        enter(h, initial, run)
        for a_t, h_t, y_t in zip(gates[run.steps, : run.live], *cut(run, h), strict=True):
            dot(h_t, weight, z)
            np.add(z, a_t, z)
            if nonlinearity == "tanh":
                np.tanh(z, y_t)
            else:
                np.maximum(z, zero, out=y_t)
    states = after(h, reverse)
    saved = RNNSaved(states, schedule, nonlinearity) if save else None
    return output(states, schedule), schedule.final(h, h_0), saved


def rnn_backward(saved: RNNSaved, weight_hh: Array, d_output: Array, d_h_n: Array) -> tuple[Array, Array]:
    """Return d_gates (T, B, H) and d_h_0 (B, H)."""
    schedule, dtype = saved.schedule, d_output.dtype
    d_y, d_gates = sorted_copy(d_output, schedule), np.empty_like(saved.h)
    d_h, one = schedule.sort(d_h_n).copy(), np.array(1.0, dtype)
    for run in reversed(schedule.runs(saved.h.shape[2])):
        n, d_h_t, dot = run.live, d_h[: run.live], dot_for(run.live)
        h, slope = saved.h[run.steps, :n], d_gates[run.steps, :n]
        if saved.nonlinearity == "tanh":
            np.multiply(h, h, slope)
            np.subtract(one, slope, slope)
        else:
            np.greater(h, 0, slope)
        for d_y_t, d_z in zip(d_y[run.steps, :n][::-1], slope[::-1], strict=True):
            np.add(d_h_t, d_y_t, d_h_t)
            np.multiply(d_z, d_h_t, d_z)
            dot(d_z, weight_hh, d_h_t)
    return schedule.unsort_steps(d_gates), schedule.unsort(d_h)


# ---------------------------------------------------------------------------------------------- GRU


class GRUSaved(NamedTuple):
    """What `gru_backward` needs, rows as in `schedule`.

    gates (T, B, 3H) after their nonlinearity; recurrent_n (T, B, H), W_n h + b_hn; h (T + 1, B, H), the
    initial state and that after each step.
    """

    gates: Array
    recurrent_n: Array
    h: Array
    schedule: Schedule


def gru_forward(
    gates: Array, h_0: Array, weight_hh: Array, *, bias_hn: Array | None = None,
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, GRUSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs."""
    T, B, H3 = gates.shape
    H, dtype = H3 // 3, gates.dtype
    schedule = Schedule.of(T, B, lengths, reverse)
    gates = schedule.sort_steps(gates)
    weight = transposed(weight_hh, T, minus=True)
    b_hn = np.zeros(H, dtype) if bias_hn is None else bias_hn
    h, initial = np.empty((T + 1, B, H), dtype), schedule.sort(h_0)
    recurrent_n = np.empty((T, B, H), dtype) if save else None
    q, m = np.empty((B, H3), dtype), np.empty((B, H), dtype)
    with np.errstate(over="ignore", under="ignore"):  # as in lstm_forward
        for run in schedule.runs():
            n = run.live
            enter(h, initial, run)
            w_n = None if recurrent_n is None else recurrent_n[run.steps, :n]
            _gru_steps(gates[run.steps, :n], *cut(run, h), w_n, weight, b_hn, q[:n], m[:n], T == 1)
    saved = None if recurrent_n is None else GRUSaved(gates, recurrent_n, h, schedule)
    return output(after(h, reverse), schedule), schedule.final(h, h_0), saved


def _gru_steps(
    gates: Array, h_before: Array, h_after: Array, recurrent_n: Array | None,
    weight: Array, b_hn: Array, q: Array, m: Array, single: bool,
) -> None:  # fmt: skip
    """Fill h_after (S, n, H); given `recurrent_n` (S, n, H), fill it and activate `gates` (S, n, 3H)."""
    n, H = m.shape
    dot, one = dot_for(n), np.array(1.0, m.dtype)
    rz, q_n = slice(2 * H), q[:, 2 * H :]
    cuts = rz, slice(H), slice(H, 2 * H), slice(2 * H, 3 * H)
    if recurrent_n is None:
        # As in an LSTM: nothing but the state leaves the cache.
        w_n: Iterable[Array] = repeat(q_n)
        r_z = np.empty((n, 2 * H), m.dtype)
        activated = [repeat(part) for part in (r_z, r_z[:, :H], r_z[:, H:], q_n)]
    else:
        w_n, activated = recurrent_n, [gates[:, :, cut] for cut in cuts]
    h_factor = np.negative(h_before) if single else h_before
    steps = zip(gates, h_factor, h_before, h_after, w_n, *activated, strict=False)
    for a_t, x_t, h_t, y_t, w_t, s_t, r_t, z_t, n_t in steps:
        dot(x_t, weight, q)
        np.subtract(b_hn, q_n, w_t)
        np.subtract(q[:, rz], a_t[:, rz], s_t)
        logistic_of_minus(s_t, one)
        np.multiply(r_t, w_t, m)
        np.add(m, a_t[:, 2 * H :], m)
        np.tanh(m, n_t)
        np.subtract(h_t, n_t, m)
        np.multiply(m, z_t, m)
        np.add(m, n_t, y_t)  # n + z (h - n)


def gru_backward(
    saved: GRUSaved, weight_hh: Array, d_output: Array, d_h_n: Array
) -> tuple[Array, Array, Array]:
    """Return d_gates (T, B, 3H), d_h_0 (B, H) and d_recurrent_n (T, B, H)."""
    schedule, gates, recurrent_n = saved.schedule, saved.gates, saved.recurrent_n
    T, B, H = d_output.shape
    d_y = sorted_copy(d_output, schedule)
    d_h, product = schedule.sort(d_h_n).copy(), np.empty_like(d_h_n)
    w_rz, w_n = weight_hh[: 2 * H], weight_hh[2 * H :]
    runs = schedule.runs(3 * H)
    work = scratch(3, runs, d_h)
    for run in reversed(runs):
        n = run.live
        a, d_q = gates.reshape(T, B, 3, H)[run.steps, :n], recurrent_n[run.steps, :n]
        update, *others = cut_scratch(work, run)
        _gru_slopes(a, d_q, cut(run, saved.h)[0], update, *others)
        d_h_t, p, dot = d_h[:n], product[:n], dot_for(n)
        steps = d_y[run.steps, :n], gates[run.steps, :n, : 2 * H], a, d_q, update
        for d_y_t, d_rz, a_t, d_q_t, z_t in backwards(*steps):
            np.add(d_h_t, d_y_t, d_h_t)
            np.multiply(a_t, d_h_t[:, None], a_t)
            np.multiply(d_q_t, d_h_t, d_q_t)
            np.multiply(d_h_t, z_t, d_h_t)
            dot(d_rz, w_rz, p)
            np.add(d_h_t, p, d_h_t)
            dot(d_q_t, w_n, p)
            np.add(d_h_t, p, d_h_t)
    return schedule.unsort_steps(gates), schedule.unsort(d_h), schedule.unsort_steps(recurrent_n)


def _gru_slopes(a: Array, recurrent_n: Array, h_before: Array, update: Array, keep: Array, w: Array) -> None:
    """Turn the activated gates a (S, n, 3, H) and `recurrent_n` into the factors of d_h in their gradients.

    Fills `update` with z; `keep` and `w` are for work.
    """
    r, z, n = (a[:, :, k] for k in range(3))
    one = np.array(1.0, a.dtype)
    np.copyto(update, z)
    np.subtract(one, z, keep)
    np.subtract(h_before, n, w)
    np.multiply(z, keep, z)
    np.multiply(z, w, z)  # (h - n) z (1 - z)
    np.multiply(n, n, w)
    np.subtract(one, w, w)
    np.multiply(w, keep, n)  # (1 - z) (1 - n^2)
    np.multiply(n, r, keep)
    np.subtract(one, r, r)
    np.multiply(r, recurrent_n, r)
    np.multiply(r, keep, r)  # (1 - z) (1 - n^2) w_n r (1 - r)
    np.copyto(recurrent_n, keep)  # (1 - z) (1 - n^2) r


# ------------------------------------------------------------------------------- around the scans


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """Return a @ b for 2-D arrays, in `out` if given."""
    return np.matmul(a, b, out)


def embedding_backward(d_rows: Array, index: Array, num_rows: int) -> Array:
    """Sort the rows by index, then add up each run: linear in the rows, whatever the table's size.

    `np.add.reduceat` would do without the loop, in 30 instead of 2.3 ms for 3200 rows of 1024 and 65 indices.
    """
    total = np.zeros((num_rows, d_rows.shape[1]), d_rows.dtype)
    if index.size:
        order = np.argsort(index, kind="stable")
        ordered, rows = index[order], d_rows[order]
        starts = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(ordered)]
        for start, end in itertools.pairwise(starts):
            np.add.reduce(rows[start:end], axis=0, out=total[ordered[start]])
    return total


# ----------------------------------------------------------------------------------------- optimiser

# Numbers that are worked on at a time, so that they stay in the second-level cache.
_ADAM_BLOCK = 1 << 14


def adam(
    flat: Array, d_flat: Array, mean: Array, square: Array, *, betas: tuple[float, float], steps: int,
    lr: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Change flat, mean and square (N,) by a step of Adam, block by block."""
    beta_1, beta_2 = betas
    step_size, root = lr / (1.0 - beta_1**steps), (1.0 - beta_2**steps) ** 0.5
    room = np.empty((2, min(_ADAM_BLOCK, flat.size)), flat.dtype)
    for start in range(0, flat.size, _ADAM_BLOCK):
        p, d, m, v = (array[start : start + _ADAM_BLOCK] for array in (flat, d_flat, mean, square))
        a, b = room[:, : p.size]
        np.multiply(m, beta_1, m)
        np.multiply(d, 1.0 - beta_1, a)
        np.add(m, a, m)
        np.multiply(v, beta_2, v)
        np.multiply(d, d, a)
        np.multiply(a, 1.0 - beta_2, a)
        np.add(v, a, v)
        if weight_decay:
            np.multiply(p, 1.0 - lr * weight_decay, p)
        np.sqrt(v, a)
        np.divide(a, root, a)
        np.add(a, eps, a)
        np.multiply(m, step_size, b)
        np.divide(b, a, b)
        np.subtract(p, b, p)
