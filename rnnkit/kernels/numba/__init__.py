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

    from . import _blas, _pieces, _rows, _scans, _steps, _team
    from ._atomic import POSSIBLE
    from ._simd import REGISTER_BYTES
    from ._threads import helped, run_tiles, thread_limit

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

    _NO_TEAM = np.empty(0, np.int64)
    event.register("numba:compile", _Announcement())

Float = np.ndarray[Any, np.dtype[Any]]
Index = np.ndarray[Any, np.dtype[np.int64]]

# Multiplications below which a call stays on its thread: 3.3 million (an LSTM, T=100, B=2, H=64) took 150
# microseconds on one thread and 230 on two, on a busy machine. To be measured again on an idle one.
_SMALL = 4_000_000
# Multiplications of one time step below which threads do not share it. An LSTM's forward scan of 100 steps
# on one thread / shared by two (Zen 3, ms): 0.59 / 0.69 with 66 thousand (B=1, H=128), 0.86 / 0.78 with 131
# (B=2, H=128), 2.2 / 1.5 with 262 (B=1, H=256).
_SMALL_STEP = 100_000
# Numbers in the recurrent weights from which threads share each step of any batch: each panel then goes
# through the third-level cache for one thread only. An LSTM's forward scan of 50 steps, B=16, tiles / shared
# steps (Zen 3, two threads, ms): 43 / 41 at H=768, 70 / 49 at H=896.
_LARGE_WEIGHT = 3 << 20
# Numbers in the recurrent weights below which one thread packs them. Those of an LSTM take one thread / two
# 0.60 / 0.62 ms at H=512, and 4.3 / 2.3 at H=1024.
_SMALL_WEIGHT = 2 << 20

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
    T, B, H = gates.shape
    output, h_n = np.empty((T, B, H), gates.dtype), np.empty((B, H), gates.dtype)
    tiles = _Tiles(T, B, H, H, lengths)
    arrays = _flat(gates, h_0), tiles.pack_forward(weight_hh, 1), _flat(output, h_n)
    tiles.run(_scans.rnn_forward, *arrays[0], arrays[1], *arrays[2], T, B, H, nonlinearity == "relu", reverse)
    return output, h_n, RNNSaved(output, lengths, reverse, nonlinearity == "relu") if save else None


def rnn_backward(saved: RNNSaved, weight_hh: Float, d_output: Float, d_h_n: Float) -> tuple[Float, Float]:
    """Return d_gates (T, B, H) and d_h_0 (B, H)."""
    T, B, H = d_output.shape
    d_gates, d_h_0 = np.empty_like(d_output), np.empty_like(d_h_n)
    tiles = _Tiles(T, B, H, H, saved.lengths)
    arrays = _flat(saved.output, d_output, d_h_n), tiles.pack_backward(weight_hh), _flat(d_gates, d_h_0)
    tiles.run(_scans.rnn_backward, *arrays[0], arrays[1], *arrays[2], T, B, H, saved.relu, saved.reverse)
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
    T, B, H = gates.shape[0], gates.shape[1], gates.shape[2] // 4
    output, c_prev = (np.empty((T if kept else 0, B, H), gates.dtype) for kept in (True, save))
    h_n, c_n = np.empty((B, H), gates.dtype), np.empty((B, H), gates.dtype)
    tiles = _Tiles(T, B, H, 4 * H, lengths)
    arrays = _flat(gates, h_0, c_0), tiles.pack_forward(weight_hh, 4), _flat(output, h_n, c_n, c_prev)
    tiles.run(_scans.lstm_forward, *arrays[0], arrays[1], *arrays[2], T, B, H, reverse, save)
    return output, h_n, c_n, LSTMSaved(gates, c_prev, lengths, reverse) if save else None


def lstm_backward(
    saved: LSTMSaved, weight_hh: Float, d_output: Float, d_h_n: Float, d_c_n: Float
) -> tuple[Float, Float, Float]:
    """Return d_gates (T, B, 4H), d_h_0 (B, H) and d_c_0 (B, H)."""
    T, B, H = d_output.shape
    d_h_0, d_c_0 = np.empty_like(d_h_n), np.empty_like(d_c_n)
    tiles = _Tiles(T, B, H, 4 * H, saved.lengths)
    arrays = _flat(saved.gates, saved.c_prev, d_output, d_h_n, d_c_n), tiles.pack_backward(weight_hh)
    tiles.run(_scans.lstm_backward, *arrays[0], arrays[1], *_flat(d_h_0, d_c_0), T, B, H, saved.reverse)
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
    T, B, H = gates.shape[0], gates.shape[1], gates.shape[2] // 3
    output, recurrent_n = (np.empty((T if kept else 0, B, H), gates.dtype) for kept in (True, save))
    h_n = np.empty((B, H), gates.dtype)
    bias = np.zeros(H, gates.dtype) if bias_hn is None else bias_hn
    tiles = _Tiles(T, B, H, 3 * H, lengths)
    arrays = _flat(gates, h_0, bias), tiles.pack_forward(weight_hh, 3), _flat(output, h_n, recurrent_n)
    tiles.run(_scans.gru_forward, *arrays[0], arrays[1], *arrays[2], T, B, H, reverse, save)
    return output, h_n, GRUSaved(gates, recurrent_n, h_0, output, lengths, reverse) if save else None


