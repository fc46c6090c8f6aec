"""The simple RNN of the CUDA kernels; the package explains how they work."""

from __future__ import annotations

from typing import NamedTuple

from ..._array import namespace_of
from ..._typing import Array
from . import _persistent
from ._dtypes import name_of, wide_of
from ._loader import product
from ._persistent import Side
from ._plan import Plan
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
    (T, B, H), dtype = gates.shape, name_of(h_0.dtype)
    xp, relu = namespace_of(gates), int(nonlinearity == "relu")
    layout = _persistent.chosen("rnn", False, dtype, T, B, H)
    if layout is not None:
        (result,) = rnn_forwards(
            layout, [gates], [h_0], [weight_hh], nonlinearity=[nonlinearity], lengths=lengths,
            reverse=reverse, save=save,
        )  # fmt: skip
        return result

    output = xp.empty((T, B, H), dtype=h_0.dtype)
    saved = RNNSaved(output, lengths, reverse, nonlinearity) if save else None
    h = copy_as(h_0, h_0.dtype)
    arguments = gates, h, output, lengths, relu
    run(
        steps(gates, reverse),
        product(h, weight_hh.T, gates, add=True),
        elementwise("rnn", "rnn_forward", dtype, B, H, arguments),
    )
    return output, h, saved


def rnn_forwards(
    layout: Plan, gates: list[Array], h_0: list[Array], weight_hh: list[Array], *, nonlinearity: list[str],
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> list[tuple[Array, Array, RNNSaved | None]]:  # fmt: skip
    """Return for each direction of a launch what `rnn_forward` does; `reverse` is that of the first."""
    sides, results = [], []
    T, B, H = gates[0].shape
    for k, (a, h, weight, kind) in enumerate(zip(gates, h_0, weight_hh, nonlinearity, strict=True)):
        xp = namespace_of(a)
        output, h_n = xp.empty((T, B, H), dtype=h.dtype), xp.empty((B, H), dtype=h.dtype)
        sides.append(Side(weight, (h, output), (a, h, output, h_n)))
        results.append((output, h_n, RNNSaved(output, lengths, reverse != bool(k), kind) if save else None))
    relu = int(nonlinearity[0] == "relu")
    _persistent.there(layout, "rnn", sides, (T, B, H), lengths, reverse, (relu,))
    return results


def rnn_backward(saved: RNNSaved, weight_hh: Array, d_output: Array, d_h_n: Array) -> tuple[Array, Array]:
    """Return d_gates (T, B, H) and d_h_0 (B, H)."""
    output, lengths, reverse, nonlinearity = saved
    xp, dtype = namespace_of(output), name_of(d_output.dtype)
    (T, B, H), wide = output.shape, wide_of(d_output.dtype)
    layout = _persistent.chosen("rnn", True, dtype, T, B, H)
    if layout is not None:
        return rnn_backwards(layout, [saved], [weight_hh], [d_output], [d_h_n])[0]

    d_gates, relu = xp.empty((T, B, H), dtype=wide), int(nonlinearity == "relu")
    d_h = copy_as(d_h_n, wide)
    arguments = output, d_gates, d_h, d_output, lengths, relu
    run(
        steps(output, not reverse),
        elementwise("rnn", "rnn_backward", dtype, B, H, arguments),
        product(d_gates, xp.astype(weight_hh, wide, copy=False), d_h, add=True),
    )
    return d_gates, xp.astype(d_h, d_h_n.dtype, copy=False)


def rnn_backwards(
    layout: Plan, saved: list[RNNSaved], weight_hh: list[Array], d_output: list[Array], d_h_n: list[Array]
) -> list[tuple[Array, Array]]:
    """Return for each direction of a launch what `rnn_backward` does."""
    sides, results = [], []
    wide = wide_of(d_output[0].dtype)
    for one, weight, d_y, d_h in zip(saved, weight_hh, d_output, d_h_n, strict=True):
        xp = namespace_of(d_h)
        d_gates, d_h_0 = xp.empty(one.output.shape, dtype=wide), xp.empty(d_h.shape, dtype=d_h.dtype)
        sides.append(Side(weight, (), (one.output, d_gates, d_y, d_h, d_h_0)))
        results.append((d_gates, d_h_0))
    shape, (_, lengths, reverse, nonlinearity) = d_output[0].shape, saved[0]
    relu = int(nonlinearity == "relu")
    _persistent.back(layout, "rnn", sides, shape, lengths, reverse, (relu,))
    return results
