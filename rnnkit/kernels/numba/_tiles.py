"""How the work of a scan is cut and handed to threads, and what a compiled scan is given."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import _blas, _input, _pieces, _team
from ._atomic import POSSIBLE
from ._simd import REGISTER_BYTES
from ._threads import helped, run_tiles, thread_limit

Float = np.ndarray[Any, np.dtype[Any]]
Index = np.ndarray[Any, np.dtype[np.int64]]

# Multiplications below which a call stays on its thread. An LSTM's forward on one thread / two (Zen 3,
# medians, us): 454 / 487 with 6.6 million (100, 2, 64), 440 / 447 with 7.9 (30, 8, 64), 513 / 512 with
# 13 (100, 4, 64), where training gains already: 1768 / 1477.
_SMALL = 10_000_000
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
# Rows of the input that are multiplied at once, if the steps of so many are left. One thread of a Zen 3,
# float32, GFLOP/s of the product by rows 32 / 64 / 128 / 256: 90 / 91 / 92 / 88 with (128, 512) weights, 91 /
# 93 / 93 / 93 with (256, 1024), 90 / 91 / 93 / 83 with (512, 2048), 74 / 83 / 89 / 89 with (1024, 4096).
_CHUNK_ROWS = 128
# Numbers in the input weights from which BLAS multiplies all rows at once, and its product is read back. An
# LSTM's forward, BLAS / in the scan (Zen 3, one thread, ms, minima): 98 / 77 with (1024, 256) weights and 64
# sequences, 46 / 44 with (1536, 384) and 32, 165 / 176 with (2048, 512) and 64; two threads 24 / 37 with
# (4096, 1024) and 1.
_LARGE_INPUT = 1 << 19
# Steps of a chunk where threads share them: a helper that comes late for one chunk has its part of the next.
_SHARED_CHUNK = 16

_NO_TEAM, _NO_INDEX = np.empty(0, np.int64), np.empty(0, np.int64)


class Source(NamedTuple):
    """Where a forward scan gets the input's share of the gates from.

    Attributes
    ----------
    rows : array (..., I), or with no weight (..., G*H)
    places : array (T, B) of int64, or None
        Which row each step reads; None means row t * B + b. Of what is padding any.
    weight_ih : array (G*H, I) or None
        None means that the rows are shares of the gates already, biases included.
    bias : array (G*H,) or None
    """

    rows: Float
    places: Index | None = None
    weight_ih: Float | None = None
    bias: Float | None = None

    @property
    def width(self) -> int:
        """How many numbers of a row are multiplied."""
        return 0 if self.weight_ih is None else self.weight_ih.shape[1]


class Tiles:
    """How the work is cut: into equal shares of the sequences, each with the same mix of lengths.

    If there are no more sequences than threads, or a lot of weights, into shares of the hidden units instead.
    """

    def __init__(self, T: int, B: int, H: int, columns: int, lengths: Index | None, width: int = 0):
        work = (T * B if lengths is None else int(lengths.sum())) * columns * (H + width)
        self._threads = thread_limit() if work > _SMALL else 1
        self._helpers = 0
        shared = self._threads >= B or H * columns > _LARGE_WEIGHT
        if shared and self._threads > 1 and B * H * columns > _SMALL_STEP and POSSIBLE:
            blocks = -(-H // (2 * REGISTER_BYTES // 8))
            self._helpers = min(self._threads, blocks) - 1
        tiles = 1 if self._helpers and B else min(self._threads, B)
        if lengths is None:
            self._orders, self._steps = _even(T, B, tiles)
        else:
            order = np.argsort(-lengths, kind="stable")
            self._orders = [order[k::tiles].copy() for k in range(tiles)]
            self._steps = [lengths[part] for part in self._orders]
        lanes = 2 * REGISTER_BYTES // 4  # of float32; float64 has half of them
        # Of a scan back: d_z twice, and two states, every row up to two vectors longer than it is.
        self._room = 2 * B * (columns + H + 4 * lanes)
        self._T, self._B, self._H, self._gates = T, B, H, columns // H if H else 0

    def given(self, source: Source) -> tuple[Any, ...]:
        """Return the `source` that a forward scan takes, as `_input` describes it, and the bias."""
        rows, index, weight, bias = source
        if weight is not None and weight.size > _LARGE_INPUT:
            if index is not None and rows.shape[0] > index.size:
                rows, index = rows[index], None
            rows, weight = _blas.matmul(rows.reshape(-1, source.width), weight.T), None
        (values,), width = flat(rows), 0 if weight is None else source.width
        most = max((order.size for order in self._orders), default=1)
        chunk = max(1, min(self._T, _SHARED_CHUNK if self._helpers else self._T, _CHUNK_ROWS // most))
        if self._helpers:
            lanes = 2 * REGISTER_BYTES // values.itemsize
            self._room = _input.room_of(self._B, self._gates, self._H, width, chunk, lanes)
        where = _NO_INDEX if index is None else flat(index)[0]
        if bias is None:
            bias = np.zeros(self._gates * self._H, values.dtype)
        panels = values[:0] if weight is None else self.pack_forward(weight)
        return (values, where, panels, width, chunk), *flat(bias)

    def pack_forward(self, weight: Float) -> Float:
        """Return the transposed weights (G*H, K) as panels."""
        sizes = self._gates, self._H, weight.shape[1]
        return self._pack(_pieces.pack_forward, weight, sizes, self._gates * weight.shape[1])

    def pack_backward(self, weight_hh: Float) -> Float:
        """Return the weights (K, H) as panels."""
        return self._pack(_pieces.pack_backward, weight_hh, weight_hh.shape, weight_hh.shape[0])

    def _pack(self, pack: Any, weight: Float, sizes: tuple[int, ...], depth: int) -> Float:
        """Return a panel (depth, lanes) for each block of columns, packed on threads where it is worth it."""
        lanes = 2 * REGISTER_BYTES // weight.itemsize
        blocks = -(-self._H // lanes)
        panels, (values,) = aligned(blocks * depth * lanes, weight.dtype), flat(weight)
        parts = min(self._threads, blocks) if weight.size > _SMALL_WEIGHT else 1
        bounds = [blocks * k // parts for k in range(parts + 1)]
        run_tiles(lambda k: pack(values, *sizes, panels, bounds[k], bounds[k + 1]), parts, parts)
        return panels

    def run(self, scan: Any, *args: Any) -> None:
        """Run the compiled scan on all tiles."""
        if not self._helpers:
            run_tiles(
                lambda k: scan(self._orders[k], self._steps[k], *args, _NO_TEAM, args[1][:0], True),
                len(self._orders), self._threads,
            )  # fmt: skip
            return
        team, shared = _team.new_team(), aligned(self._room, args[1].dtype)
        given = (self._orders[0], self._steps[0], *args, team, shared)
        with helped(self._helpers, lambda: scan(*given, False), lambda: _team.dissolve(team)):
            scan(*given, True)


@lru_cache(maxsize=64)
def _even(T: int, B: int, tiles: int) -> tuple[list[Index], list[Index]]:
    """Return the order and the steps of each tile of sequences that are all T steps long."""
    order = np.arange(B)
    orders = [order[B * k // tiles : B * (k + 1) // tiles] for k in range(tiles)]
    return orders, [np.full(part.size, T) for part in orders]


def flat(*arrays: Float) -> list[Float]:
    """Return 1-D views, as the compiled code takes them, and copies of what cannot be written to.

    Such an array would be of another type for numba, and every mixture of types be compiled anew.
    """
    return [(a if a.flags.writeable else a.copy()).reshape(-1) for a in arrays]


def aligned(size: int, dtype: np.dtype[Any]) -> Float:
    """Return room for that many numbers, at the start of a cache line."""
    room = np.empty(size + 64 // dtype.itemsize, dtype)
    skip = -room.__array_interface__["data"][0] % 64 // dtype.itemsize  # faster than .ctypes.data
    return room[skip : skip + size]
