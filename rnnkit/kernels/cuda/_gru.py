"""The GRU of the CUDA kernels; the package explains how they work."""

from __future__ import annotations

from typing import NamedTuple

from ..._array import namespace_of
from ..._typing import Array
from . import _persistent
from ._loader import product
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
    xp, dtype = namespace_of(gates), str(h_0.dtype)
    T, (B, H) = gates.shape[0], h_0.shape
    output = xp.empty((T, B, H), dtype=h_0.dtype)
    recurrent_n = xp.empty((T, B, H), dtype=gates.dtype) if save else None
    saved = GRUSaved(gates, recurrent_n, output, h_0, lengths, reverse) if save else None
    layout = _persistent.chosen("gru", False, dtype, T, B, H)
    if layout is not None:
        h = xp.empty((B, H), dtype=h_0.dtype)
        args = gates, bias_hn, h_0, output, h, recurrent_n
        _persistent.there(layout, "gru", weight_hh, h_0, output, args, lengths, reverse)
        return output, h, saved

    h = copy_as(h_0, h_0.dtype)
    recurrent = xp.empty((B, 3 * H), dtype=gates.dtype)
    arguments = gates, recurrent, bias_hn, recurrent_n, h, output, lengths
    run(
        steps(gates, reverse),
        product(h, weight_hh.T, recurrent),
        elementwise("gru", "gru_forward", dtype, B, H, arguments),
    )
    return output, h, saved


def gru_backward(
    saved: GRUSaved, weight_hh: Array, d_output: Array, d_h_n: Array
) -> tuple[Array, Array, Array]:
    """Return d_gates (T, B, 3H), d_h_0 (B, H) and d_recurrent_n (T, B, H)."""
    gates, recurrent_n, output, h_0, lengths, reverse = saved
    xp, dtype = namespace_of(gates), str(d_output.dtype)
    T, B, H = output.shape
    layout = _persistent.chosen("gru", True, dtype, T, B, H)
    if layout is not None:
        d_h_0 = xp.empty((B, H), dtype=d_h_n.dtype)
        args = gates, recurrent_n, output, h_0, d_output, d_h_n, d_h_0
        _persistent.back(layout, "gru", weight_hh, d_output, args, lengths, reverse)
        return gates, d_h_0, recurrent_n

    d_w, d_h = xp.empty((B, 3 * H), dtype=gates.dtype), copy_as(d_h_n, gates.dtype)
    arguments = gates, recurrent_n, output, h_0, d_w, d_h, d_output, lengths, T, int(reverse)
    run(
        steps(gates, not reverse),
        elementwise("gru", "gru_backward", dtype, B, H, arguments),
        product(d_w, xp.astype(weight_hh, gates.dtype, copy=False), d_h, add=True),
    )
    return gates, xp.astype(d_h, d_h_n.dtype, copy=False), recurrent_n
