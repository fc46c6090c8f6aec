"""The LSTM of the CUDA kernels; the package explains how they work."""

from __future__ import annotations

from typing import NamedTuple

from ..._array import namespace_of
from ..._typing import Array
from . import _persistent
from ._dtypes import name_of
from ._loader import product
from ._persistent import Side
from ._plan import Plan
from ._step import Step, copy_as, elementwise, run, steps


class LSTMSaved(NamedTuple):
    """What `lstm_backward` needs: gates (T, B, 4H) after their nonlinearity, c_prev (T, B, H)."""

    gates: Array
    c_prev: Array
    lengths: Array | None
    reverse: bool


def lstm_forward(
    gates: Array, h_0: Array, c_0: Array, weight_hh: Array, *, weight_hr: Array | None = None,
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, Array, LSTMSaved | None]:  # fmt: skip
    """Return output (T, B, P), h_n (B, P), c_n (B, H) and what the backward scan needs."""
    xp, dtype = namespace_of(gates), name_of(h_0.dtype)
    (T, B, _), (_, P), (_, H) = gates.shape, h_0.shape, c_0.shape
    layout = _persistent.chosen("lstm", False, dtype, T, B, H) if weight_hr is None else None
    if layout is not None:
        (result,) = lstm_forwards(
            layout, [gates], [h_0], [c_0], [weight_hh], lengths=lengths, reverse=reverse, save=save
        )
        return result

    output = xp.empty((T, B, P), dtype=h_0.dtype)
    c_prev = xp.empty((T, B, H), dtype=gates.dtype) if save else None
    saved = LSTMSaved(gates, c_prev, lengths, reverse) if save else None
    h, c = copy_as(h_0, h_0.dtype), copy_as(c_0, c_0.dtype)
    m = None if weight_hr is None else xp.empty((B, H), dtype=gates.dtype)

    calls = [
        product(h, weight_hh.T, gates, add=True),
        elementwise("lstm", "lstm_forward", dtype, B, H, (gates, c, c_prev, h, output, m, lengths)),
    ]
    if weight_hr is not None:
        calls += _projection(m, weight_hr, h, output, lengths)
    run(steps(gates, reverse), *calls)
    return output, h, c, saved


def lstm_forwards(
    layout: Plan, gates: list[Array], h_0: list[Array], c_0: list[Array], weight_hh: list[Array], *,
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> list[tuple[Array, Array, Array, LSTMSaved | None]]:  # fmt: skip
    """Return for each direction of a launch what `lstm_forward` does; `reverse` is that of the first."""
    sides, results = [], []
    (T, B, _), (_, H) = gates[0].shape, c_0[0].shape
    for k, (a, h, c, weight) in enumerate(zip(gates, h_0, c_0, weight_hh, strict=True)):
        xp = namespace_of(a)
        output, c_prev = xp.empty((T, B, H), dtype=h.dtype), None
        h_n, c_n = xp.empty((B, H), dtype=h.dtype), xp.empty((B, H), dtype=c.dtype)
        saved = None
        if save:
            c_prev = xp.empty((T, B, H), dtype=a.dtype)
            saved = LSTMSaved(a, c_prev, lengths, reverse != bool(k))
        sides.append(Side(weight, (h, output), (a, h, c, output, h_n, c_n, c_prev)))
        results.append((output, h_n, c_n, saved))
    _persistent.there(layout, "lstm", sides, (T, B, H), lengths, reverse)
    return results


def _projection(m: Array, weight_hr: Array, h: Array, output: Array, lengths: Array | None) -> list[Step]:
    """Return the calls that turn m (B, H) into h (B, P) and output[t]."""
    (B, P), dtype = h.shape, name_of(h.dtype)
    projected = namespace_of(m).empty((B, P), dtype=m.dtype)
    weight = namespace_of(m).astype(weight_hr, m.dtype, copy=False)
    return [
        product(m, weight.T, projected),
        elementwise("lstm", "lstm_project", dtype, B, P, (projected, h, output, lengths)),
    ]


def lstm_backward(
    saved: LSTMSaved, weight_hh: Array, d_output: Array, d_h_n: Array, d_c_n: Array, *,
    weight_hr: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Return d_gates (T, B, 4H), d_h_0 (B, P), d_c_0 (B, H) and, given weight_hr, d_weight_hr (P, H)."""
    gates, c_prev, lengths, reverse = saved
    xp, dtype = namespace_of(gates), name_of(d_output.dtype)
    (T, B, P), H = d_output.shape, c_prev.shape[2]
    layout = _persistent.chosen("lstm", True, dtype, T, B, H) if weight_hr is None else None
    if layout is not None:
        return lstm_backwards(layout, [saved], [weight_hh], [d_output], [d_h_n], [d_c_n])[0]

    d_h, d_c = copy_as(d_h_n, gates.dtype), copy_as(d_c_n, gates.dtype)
    weight = xp.astype(weight_hh, gates.dtype, copy=False)

    calls: list[Step] = []
    d_m = None
    if weight_hr is not None:
        d_m = xp.empty((B, H), dtype=gates.dtype)
        d_projected = xp.empty((T, B, P), dtype=gates.dtype)
        incoming = (d_h, d_output, d_projected, lengths)
        calls += [
            elementwise("lstm", "lstm_project_backward", dtype, B, P, incoming),
            product(d_projected, xp.astype(weight_hr, gates.dtype, copy=False), d_m),
        ]
    arrays = (gates, c_prev, d_c, d_h, d_output, d_m, lengths)
    calls += [
        elementwise("lstm", "lstm_backward", dtype, B, H, arrays),
        product(gates, weight, d_h, add=True),
    ]
    run(steps(gates, not reverse), *calls)
    results = gates, xp.astype(d_h, d_h_n.dtype, copy=False), d_c
    if weight_hr is None:
        return results
    d_weight_hr = xp.empty((P, H), dtype=gates.dtype)
    unprojected = xp.reshape(c_prev, (T * B, H))  # what the kernel left there
    product(xp.reshape(d_projected, (T * B, P)).T, unprojected, d_weight_hr)(0)
    return *results, xp.astype(d_weight_hr, weight_hr.dtype, copy=False)


def lstm_backwards(
    layout: Plan, saved: list[LSTMSaved], weight_hh: list[Array], d_output: list[Array], d_h_n: list[Array],
    d_c_n: list[Array],
) -> list[tuple[Array, ...]]:  # fmt: skip
    """Return for each direction of a launch what `lstm_backward` does."""
    sides, results = [], []
    for (gates, c_prev, _, _), weight, d_y, d_h, d_c in zip(
        saved, weight_hh, d_output, d_h_n, d_c_n, strict=True
    ):
        xp = namespace_of(gates)
        d_h_0, d_c_0 = xp.empty(d_h.shape, dtype=d_h.dtype), xp.empty(d_c.shape, dtype=d_c.dtype)
        sides.append(Side(weight, (), (gates, c_prev, d_y, d_h, d_c, d_h_0, d_c_0)))
        results.append((gates, d_h_0, d_c_0))
    _persistent.back(layout, "lstm", sides, d_output[0].shape, saved[0].lengths, saved[0].reverse)
    return results
