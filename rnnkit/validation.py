"""The checks of what users pass in: once, in the public layer. Kernels trust what comes through here.

A message names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from ._array import Backend, is_integer, namespace_of
from ._random import fresh_seed
from ._typing import Array


def check_dtype(argument: str, array: Array, backend: Backend, dtype: str) -> None:
    """Raise TypeError unless `array` has the dtype of that name: precision never changes silently."""
    if array.dtype != backend.dtype(dtype):
        raise TypeError(f"{argument} must have dtype {dtype}, got {array.dtype}")


# In place of a seed: the parameters are about to be replaced, so none need be drawn.
NO_SEED: Any = object()


def resolve_seed(seed: int | None) -> int:
    """Return the user's seed, or a fresh one for None; `NO_SEED` stays what it is.

    Raises
    ------
    TypeError
        It is no integer.
    """
    if seed is None:
        return fresh_seed()
    if seed is NO_SEED:
        return NO_SEED
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    return int(seed)


def check_size(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int of at least `least`.

    Raises
    ------
    TypeError, ValueError
        It is no integer, or too small.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_probability(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1].

    Raises
    ------
    TypeError, ValueError
        It is no number, or outside.
    """
    number = check_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return number


def check_number(name: str, value: Any) -> float:
    """Return `value`, any real number, as a float.

    Raises
    ------
    TypeError
        It is none.
    """
    if isinstance(value, (bool, np.bool)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_float(argument: str, value: Any, shape: tuple[int, ...], backend: Backend, dtype: str) -> Array:
    """Return `value` as an array of the backend after checking its shape and dtype."""
    array = backend.accept(value, argument)
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{argument} must have shape {tuple(shape)}, got {tuple(array.shape)}")
    check_dtype(argument, array, backend, dtype)
    return array


def check_tokens(argument: str, tokens: Array, size: int, on_host: bool) -> Array:
    """Return integer `tokens` as int64 after checking that they lie in [0, size).

    On a GPU their values are not read: that would stop the device for every batch.
    """
    xp = namespace_of(tokens)
    if not is_integer(tokens):
        raise TypeError(f"{argument} must be integers, got dtype {tokens.dtype}")
    # First of all: arithmetic in the user's own dtype could wrap around, or not exist.
    tokens = xp.astype(tokens, xp.int64, copy=False)
    if on_host and math.prod(tokens.shape):
        low, high = int(xp.min(tokens)), int(xp.max(tokens))
        if low < 0 or high >= size:
            raise ValueError(f"{argument} must lie in [0, {size}), got {low if low < 0 else high}")
    return tokens


def check_lengths(lengths: Any, backend: Backend, T: int, B: int) -> Array:
    """Return `lengths` as int64 (B,) on the backend after checking that they lie in [0, T].

    The values of lengths that are on a GPU are not read: that would stop the device for every batch.
    """
    if not backend.owns(lengths):
        if hasattr(lengths, "__dlpack__") and not isinstance(lengths, np.ndarray):
            lengths = backend.accept(lengths, "lengths")
        else:
            # Lists and NumPy arrays may come from the host whatever the backend: they are small, and
            # their values can be checked without stopping the device.
            lengths = np.asarray(lengths)
            if lengths.shape == (0,):
                lengths = lengths.astype(np.int64)
    xp = namespace_of(lengths)
    if not is_integer(lengths):
        raise TypeError(f"lengths must be integers, got dtype {lengths.dtype}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(f"lengths must have shape (B={B},), got {tuple(lengths.shape)}")
    # A copy in any case: kernels read it again on the way back, when the caller may have changed his own.
    lengths = xp.astype(lengths, xp.int64, copy=True)
    if B and (isinstance(lengths, np.ndarray) or backend.on_host):
        low, high = int(xp.min(lengths)), int(xp.max(lengths))
        if low < 0 or high > T:
            raise ValueError(f"lengths must lie in [0, T={T}], got {low if low < 0 else high}")
    if not backend.owns(lengths):
        return backend.asarray(lengths, "int64")
    return lengths


def padding_mask(T: int, lengths: Array) -> Array:
    """Return booleans (T, B), True where a sequence has a step."""
    xp = namespace_of(lengths)
    return xp.arange(T, dtype=lengths.dtype, device=lengths.device)[:, None] < lengths[None, :]


def zero_padding(x: Array, lengths: Array) -> Array:
    """Return x (T, B, ...) with zeros behind each sequence's end, whatever lies there, NaN included."""
    xp = namespace_of(x)
    mask = xp.reshape(padding_mask(x.shape[0], lengths), (*x.shape[:2], *(1 for _ in x.shape[2:])))
    # CuPy's where knows no bfloat16 and gives float32.
    return xp.astype(xp.where(mask, x, xp.zeros_like(x)), x.dtype, copy=False)
