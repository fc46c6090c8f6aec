"""The LSTM of the NumPy kernels; `numpy` explains how they work."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

import numpy as np

from .._typing import Array
from ._numpy_step import dot_for, logistic_of_minus, transposed
from ._schedule import Schedule, after, backwards, cut, cut_scratch, enter, output, scratch, sorted_copy

# Up to so many numbers in a state, a single step has a way of its own: 12 instead of 32 us for 64 numbers.
_FEW = 512

# A call costs 0.1 us for every row that is not followed by the next one. Below this length it is faster to
# apply the three calls of the logistic function to all of an LSTM's gates, the candidate as well, than to the
# parts that need it: 28 and 35 us for 32 rows, H = 128 (Zen 3, where an element of them takes 1.9 ns).
_SHORT_ROW = 256


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
    weight = transposed(weight_hh, T, minus=True)
    projection = None if weight_hr is None else weight_hr.T
    h_initial, c_initial = schedule.sort(h_0), schedule.sort(c_0)
    h = np.empty((T + 1, B, h_0.shape[1]), dtype)
    # Without a backward scan one row per sequence holds c: after its last step, the final one.
    c = np.empty((T + 1, B, H), dtype) if save else c_initial.copy()
    z, g, m = np.empty((B, H4), dtype), np.empty((B, H), dtype), np.empty((B, H), dtype)
    with np.errstate(over="ignore", under="ignore"):  # where exp(-z) is infinite or 0 the gate is 0 or 1
        for run in schedule.runs():
            n = run.live
            enter(h, h_initial, run)
            h_before, h_after = cut(run, h)
            h_factor = h_before if T > 1 else np.negative(h_before)
            c_steps = None
            if save:
                enter(c, c_initial, run)
                c_steps = cut(run, c)
            _lstm_steps(
                gates[run.steps, :n], h_factor, h_after, c_steps or (c[:n], c[:n]), save,
                weight, projection, z[:n], g[:n], m[:n],
            )  # fmt: skip
    saved = LSTMSaved(gates, c, schedule) if save else None
    c_n = schedule.final(c, c_0) if save else schedule.unsort(c)
    return output(after(h, reverse), schedule), schedule.final(h, h_0), c_n, saved


def _lstm_steps(
    gates: Array, h_factor: Array, h_after: Array, c: tuple[Array, Array], save: bool,
    weight: Array, projection: Array | None, z: Array, g: Array, m: Array,
) -> None:  # fmt: skip
    """Fill h_after (S, n, P) and advance c, (before, after) each step.

    With `save`, c are (S, n, H) and the activated gates come in place of `gates` (S, n, 4H). Without, c is
    one and the same (n, H), and nothing but h leaves the cache.
    """
    n, H = m.shape
    dot, one = dot_for(n), np.array(1.0, m.dtype)
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
            logistic_of_minus(s_t, one)
        else:
            logistic_of_minus(s_t[:, : 2 * H], one)
            logistic_of_minus(o_t, one)
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
    d_y = sorted_copy(d_output, schedule)
    d_h, d_c = schedule.sort(d_h_n).copy(), schedule.sort(d_c_n).copy()
    runs = schedule.runs(4 * H)
    work, d_projected = scratch(9, runs, d_c), scratch(1, runs, d_h)
    d_weight_hr = None if weight_hr is None else np.zeros_like(weight_hr)
    for run in reversed(runs):
        n = run.live
        a = gates.reshape(T, B, 4, H)[run.steps, :n]
        parts = cut_scratch(work, run)
        factors, (forget, slope, m, w, d_m) = parts[:4], parts[4:]
        np.copyto(factors, a.transpose(2, 0, 1, 3))
        _lstm_factors(factors, *cut(run, saved.c), forget, slope, m, w)
        d_h_t, d_c_t, dot = d_h[:n], d_c[:n], dot_for(n)
        by_step = a.swapaxes(1, 2), factors.swapaxes(0, 1)
        steps = d_y[run.steps, :n], gates[run.steps, :n], *by_step, forget, slope, d_m
        (d_p,) = cut_scratch(d_projected, run)
        for d_y_t, d_z, d_gates_t, factors_t, f_t, slope_t, d_m_t, d_p_t in backwards(*steps, d_p):
            np.add(d_h_t, d_y_t, d_h_t)
            if weight_hr is None:
                d_m_t = d_h_t
            else:
                np.copyto(d_p_t, d_h_t)
                dot(d_h_t, weight_hr, d_m_t)
            np.multiply(slope_t, d_m_t, slope_t)
            np.add(d_c_t, slope_t, d_c_t)
            np.multiply(factors_t[:3], d_c_t, d_gates_t[:3])
            np.multiply(factors_t[3], d_m_t, d_gates_t[3])
            np.multiply(d_c_t, f_t, d_c_t)
            dot(d_z, weight_hh, d_h_t)
        if d_weight_hr is not None:
            d_weight_hr += d_p.reshape(run.size * n, P).T @ m.reshape(run.size * n, H)
    results = schedule.unsort_steps(gates), schedule.unsort(d_h), schedule.unsort(d_c)
    return results if d_weight_hr is None else (*results, d_weight_hr)


def _lstm_factors(
    gates: Array, c_before: Array, c_after: Array, forget: Array, slope: Array, m: Array, w: Array
) -> None:
    """Turn a copy of the activated gates (4, S, n, H) into the factors that make their gradients.

    Those of i, f and g multiply d_c, that of o multiplies d_m, where m = o tanh(c). Fills `forget` with f,
    `slope` with dm/dc and `m`; `w` is for work.
    """
    i, f, g, o = gates  # g holds -g
    one = np.array(1.0, gates.dtype)
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
