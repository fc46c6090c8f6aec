"""Kernels for NumPy arrays on the CPU, compiled by numba: the fast path. Needs ``pip install "rnnkit[cpu]"``.

A call packs the recurrent weights once, cuts the batch into tiles, and gives every thread its tiles for
the whole sequence: sequences are independent, so no step waits for another thread. Within a tile a step is
a matrix product and then the gates of the same hidden units, while they are still in the L1 cache. The
result of a sequence does not depend on the tile it is in, and so not on the number of threads.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, NamedTuple

import numpy as np

from .._case import Case

try:
    from numba.core import event

    from . import _backward, _blas, _forward, _rows, _steps
    from ._threads import run_tiles, thread_limit
    from ._tiles import Source, Tiles, flat

    _missing: str | None = None
except ImportError as error:
    _missing = f'needs numba, which cannot be imported ({error}): pip install "rnnkit[cpu]"'

if _missing is None:

    class _Announcement(event.Listener):  # type: ignore[misc]
        """Says once that code is being compiled, so that nobody takes the seconds for a hang."""

        _made = False

        def on_start(self, event: Any) -> None:
            function = getattr(event.data["dispatcher"], "py_func", None)
            if self._made or not getattr(function, "__module__", "").startswith(__name__):
                return
            type(self)._made = True
            message = "rnnkit compiles its CPU kernels, once for this machine: seconds for each kind of layer"
            logging.getLogger("rnnkit").info(message)
            if sys.stderr is not None and sys.stderr.isatty():
                print(message, file=sys.stderr)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", _Announcement())

Float = np.ndarray[Any, np.dtype[Any]]
Index = np.ndarray[Any, np.dtype[np.int64]]

# Numbers below which the rows of a table are added up on one thread.
_SMALL_SUM = 1 << 18


def warmup() -> None:
    """Compile all functions, or load what was compiled before: float32 and float64, every cell."""
    for dtype in (np.float32, np.float64):
        state = np.zeros((1, 1), dtype)
        gates = {count: np.zeros((1, 1, count), dtype) for count in (1, 3, 4)}
        weight = {count: np.zeros((count, 1), dtype) for count in (1, 3, 4)}
        *_, lstm = lstm_forward(gates[4], state, state, weight[4])
        *_, gru = gru_forward(gates[3], state, weight[3])
        *_, rnn = rnn_forward(gates[1], state, weight[1])
        assert lstm is not None
        assert gru is not None
        assert rnn is not None
        lstm_backward(lstm, weight[4], gates[1], state, state)
        gru_backward(gru, weight[3], gates[1], state)
        rnn_backward(rnn, weight[1], gates[1], state)
        embedding_backward(state, np.zeros(1, np.int64), 1)
        rnn_short(gates[1], state[None], weight[1], weight[1], gates[1][0, 0], gates[1][0, 0])
        gru_short(gates[1], state[None], weight[3], weight[3], gates[3][0, 0], gates[3][0, 0])
        lstm_short(gates[1], state[None], state[None], weight[4], weight[4], gates[4][0, 0], gates[4][0, 0])


def why_not(name: str, case: Case) -> str | None:
    """Say why this module cannot serve `case`, or None."""
    if _missing is not None:
        return _missing
    if case.dtype not in ("float32", "float64"):
        return f"has no {case.dtype}"
    if case.proj_size:
        return "has no projection"
    if name == "matmul" and not _blas.libraries():
        return "finds no BLAS library whose threads it could set"
    return None


# ---------------------------------------------------------------------------------------------- RNN


class RNNSaved(NamedTuple):
    """What `rnn_backward` needs: the output (T, B, H), which holds the states."""

    output: Float
    lengths: Index | None
    reverse: bool
    relu: bool


def rnn_forward(
    gates: Float, h_0: Float, weight_hh: Float, *, nonlinearity: str = "tanh",
    lengths: Index | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Float, Float, RNNSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs."""
    return _rnn(Source(gates), gates.shape[0], h_0, weight_hh, nonlinearity, lengths, reverse, save)


def rnn_layer(
    x: Float, h_0: Float, weight_hh: Float, *, weight_ih: Float | None = None, bias: Float | None = None,
    index: Index | None = None, nonlinearity: str = "tanh", lengths: Index | None = None,
    reverse: bool = False, save: bool = True,
) -> tuple[Float, Float, RNNSaved | None]:  # fmt: skip
    """Return what `rnn_forward` does, input projection included."""
    source, T = Source(x, index, weight_ih, bias), len(x if index is None else index)
    return _rnn(source, T, h_0, weight_hh, nonlinearity, lengths, reverse, save)


def _rnn(
    source: Source, T: int, h_0: Float, weight_hh: Float, nonlinearity: str, lengths: Index | None,
    reverse: bool, save: bool,
) -> tuple[Float, Float, RNNSaved | None]:  # fmt: skip
    B, H = h_0.shape
    output, h_n = np.empty((T, B, H), h_0.dtype), np.empty((B, H), h_0.dtype)
    tiles = Tiles(T, B, H, H, lengths, source.width)
    arrays = *flat(h_0), tiles.pack_forward(weight_hh), *flat(output, h_n)
    given, relu = tiles.given(source), nonlinearity == "relu"
    tiles.run(_forward.rnn_forward, *given, *arrays, T, B, H, relu, reverse)
    return output, h_n, RNNSaved(output, lengths, reverse, relu) if save else None


