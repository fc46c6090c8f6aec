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

from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

import numpy as np

from .._typing import Array
from ._case import Case
from ._schedule import Run, Schedule


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
    weight, zero = np.ascontiguousarray(weight_hh.T), np.zeros((), gates.dtype)
    h, initial = np.empty((T + 1, B, H), gates.dtype), schedule.sort(h_0)
    buffer = np.empty((B, H), gates.dtype)
    for run in schedule.runs():
        z = buffer[: run.live]
        _enter(h, initial, run)
        h_before, h_after = _cut(run, h)
        for a_t, h_t, y_t in zip(gates[run.steps, : run.live], h_before, h_after, strict=True):
            np.dot(h_t, weight, z)
            np.add(z, a_t, z)
            if nonlinearity == "tanh":
                np.tanh(z, y_t)
            else:
                np.maximum(z, zero, out=y_t)
    states = _after(h, reverse)
    saved = RNNSaved(states, schedule, nonlinearity) if save else None
    return _output(states, schedule), schedule.final(h, h_0), saved


def rnn_backward(saved: RNNSaved, weight_hh: Array, d_output: Array, d_h_n: Array) -> tuple[Array, Array]:
    """Return d_gates (T, B, H) and d_h_0 (B, H)."""
    schedule, dtype = saved.schedule, d_output.dtype
    d_y, d_gates = _sorted_copy(d_output, schedule), np.empty_like(saved.h)
    d_h, one = schedule.sort(d_h_n).copy(), np.ones((), dtype)
    for run in reversed(schedule.runs(saved.h.shape[2])):
        n, d_h_t = run.live, d_h[: run.live]
        h, slope = saved.h[run.steps, :n], d_gates[run.steps, :n]
        if saved.nonlinearity == "tanh":
            np.multiply(h, h, slope)
            np.subtract(one, slope, slope)
        else:
            np.greater(h, 0, slope)
        for d_y_t, d_z in zip(d_y[run.steps, :n][::-1], slope[::-1], strict=True):
            np.add(d_h_t, d_y_t, d_h_t)
            np.multiply(d_z, d_h_t, d_z)
            np.dot(d_z, weight_hh, d_h_t)
    return schedule.unsort_steps(d_gates), schedule.unsort(d_h)


# --------------------------------------------------------------------------------------------- LSTM


class LSTMSaved(NamedTuple):
    """What `lstm_backward` needs, rows as in `schedule`.

    gates (T, B, 4H) hold i, f, -g, o; c (T + 1, B, H) the initial state and that after each step.
    """

    gates: Array
    c: Array
    schedule: Schedule


def lstm_forward(
    gates: Array, h_0: Array, c_0: Array, weight_hh: Array, *, weight_hr: Array | None = None,
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, Array, LSTMSaved | None]:  # fmt: skip
    """Return output (T, B, P), h_n (B, P), c_n (B, H) and what the backward scan needs."""
    T, B, H4 = gates.shape
    H, dtype = H4 // 4, gates.dtype
    schedule = Schedule.of(T, B, lengths, reverse)
    gates = schedule.sort_steps(gates)
    weight = np.negative(weight_hh.T, order="C")
    projection = None if weight_hr is None else np.ascontiguousarray(weight_hr.T)
    h = np.empty((T + 1, B, h_0.shape[1]), dtype)
    c = _slots((T + 1, B, H), dtype, save)
    h_initial, c_initial = schedule.sort(h_0), schedule.sort(c_0)
    z_buffer, m_buffer = np.empty((B, H4), dtype), np.empty((B, H), dtype)
    with np.errstate(over="ignore", under="ignore"):  # exp(-z) may be infinite or 0: the gate is then 0 or 1
        for run in schedule.runs():
            _enter(h, h_initial, run)
            _enter(c, c_initial, run)
            n = run.live
            _lstm_run(
                gates[run.steps, :n], _cut(run, h), _cut(run, c), z_buffer[:n], m_buffer[:n],
                weight, projection, save,
            )  # fmt: skip
    saved = LSTMSaved(gates, c, schedule) if save else None
    return _output(_after(h, reverse), schedule), schedule.final(h, h_0), schedule.final(c, c_0), saved


