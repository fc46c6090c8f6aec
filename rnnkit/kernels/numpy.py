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

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, NamedTuple

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
    weight, zero = _transposed(weight_hh, T), np.zeros((), gates.dtype)
    h, initial = np.empty((T + 1, B, H), gates.dtype), schedule.sort(h_0)
    work = np.empty((B, H), gates.dtype)
    for run in schedule.runs():
        z, dot = work[: run.live], _dot(run.live)
        _enter(h, initial, run)
        for a_t, h_t, y_t in zip(gates[run.steps, : run.live], *_cut(run, h), strict=True):
            dot(h_t, weight, z)
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
    d_h, one = schedule.sort(d_h_n).copy(), np.array(1.0, dtype)
    for run in reversed(schedule.runs(saved.h.shape[2])):
        n, d_h_t, dot = run.live, d_h[: run.live], _dot(run.live)
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
    if T == 1 and B * H <= _FEW and not save and weight_hr is None and lengths is None:
        h_n, c_n = _lstm_single(gates[0], h_0, c_0, weight_hh)
        return h_n[None].copy(), h_n, c_n, None
    schedule = Schedule.of(T, B, lengths, reverse)
    gates = schedule.sort_steps(gates)
    weight = _transposed(weight_hh, T, minus=True)
    projection = None if weight_hr is None else weight_hr.T
    h_initial, c_initial = schedule.sort(h_0), schedule.sort(c_0)
    h = np.empty((T + 1, B, h_0.shape[1]), dtype)
    # Without a backward scan one row per sequence holds c: after its last step, the final one.
    c = np.empty((T + 1, B, H), dtype) if save else c_initial.copy()
    z, g, m = np.empty((B, H4), dtype), np.empty((B, H), dtype), np.empty((B, H), dtype)
    with np.errstate(over="ignore", under="ignore"):  # where exp(-z) is infinite or 0 the gate is 0 or 1
        for run in schedule.runs():
            n = run.live
            _enter(h, h_initial, run)
            h_before, h_after = _cut(run, h)
            h_factor = h_before if T > 1 else np.negative(h_before)
            c_steps = None
            if save:
                _enter(c, c_initial, run)
                c_steps = _cut(run, c)
            _lstm_steps(
                gates[run.steps, :n], h_factor, h_after, c_steps or (c[:n], c[:n]), save,
                weight, projection, z[:n], g[:n], m[:n],
            )  # fmt: skip
    saved = LSTMSaved(gates, c, schedule) if save else None
    c_n = schedule.final(c, c_0) if save else schedule.unsort(c)
    return _output(_after(h, reverse), schedule), schedule.final(h, h_0), c_n, saved


def _lstm_steps(
    gates: Array, h_factor: Array, h_after: Array, c: tuple[Array, Array], save: bool,
    weight: Array, projection: Array | None, z: Array, g: Array, m: Array,
) -> None:  # fmt: skip
    """Fill h_after (S, n, P) and advance c, (before, after) each step.

    With `save`, c are (S, n, H) and the activated gates come in place of `gates` (S, n, 4H). Without, c is
    one and the same (n, H), and nothing but h leaves the cache.
    """
    n, H = m.shape
    dot, one = _dot(n), np.array(1.0, m.dtype)
    cuts = [slice(k * H, (k + 1) * H) for k in range(4)]
    s: Iterable[Array] = gates if save else repeat(z)
    i, f, minus_g, o = (gates[:, :, cut] if save else repeat(z[:, cut]) for cut in cuts)
    c_before, c_after = c if save else map(repeat, c)
    whole = H <= _SHORT_ROW
    steps = zip(gates, h_factor, h_after, c_before, c_after, s, i, f, minus_g, o, strict=False)
    for a_t, h_t, y_t, c_t, c_next, s_t, i_t, f_t, g_t, o_t in steps:
        dot(h_t, weight, z)
        np.subtract(z, a_t, s_t)
        np.tanh(g_t, g)  # -g
        if whole:
            _logistic_of_minus(s_t, one)
        else:
            _logistic_of_minus(s_t[:, : 2 * H], one)
            _logistic_of_minus(o_t, one)
        if save:
            np.copyto(g_t, g)
        np.multiply(i_t, g, g)
        np.multiply(f_t, c_t, c_next)
        np.subtract(c_next, g, c_next)
        np.tanh(c_next, m)
        if projection is None:
            np.multiply(o_t, m, y_t)
        else:
            np.multiply(o_t, m, m)
            dot(m, projection, y_t)


