"""The simple RNN of the CUDA kernels; the package explains how they work."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._array import accumulation_dtype, namespace_of
from ..._typing import Array
from . import _persistent
from ._loader import product
from ._step import copy_as, elementwise, run, steps


class RNNSaved(NamedTuple):
    """What `rnn_backward` needs: output (T, B, H) itself, which nobody may change until then."""

    output: Array
    lengths: Array | None
    reverse: bool
    nonlinearity: str


def rnn_forward(
    gates: Array, h_0: Array, weight_hh: Array, *, nonlinearity: str = "tanh",
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, RNNSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs."""
    (T, B, H), dtype = gates.shape, str(h_0.dtype)
    xp, relu = namespace_of(gates), int(nonlinearity == "relu")
    output = xp.empty((T, B, H), dtype=h_0.dtype)
    saved = RNNSaved(output, lengths, reverse, nonlinearity) if save else None
    layout = _persistent.chosen("rnn", False, dtype, T, B, H)
    if layout is not None:
        h = xp.empty((B, H), dtype=h_0.dtype)
        args = gates, h_0, output, h, relu
        _persistent.there(layout, "rnn", weight_hh, h_0, output, args, lengths, reverse)
        return output, h, saved

    h = copy_as(h_0, h_0.dtype)
    arguments = gates, h, output, lengths, relu
    run(
        steps(gates, reverse),
        product(h, weight_hh.T, gates, add=True),
        elementwise("rnn", "rnn_forward", dtype, B, H, arguments),
    )
    return output, h, saved


def rnn_backward(saved: RNNSaved, weight_hh: Array, d_output: Array, d_h_n: Array) -> tuple[Array, Array]:
    """Return d_gates (T, B, H) and d_h_0 (B, H)."""
    output, lengths, reverse, nonlinearity = saved
    xp, dtype = namespace_of(output), str(d_output.dtype)
    (T, B, H), wide = output.shape, np.dtype(accumulation_dtype(dtype))
    d_gates, relu = xp.empty((T, B, H), dtype=wide), int(nonlinearity == "relu")
    layout = _persistent.chosen("rnn", True, dtype, T, B, H)
    if layout is not None:
        d_h_0 = xp.empty((B, H), dtype=d_h_n.dtype)
        args = output, d_gates, d_output, d_h_n, d_h_0, relu
        _persistent.back(layout, "rnn", weight_hh, d_output, args, lengths, reverse)
        return d_gates, d_h_0

    d_h = copy_as(d_h_n, wide)
    arguments = output, d_gates, d_h, d_output, lengths, relu
    run(
        steps(output, not reverse),
        elementwise("rnn", "rnn_backward", dtype, B, H, arguments),
        product(d_gates, xp.astype(weight_hh, wide, copy=False), d_h, add=True),
    )
    return d_gates, xp.astype(d_h, d_h_n.dtype, copy=False)