def _lstm_run(
    gates: Array, h: tuple[Array, Array], c: tuple[Array, Array], z: Array, m: Array,
    weight: Array, projection: Array | None, save: bool,
) -> None:  # fmt: skip
    """Advance h and c, (before, after) each, over the steps of gates (S, n, 4H), which `save` activates."""
    H, one = m.shape[1], np.ones((), m.dtype)
    # Without a backward scan the activated gates need not leave the cache.
    s: Iterable[Array] = gates if save else repeat(z)
    i, f, g, o, i_f = (
        gates[:, :, cut] if save else repeat(z[:, cut])
        for cut in (*(slice(k * H, (k + 1) * H) for k in range(4)), slice(2 * H))
    )
    steps = zip(gates, *h, *c, s, i, f, g, o, i_f, strict=False)
    for a_t, h_t, y_t, c_t, c_next, s_t, i_t, f_t, g_t, o_t, i_f_t in steps:
        np.dot(h_t, weight, z)
        np.subtract(z, a_t, s_t)
        _logistic_of_minus(i_f_t, one)
        _logistic_of_minus(o_t, one)
        np.tanh(g_t, g_t)  # -g
        np.multiply(i_t, g_t, m)
        np.multiply(f_t, c_t, c_next)
        np.subtract(c_next, m, c_next)
        np.tanh(c_next, m)
        if projection is None:
            np.multiply(o_t, m, y_t)
        else:
            np.multiply(o_t, m, m)
            np.dot(m, projection, y_t)