def _lstm_single(a: Array, h_0: Array, c_0: Array, weight_hh: Array) -> tuple[Array, Array]:
    """Return h and c (B, H) after a single step, which is all that a call of a stream computes.

    Here the logistic function is 0.5 tanh(0.5 z) + 0.5, which cannot overflow: to silence NumPy for the other
    form takes longer than the tanh of so few numbers.
    """
    H, half = c_0.shape[1], np.array(0.5, a.dtype)
    z = np.dot(h_0, weight_hh.T)
    np.add(z, a, z)
    m = np.tanh(z[:, 2 * H : 3 * H])  # g
    np.multiply(z, half, z)
    np.tanh(z, z)
    np.multiply(z, half, z)
    np.add(z, half, z)
    np.multiply(m, z[:, :H], m)
    c = np.multiply(z[:, H : 2 * H], c_0)
    np.add(c, m, c)
    np.tanh(c, m)
    np.multiply(m, z[:, 3 * H :], m)
    return m, c


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
        d_h_t, d_c_t, dot = d_h[:n], d_c[:n], _dot(n)
        steps = (d_y[run.steps, :n], gates[run.steps, :n], a[:, :, :3], a[:, :, 3], forget, slope, d_m)
        (d_p,) = _cut_scratch(d_projected, run)
        for d_y_t, d_z, a_ifg, a_o, f_t, slope_t, d_m_t, d_p_t in _backwards(*steps, d_p):
            np.add(d_h_t, d_y_t, d_h_t)
            if weight_hr is None:
                d_m_t = d_h_t
            else:
                np.copyto(d_p_t, d_h_t)
                dot(d_h_t, weight_hr, d_m_t)
            np.multiply(slope_t, d_m_t, slope_t)
            np.add(d_c_t, slope_t, d_c_t)
            np.multiply(a_ifg, d_c_t[:, None], a_ifg)
            np.multiply(a_o, d_m_t, a_o)
            np.multiply(d_c_t, f_t, d_c_t)
            dot(d_z, weight_hh, d_h_t)
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
    one = np.array(1.0, a.dtype)
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
    weight = _transposed(weight_hh, T, minus=True)
    b_hn = np.zeros(H, dtype) if bias_hn is None else bias_hn
    h, initial = np.empty((T + 1, B, H), dtype), schedule.sort(h_0)
    recurrent_n = np.empty((T, B, H), dtype) if save else None
    q, m = np.empty((B, H3), dtype), np.empty((B, H), dtype)
    with np.errstate(over="ignore", under="ignore"):  # as in lstm_forward
        for run in schedule.runs():
            n = run.live
            _enter(h, initial, run)
            w_n = None if recurrent_n is None else recurrent_n[run.steps, :n]
            _gru_steps(gates[run.steps, :n], *_cut(run, h), w_n, weight, b_hn, q[:n], m[:n], T == 1)
    saved = None if recurrent_n is None else GRUSaved(gates, recurrent_n, h, schedule)
    return _output(_after(h, reverse), schedule), schedule.final(h, h_0), saved


def _gru_steps(
    gates: Array, h_before: Array, h_after: Array, recurrent_n: Array | None,
    weight: Array, b_hn: Array, q: Array, m: Array, single: bool,
) -> None:  # fmt: skip
    """Fill h_after (S, n, H); given `recurrent_n` (S, n, H), fill it and activate `gates` (S, n, 3H)."""
    n, H = m.shape
    dot, one = _dot(n), np.array(1.0, m.dtype)
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
        _logistic_of_minus(s_t, one)
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
        d_h_t, p, dot = d_h[:n], product[:n], _dot(n)
        steps = d_y[run.steps, :n], gates[run.steps, :n, : 2 * H], a, d_q, update
        for d_y_t, d_rz, a_t, d_q_t, z_t in _backwards(*steps):
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

# Up to so many numbers in a state, the number of calls decides, not their work.
_FEW = 512

# A call costs 0.1 us for every row that is not followed by the next one. Below this length it is faster to
# apply the three calls of the logistic function to all of an LSTM's gates, the candidate as well, than to the
# parts that need it: 28 and 35 us for 32 rows, H = 128 (Zen 3, where an element of them takes 1.9 ns).
_SHORT_ROW = 256


def _logistic_of_minus(z: Array, one: Array) -> None:
    """Overwrite z by 1 / (1 + exp(z)). `one` is an array: a Python number costs 0.4 us more a call."""
    np.exp(z, z)
    np.add(z, one, z)
    np.divide(one, z, z)


def _dot(rows: int) -> Callable[[Array, Array, Array], Any]:
    """Return the function that multiplies a matrix of so few rows with the weights, into its third argument.

    OpenBLAS is slower for 2 or 3 rows at once than for one after the other: 21 and 9 us for 2 rows, H = 128
    (84 and 34 us for H = 256; one thread of a Zen 3).
    """
    return _dot_row_by_row if 1 < rows < 4 else np.dot


def _dot_row_by_row(a: Array, b: Array, out: Array) -> None:
    np.matmul(a[:, None], b, out[:, None])


def _transposed(weight: Array, T: int, minus: bool = False) -> Array:
    """Return W^T, or where `minus` is wanted -W^T, except for T = 1, where the sign is better put on h.

    A transposed copy makes a product 2 to 30 % faster, 0.01 to 0.04 ns an element, and costs 1 to 3 ns an
    element (by 32 rows at a time; with a plain copy, 16 ns for H = 1024): it pays from some 100 steps on,
    and from 32 on where the weights lie in the first-level cache.
    """
    worthwhile = 32 if weight.size <= 1 << 14 else 128
    if worthwhile > T:
        return np.negative(weight).T if minus and T > 1 else weight.T
    result = np.empty(weight.shape[::-1], weight.dtype)
    for k in range(0, len(weight), 32):
        (np.negative if minus else np.positive)(weight[k : k + 32].T, result[:, k : k + 32])
    return result


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