def rnn_backward(saved: RNNSaved, weight_hh: Float, d_output: Float, d_h_n: Float) -> tuple[Float, Float]:
    """Return d_gates (T, B, H) and d_h_0 (B, H)."""
    T, B, H = d_output.shape
    d_gates, d_h_0 = np.empty_like(d_output), np.empty_like(d_h_n)
    tiles = Tiles(T, B, H, H, saved.lengths)
    arrays = flat(saved.output, d_output, d_h_n), tiles.pack_backward(weight_hh), flat(d_gates, d_h_0)
    tiles.run(_backward.rnn_backward, *arrays[0], arrays[1], *arrays[2], T, B, H, saved.relu, saved.reverse)
    return d_gates, d_h_0


# --------------------------------------------------------------------------------------------- LSTM


class LSTMSaved(NamedTuple):
    """What `lstm_backward` needs: gates (T, B, 4H) after their nonlinearity, c_prev (T, B, H)."""

    gates: Float
    c_prev: Float
    lengths: Index | None
    reverse: bool


def lstm_forward(
    gates: Float, h_0: Float, c_0: Float, weight_hh: Float, *,
    lengths: Index | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Float, Float, Float, LSTMSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H), c_n (B, H) and what the backward scan needs."""
    return _lstm(Source(gates), gates, h_0, c_0, weight_hh, lengths, reverse, save)


def lstm_layer(
    x: Float, h_0: Float, c_0: Float, weight_hh: Float, *, weight_ih: Float | None = None,
    bias: Float | None = None, index: Index | None = None, lengths: Index | None = None,
    reverse: bool = False, save: bool = True,
) -> tuple[Float, Float, Float, LSTMSaved | None]:  # fmt: skip
    """Return what `lstm_forward` does, input projection included."""
    (B, H), T = h_0.shape, len(x if index is None else index)
    gates = np.empty((T, B if save else 0, 4 * H), h_0.dtype)
    return _lstm(Source(x, index, weight_ih, bias), gates, h_0, c_0, weight_hh, lengths, reverse, save)


def _lstm(
    source: Source, gates: Float, h_0: Float, c_0: Float, weight_hh: Float, lengths: Index | None,
    reverse: bool, save: bool,
) -> tuple[Float, Float, Float, LSTMSaved | None]:  # fmt: skip
    """Compute an LSTM's layer; the saved gates go to `gates`, which may be the source."""
    T, (B, H) = gates.shape[0], h_0.shape
    output, c_prev = (np.empty((T if kept else 0, B, H), h_0.dtype) for kept in (True, save))
    h_n, c_n = np.empty((B, H), h_0.dtype), np.empty((B, H), h_0.dtype)
    tiles = Tiles(T, B, H, 4 * H, lengths, source.width)
    arrays = *flat(h_0, c_0), tiles.pack_forward(weight_hh), *flat(output, h_n, c_n, gates, c_prev)
    tiles.run(_forward.lstm_forward, *tiles.given(source), *arrays, T, B, H, reverse, save)
    return output, h_n, c_n, LSTMSaved(gates, c_prev, lengths, reverse) if save else None


def lstm_backward(
    saved: LSTMSaved, weight_hh: Float, d_output: Float, d_h_n: Float, d_c_n: Float
) -> tuple[Float, Float, Float]:
    """Return d_gates (T, B, 4H), d_h_0 (B, H) and d_c_0 (B, H)."""
    T, B, H = d_output.shape
    d_h_0, d_c_0 = np.empty_like(d_h_n), np.empty_like(d_c_n)
    tiles = Tiles(T, B, H, 4 * H, saved.lengths)
    arrays = flat(saved.gates, saved.c_prev, d_output, d_h_n, d_c_n), tiles.pack_backward(weight_hh)
    tiles.run(_backward.lstm_backward, *arrays[0], arrays[1], *flat(d_h_0, d_c_0), T, B, H, saved.reverse)
    return saved.gates, d_h_0, d_c_0


# ---------------------------------------------------------------------------------------------- GRU


class GRUSaved(NamedTuple):
    """What `gru_backward` needs.

    gates (T, B, 3H) after their nonlinearity; recurrent_n (T, B, H), W_n h_{t-1} + b_hn; and h_0 (B, H) and
    output (T, B, H), which hold the states before each step.
    """

    gates: Float
    recurrent_n: Float
    h_0: Float
    output: Float
    lengths: Index | None
    reverse: bool