def lstm_backward(
    saved: LSTMSaved, weight_hh: Array, d_output: Array, d_h_n: Array, d_c_n: Array, *,
    weight_hr: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Return d_gates (T, B, 4H), d_h_0 (B, P), d_c_0 (B, H) and, given weight_hr, d_weight_hr (P, H)."""
    schedule, gates, H = saved.schedule, saved.gates, saved.c.shape[2]
    T, B, P = d_output.shape
    d_y = _sorted_copy(d_output, schedule)
    d_h, d_c = schedule.sort(d_h_n).copy(), schedule.sort(d_c_n).copy()
    runs = schedule.runs(4 * H)
    work, d_projected = _scratch(5, runs, d_c), _scratch(1, runs, d_h)
    d_weight_hr = None if weight_hr is None else np.zeros_like(weight_hr)
    for run in reversed(runs):
        n = run.live
        a = gates.reshape(T, B, 4, H)[run.steps, :n]
        forget, slope, m, w, d_m = _cut_scratch(work, run)
        _lstm_slopes(a, *_cut(run, saved.c), forget, slope, m, w)
        d_h_t, d_c_t = d_h[:n], d_c[:n]
        steps = (d_y[run.steps, :n], gates[run.steps, :n], a[:, :, :3], a[:, :, 3], forget, slope, d_m)
        (d_p,) = _cut_scratch(d_projected, run)
        for d_y_t, d_z, a_ifg, a_o, f_t, slope_t, d_m_t, d_p_t in _backwards(*steps, d_p):
            np.add(d_h_t, d_y_t, d_h_t)
            if weight_hr is None:
                d_m_t = d_h_t
            else:
                np.copyto(d_p_t, d_h_t)
                np.dot(d_h_t, weight_hr, d_m_t)
            np.multiply(slope_t, d_m_t, slope_t)
            np.add(d_c_t, slope_t, d_c_t)
            np.multiply(a_ifg, d_c_t[:, None], a_ifg)
            np.multiply(a_o, d_m_t, a_o)
            np.multiply(d_c_t, f_t, d_c_t)
            np.dot(d_z, weight_hh, d_h_t)
        if d_weight_hr is not None:
            d_weight_hr += d_p.reshape(run.size * n, P).T @ m.reshape(run.size * n, H)
    results = schedule.unsort_steps(gates), schedule.unsort(d_h), schedule.unsort(d_c)
    return results if d_weight_hr is None else (*results, d_weight_hr)


def _lstm_slopes(
    a: Array, c_before: Array, c_after: Array, forget: Array, slope: Array, m: Array, w: Array
) -> None:
    """Turn the activated gates a (S, n, 4, H) into the factors that make their gradients.

    Those of i, f and g multiply d_c, that of o multiplies d_m, where m = o tanh(c). Fills `forget` with f,
    `slope` with dm/dc and `m`; `w` is for work.
    """
    i, f, g, o = (a[:, :, k] for k in range(4))  # g holds -g
    one = np.ones((), a.dtype)
    np.tanh(c_after, m)
    np.multiply(m, m, slope)
    np.subtract(one, slope, slope)
    np.multiply(slope, o, slope)  # o (1 - tanh(c)^2)
    np.multiply(m, o, m)
    np.subtract(one, o, o)
    np.multiply(o, m, o)  # tanh(c) o (1 - o)
    np.copyto(forget, f)
    np.subtract(one, f, f)
    np.multiply(f, forget, f)
    np.multiply(f, c_before, f)  # c_prev f (1 - f)
    np.subtract(i, one, w)
    np.multiply(w, g, w)
    np.multiply(g, g, g)
    np.subtract(one, g, g)
    np.multiply(g, i, g)  # i (1 - g^2)
    np.multiply(i, w, i)  # g i (1 - i)


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
    weight = weight_hh.T.copy()
    np.negative(weight[:, : 2 * H], weight[:, : 2 * H])
    b_hn = np.zeros(H, dtype) if bias_hn is None else bias_hn
    h, initial = np.empty((T + 1, B, H), dtype), schedule.sort(h_0)
    recurrent_n = np.empty((T, B, H), dtype) if save else None
    q_buffer, m_buffer = np.empty((B, H3), dtype), np.empty((B, H), dtype)
    with np.errstate(over="ignore", under="ignore"):  # as in lstm_forward
        for run in schedule.runs():
            _enter(h, initial, run)
            n = run.live
            _gru_run(
                gates[run.steps, :n], _cut(run, h), q_buffer[:n], m_buffer[:n], weight, b_hn,
                None if recurrent_n is None else recurrent_n[run.steps, :n],
            )  # fmt: skip
    saved = None if recurrent_n is None else GRUSaved(gates, recurrent_n, h, schedule)
    return _output(_after(h, reverse), schedule), schedule.final(h, h_0), saved


def _gru_run(
    gates: Array, h: tuple[Array, Array], q: Array, m: Array, weight: Array, b_hn: Array,
    recurrent_n: Array | None,
) -> None:  # fmt: skip
    """Advance h (before, after) over the steps of gates (S, n, 3H); given `recurrent_n`, save."""
    H, one = m.shape[1], np.ones((), m.dtype)
    cuts = slice(2 * H), slice(H), slice(H, 2 * H), slice(2 * H, 3 * H)
    q_rz, _, _, q_n = (q[:, cut] for cut in cuts)
    # As in an LSTM: without a backward scan everything stays in the cache.
    s_rz, r, z, n = (repeat(q[:, cut]) if recurrent_n is None else gates[:, :, cut] for cut in cuts)
    w_n: Iterable[Array] = repeat(q_n) if recurrent_n is None else recurrent_n
    steps = zip(gates[:, :, : 2 * H], gates[:, :, 2 * H :], *h, s_rz, r, z, n, w_n, strict=False)
    for a_rz, a_n, h_t, y_t, s_t, r_t, z_t, n_t, w_t in steps:
        np.dot(h_t, weight, q)
        np.subtract(q_rz, a_rz, s_t)
        _logistic_of_minus(s_t, one)
        np.add(q_n, b_hn, w_t)
        np.multiply(r_t, w_t, m)
        np.add(m, a_n, m)
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
    d_y = _sorted_copy(d_output, schedule)
    d_h, product = schedule.sort(d_h_n).copy(), np.empty_like(d_h_n)
    w_rz, w_n = weight_hh[: 2 * H], weight_hh[2 * H :]
    runs = schedule.runs(3 * H)
    work = _scratch(3, runs, d_h)
    for run in reversed(runs):
        n = run.live
        a, d_q = gates.reshape(T, B, 3, H)[run.steps, :n], recurrent_n[run.steps, :n]
        update, *others = _cut_scratch(work, run)
        _gru_slopes(a, d_q, _cut(run, saved.h)[0], update, *others)
        d_h_t, p = d_h[:n], product[:n]
        steps = d_y[run.steps, :n], gates[run.steps, :n, : 2 * H], a, d_q, update
        for d_y_t, d_rz, a_t, d_q_t, z_t in _backwards(*steps):
            np.add(d_h_t, d_y_t, d_h_t)
            np.multiply(a_t, d_h_t[:, None], a_t)
            np.multiply(d_q_t, d_h_t, d_q_t)
            np.multiply(d_h_t, z_t, d_h_t)
            np.dot(d_rz, w_rz, p)
            np.add(d_h_t, p, d_h_t)
            np.dot(d_q_t, w_n, p)
            np.add(d_h_t, p, d_h_t)
    return schedule.unsort_steps(gates), schedule.unsort(d_h), schedule.unsort_steps(recurrent_n)


def _gru_slopes(a: Array, recurrent_n: Array, h_before: Array, update: Array, keep: Array, w: Array) -> None:
    """Turn the activated gates a (S, n, 3, H) and `recurrent_n` into the factors of d_h in their gradients.

    Fills `update` with z; `keep` and `w` are for work.
    """
    r, z, n = (a[:, :, k] for k in range(3))
    one = np.ones((), a.dtype)
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


# --------------------------------------------------------------------------------- rows of a table


def embedding_backward(d_rows: Array, index: Array, num_rows: int) -> Array:
    """Sort the rows by index, then add up each run: linear in the rows, whatever the table's size."""
    total = np.zeros((num_rows, d_rows.shape[1]), d_rows.dtype)
    if index.size:
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        total[ordered[starts]] = np.add.reduceat(d_rows[order], starts, axis=0)
    return total


# ------------------------------------------------------------------------------------------- pieces


def _logistic_of_minus(z: Array, one: Array) -> None:
    """Overwrite z by 1 / (1 + exp(z)). `one` is an array: a Python number costs 0.4 us more a call."""
    np.exp(z, z)
    np.add(z, one, z)
    np.divide(one, z, z)


def _slots(shape: tuple[int, ...], dtype: np.dtype[np.floating], distinct: bool) -> Array:
    """Return an array (T + 1, B, N), or one whose slots are all the same memory: only the last is wanted."""
    if distinct:
        return np.empty(shape, dtype)
    slot = np.empty(shape[1:], dtype)
    return np.ndarray(shape, dtype, slot, strides=(0, *slot.strides))


def _enter(states: Array, initial: Array, run: Run) -> None:
    """Put the initial state of the sequences that begin with this run in front of it."""
    states[run.before.start, run.entering] = initial[run.entering]


def _cut(run: Run, states: Array) -> tuple[Array, Array]:
    """Return the states (S, n, N) before and after each step of the run."""
    return states[run.before, : run.live], states[run.after, : run.live]


def _after(states: Array, reverse: bool) -> Array:
    """Return the states (T, B, N) after each step."""
    return states[:-1] if reverse else states[1:]


def _output(states: Array, schedule: Schedule) -> Array:
    """Return the states after each step as the layer's output."""
    return states if schedule.lengths is None else schedule.unsort_steps(states, np.empty_like(states))


def _sorted_copy(d_output: Array, schedule: Schedule) -> Array:
    return d_output if schedule.order is None else schedule.sort_steps(d_output, np.empty_like(d_output))


def _scratch(parts: int, runs: list[Run], state: Array) -> Array:
    """Allocate `parts` buffers that hold one state a step for the largest run."""
    rows = max((run.size * run.live for run in runs), default=0)
    return np.empty((parts, rows, state.shape[1]), state.dtype)


def _cut_scratch(work: Array, run: Run) -> Array:
    """Return the buffers as (parts, S, n, N)."""
    parts, _, N = work.shape
    return work[:, : run.size * run.live].reshape(parts, run.size, run.live, N)


def _backwards(*sequences: Array) -> Iterable[tuple[Array, ...]]:
    """Iterate over the time steps of all sequences, the last one of the scan first."""
    return zip(*(sequence[::-1] for sequence in sequences), strict=True)