def gru_backward(
    saved: GRUSaved, weight_hh: Float, d_output: Float, d_h_n: Float
) -> tuple[Float, Float, Float]:
    """Return d_gates (T, B, 3H), d_h_0 (B, H) and d_recurrent_n (T, B, H)."""
    T, B, H = d_output.shape
    d_h_0 = np.empty_like(d_h_n)
    tiles = _Tiles(T, B, H, 3 * H, saved.lengths)
    arrays = _flat(saved.gates, saved.recurrent_n, saved.h_0, saved.output, d_output, d_h_n)
    tiles.run(
        _scans.gru_backward, *arrays, tiles.pack_backward(weight_hh), *_flat(d_h_0), T, B, H, saved.reverse
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
    rows, places, sums = _flat(d_rows, np.ascontiguousarray(index), total)
    parts = min(thread_limit(), N) if d_rows.size > _SMALL_SUM else 1
    run_tiles(
        lambda k: _rows.add_rows(rows, places, sums, N, N * k // parts, N * (k + 1) // parts), parts, parts
    )
    return total


# ------------------------------------------------------------------------------------------- pieces


class _Tiles:
    """How the work is cut: into equal shares of the sequences, each with the same mix of lengths.

    If there are no more sequences than threads, or a lot of weights, into shares of the hidden units instead.
    """

    def __init__(self, T: int, B: int, H: int, columns: int, lengths: Index | None):
        work = (T * B if lengths is None else int(lengths.sum())) * H * columns
        self._threads = thread_limit() if work > _SMALL else 1
        self._helpers = 0
        shared = self._threads >= B or H * columns > _LARGE_WEIGHT
        if shared and self._threads > 1 and B * H * columns > _SMALL_STEP and POSSIBLE:
            blocks = -(-H // (2 * REGISTER_BYTES // 8))
            self._helpers = min(self._threads, blocks) - 1
        tiles = 1 if self._helpers and B else min(self._threads, B)
        if lengths is None and tiles == 1:
            self._orders, self._steps = [np.arange(B)], [np.array([T] * B)]
        elif lengths is None:
            order = np.arange(B)
            self._orders = [order[B * k // tiles : B * (k + 1) // tiles] for k in range(tiles)]
            self._steps = [np.full(part.size, T) for part in self._orders]
        else:
            order = np.argsort(-lengths, kind="stable")
            self._orders = [order[k::tiles].copy() for k in range(tiles)]
            self._steps = [lengths[part] for part in self._orders]
        lanes = 2 * REGISTER_BYTES // 4  # of float32; float64 has half of them
        # h or d_z twice, and two states more, every row up to two vectors longer than it is.
        self._room = 2 * B * (columns + H + 4 * lanes)

    def pack_forward(self, weight_hh: Float, gates: int) -> Float:
        """Return the transposed weights (gates * H, H) as panels."""
        H = weight_hh.shape[1]
        return self._pack(_pieces.pack_forward, weight_hh, (gates, H), gates * H)

    def pack_backward(self, weight_hh: Float) -> Float:
        """Return the weights (K, H) as panels."""
        return self._pack(_pieces.pack_backward, weight_hh, weight_hh.shape, weight_hh.shape[0])

    def _pack(self, pack: Any, weight: Float, sizes: tuple[int, ...], depth: int) -> Float:
        """Return a panel (depth, lanes) for each block of columns, packed on threads where it is worth it."""
        blocks, lanes = _blocks(weight.shape[1], weight.dtype)
        panels, (flat,) = _aligned(blocks * depth * lanes, weight.dtype), _flat(weight)
        parts = min(self._threads, blocks) if weight.size > _SMALL_WEIGHT else 1
        run_tiles(
            lambda k: pack(flat, *sizes, panels, blocks * k // parts, blocks * (k + 1) // parts), parts, parts
        )
        return panels

    def run(self, scan: Any, *args: Any) -> None:
        """Run the compiled scan on all tiles."""
        if not self._helpers:
            run_tiles(
                lambda k: scan(self._orders[k], self._steps[k], *args, _NO_TEAM, args[2][:0], True),
                len(self._orders), self._threads,
            )  # fmt: skip
            return
        team, shared = _team.new_team(), _aligned(self._room, args[2].dtype)
        given = (self._orders[0], self._steps[0], *args, team, shared)
        with helped(self._helpers, lambda: scan(*given, False), lambda: _team.dissolve(team)):
            scan(*given, True)


def _flat(*arrays: Float) -> list[Float]:
    """Return 1-D views, as the compiled code takes them, and copies of what cannot be written to.

    Such an array would be of another type for numba, and every mixture of types be compiled anew.
    """
    return [(a if a.flags.writeable else a.copy()).reshape(-1) for a in arrays]


def _blocks(H: int, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return how many blocks hold H hidden units, and how many each holds."""
    lanes = 2 * REGISTER_BYTES // dtype.itemsize
    return -(-H // lanes), lanes


def _aligned(size: int, dtype: np.dtype[Any]) -> Float:
    """Return room for that many numbers, at the start of a cache line."""
    room = np.empty(size + 64 // dtype.itemsize, dtype)
    skip = -room.__array_interface__["data"][0] % 64 // dtype.itemsize  # faster than .ctypes.data
    return room[skip : skip + size]
