"""The GRU of the CUDA kernels; the package explains how they work."""

from __future__ import annotations

from typing import NamedTuple

from ..._array import namespace_of
from ..._typing import Array
from . import _persistent
from ._dtypes import name_of
from ._loader import product
from ._persistent import Side
from ._plan import Plan
from ._step import copy_as, elementwise, run, steps


class GRUSaved(NamedTuple):
    """What `gru_backward` needs.

    gates (T, B, 3H) after their nonlinearity; recurrent_n (T, B, H), W_n h_{t-1} + b_hn; and output (T, B, H)
    and h_0 (B, H) themselves, which nobody may change until then.
    """

    gates: Array
    recurrent_n: Array
    output: Array
    h_0: Array
    lengths: Array | None
    reverse: bool


def gru_forward(
    gates: Array, h_0: Array, weight_hh: Array, *, bias_hn: Array | None = None,
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, GRUSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs."""
    xp, dtype = namespace_of(gates), name_of(h_0.dtype)
    T, (B, H) = gates.shape[0], h_0.shape
    layout = _persistent.chosen("gru", False, dtype, T, B, H)
    if layout is not None:
        (result,) = gru_forwards(
            layout, [gates], [h_0], [weight_hh], bias_hn=[bias_hn], lengths=lengths, reverse=reverse,
            save=save,
        )  # fmt: skip
        return result

    output = xp.empty((T, B, H), dtype=h_0.dtype)
    recurrent_n = xp.empty((T, B, H), dtype=gates.dtype) if save else None
    saved = GRUSaved(gates, recurrent_n, output, h_0, lengths, reverse) if save else None
    h = copy_as(h_0, h_0.dtype)
    recurrent = xp.empty((B, 3 * H), dtype=gates.dtype)
    arguments = gates, recurrent, bias_hn, recurrent_n, h, output, lengths
    run(
        steps(gates, reverse),
        product(h, weight_hh.T, recurrent),
        elementwise("gru", "gru_forward", dtype, B, H, arguments),
    )
    return output, h, saved


def gru_forwards(
    layout: Plan, gates: list[Array], h_0: list[Array], weight_hh: list[Array], *,
    bias_hn: list[Array | None] | None = None, lengths: Array | None = None, reverse: bool = False,
    save: bool = True,
) -> list[tuple[Array, Array, GRUSaved | None]]:  # fmt: skip
    """Return for each direction of a launch what `gru_forward` does; `reverse` is that of the first."""
    sides, results = [], []
    T, (B, H) = gates[0].shape[0], h_0[0].shape
    biases = [None] * len(gates) if bias_hn is None else bias_hn
    for k, (a, h, weight, bias) in enumerate(zip(gates, h_0, weight_hh, biases, strict=True)):
        xp = namespace_of(a)
        output, h_n = xp.empty((T, B, H), dtype=h.dtype), xp.empty((B, H), dtype=h.dtype)
        recurrent_n, saved = None, None
        if save:
            recurrent_n = xp.empty((T, B, H), dtype=a.dtype)
            saved = GRUSaved(a, recurrent_n, output, h, lengths, reverse != bool(k))
        sides.append(Side(weight, (h, output), (a, bias, h, output, h_n, recurrent_n)))
        results.append((output, h_n, saved))
    _persistent.there(layout, "gru", sides, (T, B, H), lengths, reverse)
    return results


def gru_backward(
    saved: GRUSaved, weight_hh: Array, d_output: Array, d_h_n: Array
) -> tuple[Array, Array, Array]:
    """Return d_gates (T, B, 3H), d_h_0 (B, H) and d_recurrent_n (T, B, H)."""
    gates, recurrent_n, output, h_0, lengths, reverse = saved
    xp, dtype = namespace_of(gates), name_of(d_output.dtype)
    T, B, H = output.shape
    layout = _persistent.chosen("gru", True, dtype, T, B, H)
    if layout is not None:
        return gru_backwards(layout, [saved], [weight_hh], [d_output], [d_h_n])[0]

    d_w, d_h = xp.empty((B, 3 * H), dtype=gates.dtype), copy_as(d_h_n, gates.dtype)
    arguments = gates, recurrent_n, output, h_0, d_w, d_h, d_output, lengths, T, int(reverse)
    run(
        steps(gates, not reverse),
        elementwise("gru", "gru_backward", dtype, B, H, arguments),
        product(d_w, xp.astype(weight_hh, gates.dtype, copy=False), d_h, add=True),
    )
    return gates, xp.astype(d_h, d_h_n.dtype, copy=False), recurrent_n


def gru_backwards(
    layout: Plan, saved: list[GRUSaved], weight_hh: list[Array], d_output: list[Array], d_h_n: list[Array]
) -> list[tuple[Array, Array, Array]]:
    """Return for each direction of a launch what `gru_backward` does."""
    sides, results = [], []
    for one, weight, d_y, d_h in zip(saved, weight_hh, d_output, d_h_n, strict=True):
        d_h_0 = namespace_of(d_h).empty(d_h.shape, dtype=d_h.dtype)
        sides.append(Side(weight, (), (one.gates, one.recurrent_n, one.output, one.h_0, d_y, d_h, d_h_0)))
        results.append((one.gates, d_h_0, one.recurrent_n))
    _persistent.back(layout, "gru", sides, d_output[0].shape, saved[0].lengths, saved[0].reverse)
    return results