def gru_forward(
    gates: Float, h_0: Float, weight_hh: Float, *, bias_hn: Float | None = None,
    lengths: Index | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Float, Float, GRUSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs."""
    return _gru(Source(gates), gates, h_0, weight_hh, bias_hn, lengths, reverse, save)


def gru_layer(
    x: Float, h_0: Float, weight_hh: Float, *, weight_ih: Float | None = None, bias: Float | None = None,
    index: Index | None = None, bias_hn: Float | None = None, lengths: Index | None = None,
    reverse: bool = False, save: bool = True,
) -> tuple[Float, Float, GRUSaved | None]:  # fmt: skip
    """Return what `gru_forward` does, input projection included."""
    (B, H), T = h_0.shape, len(x if index is None else index)
    gates = np.empty((T, B if save else 0, 3 * H), h_0.dtype)
    return _gru(Source(x, index, weight_ih, bias), gates, h_0, weight_hh, bias_hn, lengths, reverse, save)


def _gru(
    source: Source, gates: Float, h_0: Float, weight_hh: Float, bias_hn: Float | None, lengths: Index | None,
    reverse: bool, save: bool,
) -> tuple[Float, Float, GRUSaved | None]:  # fmt: skip
    """Compute a GRU's layer; the saved gates go to `gates`, which may be the source."""
    T, (B, H) = gates.shape[0], h_0.shape
    output, recurrent_n = (np.empty((T if kept else 0, B, H), h_0.dtype) for kept in (True, save))
    h_n = np.empty((B, H), h_0.dtype)
    bias = np.zeros(H, h_0.dtype) if bias_hn is None else bias_hn
    tiles = Tiles(T, B, H, 3 * H, lengths, source.width)
    arrays = *flat(h_0, bias), tiles.pack_forward(weight_hh), *flat(output, h_n, gates, recurrent_n)
    tiles.run(_forward.gru_forward, *tiles.given(source), *arrays, T, B, H, reverse, save)
    return output, h_n, GRUSaved(gates, recurrent_n, h_0, output, lengths, reverse) if save else None


def gru_backward(
    saved: GRUSaved, weight_hh: Float, d_output: Float, d_h_n: Float
) -> tuple[Float, Float, Float]:
    """Return d_gates (T, B, 3H), d_h_0 (B, H) and d_recurrent_n (T, B, H)."""
    T, B, H = d_output.shape
    d_h_0 = np.empty_like(d_h_n)
    tiles = Tiles(T, B, H, 3 * H, saved.lengths)
    arrays = flat(saved.gates, saved.recurrent_n, saved.h_0, saved.output, d_output, d_h_n)
    tiles.run(
        _backward.gru_backward, *arrays, tiles.pack_backward(weight_hh), *flat(d_h_0), T, B, H, saved.reverse
    )
    return saved.gates, d_h_0, saved.recurrent_n


# --------------------------------------------------------------------------------- short sequences
#
# x (T, B, I), states (1, B, H) and the parameters must be writeable and in C order: another kind of array
# would be compiled anew. The weights are read once for each step of each sequence, so that where these are
# many the scans above are faster.


def rnn_short(
    x: Float, h_0: Float, weight_ih: Float, weight_hh: Float, bias_ih: Float, bias_hh: Float, *,
    nonlinearity: str = "tanh",
) -> tuple[Float, Float]:  # fmt: skip
    """Return output (T, B, H) and h_n (1, B, H)."""
    output, h = np.empty((x.shape[0], x.shape[1], weight_hh.shape[1]), x.dtype), h_0.copy()
    _steps.rnn_short(x, h, weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity == "relu", output)
    return output, h


def lstm_short(
    x: Float, h_0: Float, c_0: Float, weight_ih: Float, weight_hh: Float, bias_ih: Float, bias_hh: Float
) -> tuple[Float, Float, Float]:
    """Return output (T, B, H), h_n and c_n (1, B, H)."""
    output = np.empty((x.shape[0], x.shape[1], weight_hh.shape[1]), x.dtype)
    h, c = h_0.copy(), c_0.copy()
    _steps.lstm_short(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, output)
    return output, h, c


def gru_short(
    x: Float, h_0: Float, weight_ih: Float, weight_hh: Float, bias_ih: Float, bias_hh: Float
) -> tuple[Float, Float]:
    """Return output (T, B, H) and h_n (1, B, H)."""
    output, h = np.empty((x.shape[0], x.shape[1], weight_hh.shape[1]), x.dtype), h_0.copy()
    _steps.gru_short(x, h, weight_ih, weight_hh, bias_ih, bias_hh, output)
    return output, h


# ------------------------------------------------------------------------------- around the scans


def matmul(a: Float, b: Float, out: Float | None = None) -> Float:
    """Return a @ b for 2-D arrays, in `out` if given."""
    product: Float = _blas.matmul(a, b, out)
    return product


def embedding_backward(d_rows: Float, index: Index, num_rows: int) -> Float:
    """Return the gradient (num_rows, N) of the table whose rows `index` (M,) gave `d_rows` (M, N)."""
    N = d_rows.shape[1]
    total = np.zeros((num_rows, N), d_rows.dtype)
    rows, places, sums = flat(d_rows, np.ascontiguousarray(index), total)
    parts = min(thread_limit(), N) if d_rows.size > _SMALL_SUM else 1
    run_tiles(
        lambda k: _rows.add_rows(rows, places, sums, N, N * k // parts, N * (k + 1) // parts), parts, parts
    )
    return total
