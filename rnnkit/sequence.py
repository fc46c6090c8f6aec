"""The input of a recurrent layer: checked once, time first, and which of its rows are steps at all."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ._array import Backend, is_integer, namespace_of, to_numpy
from ._typing import Array
from .validation import check_dtype, check_lengths, check_tokens, zero_padding

# The share of live steps from which on they are not packed. LSTM, one thread of a Zen 3, time without over
# time with packing, forward and training, (T, B, I=H): half of them live 1.26 and 1.47 for (50, 32, 128),
# 1.35 and 1.38 for (50, 64, 256), 1.25 and 1.78 for (20, 64, 512); at 0.7 from 0.84 to 1.23, then about 1.
_DENSE = 0.75


class LiveRows:
    """The rows of a padded sequence (T, B, .), flattened to (T*B, .), that are steps of a sequence.

    Parameters
    ----------
    lengths : numpy.ndarray (B,)
    T : int
    backend : Backend
        Where the indices are to be.

    Attributes
    ----------
    index : array (n,)
        The rows, in ascending order.
    """

    def __init__(self, lengths: np.ndarray[Any, Any], T: int, backend: Backend):
        self._lengths, self._B, self._backend = lengths, len(lengths), backend
        self._shape = T, self._B
        self._host_index = np.flatnonzero(np.arange(T)[:, None] < lengths)
        self.index = backend.asarray(self._host_index, "int64")

    @cached_property
    def positions(self) -> Array:
        """Which of the live rows each step (T, B) is; 0 for padding."""
        positions = np.zeros(self._shape, np.int64)
        positions.flat[self._host_index] = np.arange(self._host_index.size)
        return self._moved(positions)

    def halves(self, reverse: bool) -> tuple[Any, Array, Any, Array]:
        """Tell the steps that follow another one of the scan from those that begin it.

        Returns
        -------
        later : slice or array
            Which live rows follow another step of their sequence.
        before : array
            The rows, of (T*B, .), of the steps before these.
        first : slice or array
            Which live rows begin a scan.
        sequence : array
            The sequences that these belong to.
        """
        return self._backward_halves if reverse else self._forward_halves

    @cached_property
    def _forward_halves(self) -> tuple[Any, Array, Any, Array]:
        begun = int(np.count_nonzero(self._lengths))  # the first so many rows are the steps t = 0
        before, sequence = self._host_index[begun:] - self._B, self._host_index[:begun]
        return slice(begun, None), self._moved(before), slice(begun), self._moved(sequence)

    @cached_property
    def _backward_halves(self) -> tuple[Any, Array, Any, Array]:
        t, b = np.divmod(self._host_index, self._B)
        begins = t == self._lengths[b] - 1
        later, first = np.flatnonzero(~begins), np.flatnonzero(begins)
        moved = [self._moved(part) for part in (later, self._host_index[later] + self._B, first, b[first])]
        return moved[0], moved[1], moved[2], moved[3]

    def _moved(self, index: np.ndarray[Any, Any]) -> Array:
        return self._backend.asarray(index, "int64")


class SequenceInput(NamedTuple):
    """A checked sequence, time first, and how its owner wants results laid out.

    Attributes
    ----------
    x : array (T, B, I), or integers (T, B)
        Where rows are not packed, zero behind each sequence's end.
    lengths : array (B,) of int64, or None
    live : LiveRows or None
        Given where large products are to be made of live rows alone.
    embedding : array (V, I) or None
        The vectors that integers stand for; one-hot vectors without it.
    batched, batch_first : bool
        The layout of the argument.
    has_state : bool
        Whether the initial state may be other than zero.
    """

    x: Array
    lengths: Array | None
    live: LiveRows | None
    embedding: Array | None
    batched: bool
    batch_first: bool
    has_state: bool

    def time_first(self, array: Array) -> Array:
        """Bring an array that is laid out like the argument into the order (T, B, ...)."""
        if not self.batched:
            return array[:, None, ...]
        if self.batch_first:
            return namespace_of(array).permute_dims(array, (1, 0, *range(2, array.ndim)))
        return array

    def as_given(self, array: Array) -> Array:
        """Bring (T, B, N) into the layout of the argument."""
        if not self.batched:
            return array[:, 0, ...]
        if self.batch_first:
            return namespace_of(array).permute_dims(array, (1, 0, *range(2, array.ndim)))
        return array

    def given_shape(self, features: int) -> tuple[int, ...]:
        """Return the shape of an array with `features` numbers a step in the layout of the argument."""
        T, B = self.x.shape[:2]
        if not self.batched:
            return (T, features)
        return (B, T, features) if self.batch_first else (T, B, features)


def check_sequence(
    x: Any, lengths: Any, embedding: Any, backend: Backend, dtype: str, input_size: int, batch_first: bool,
    has_state: bool,
) -> SequenceInput:  # fmt: skip
    """Check the input of a recurrent layer: floats (T, B, I), or integers (T, B)."""
    x = backend.accept(x, "x")
    tokens = is_integer(x)
    rank = x.ndim + tokens
    if rank not in (2, 3) or (not tokens and x.shape[-1] != input_size):
        axes = "B, T" if batch_first else "T, B"
        wanted = f"({axes}) of integers" if tokens else f"({axes}, input_size={input_size})"
        raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
    if not tokens:
        check_dtype("x", x, backend, dtype)
    if embedding is not None:
        embedding = check_embedding(embedding, tokens, backend, dtype, input_size)
    batched = rank == 3
    given = SequenceInput(x, None, None, embedding, batched, batch_first and batched, has_state)
    x = given.time_first(x)
    T, B = x.shape[:2]
    if T == 0:
        raise ValueError(f"x must have at least one time step, got shape {tuple(given.x.shape)}")
    live = None
    if lengths is not None:
        if not batched:
            raise ValueError("lengths needs a batch: x without one has no padding")
        lengths = check_lengths(lengths, backend, T, B)
        live = live_rows(lengths, T, backend)
        if live is None or tokens:
            x = zero_padding(x, lengths)
    if tokens:
        size = input_size if embedding is None else embedding.shape[0]
        x = check_tokens("x", x, size, backend.on_host)
    return given._replace(x=x, lengths=lengths, live=live)


def check_embedding(embedding: Any, tokens: bool, backend: Backend, dtype: str, input_size: int) -> Array:
    """Check the vectors (V, I) that integer input stands for."""
    if not tokens:
        raise ValueError("embedding needs x of integers: the rows of embedding that they stand for")
    embedding = backend.accept(embedding, "embedding")
    if embedding.ndim != 2 or embedding.shape[1] != input_size:
        shape = tuple(embedding.shape)
        raise ValueError(f"embedding must have shape (V, input_size={input_size}), got {shape}")
    check_dtype("embedding", embedding, backend, dtype)
    return embedding


def live_rows(lengths: Array, T: int, backend: Backend) -> LiveRows | None:
    """Return the live rows if they are so few that packing them pays, and None otherwise.

    On a GPU their number is not known without stopping it: there they never are packed.
    """
    if not backend.on_host:
        return None
    on_host = to_numpy(lengths)
    if on_host.sum() > _DENSE * T * len(on_host):
        return None
    return LiveRows(on_host, T, backend)
