"""Random numbers that are the same on every array library: a counter-based integer hash.

Element number k of the stream (seed, label) is a function of those three alone. So initial weights and
dropout masks do not depend on the backend, the device, or on what was drawn before.

The hash is `lowbias32` in the variant of least measured bias: C. Wellons, "Prospecting for Hash
Functions" (2018) and its successors, https://github.com/skeeto/hash-prospector (public domain).
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import numpy as np

from ._typing import Array, Namespace

_MASK = 0xFFFFFFFF


def fresh_seed() -> int:
    """Return a seed from the operating system, for callers who gave none."""
    return int.from_bytes(os.urandom(4), "little")


def derive_seed(seed: int, label: str) -> int:
    """Return the seed of a part, independent of those of other parts and of the whole's own streams."""
    return int.from_bytes(hashlib.blake2s(f"{seed}//{label}".encode(), digest_size=8).digest(), "little")


def random_bits(xp: Namespace, size: int, seed: int, label: str, device: Any = None) -> Array:
    """Return `size` independent uniform integers in [0, 2**32), as int64.

    Parameters
    ----------
    xp, device
        Where the result lies.
    size : int
        How many.
    seed : int
        The user's seed.
    label : str
        What they are for: streams of different labels are independent.
    """
    digest = hashlib.blake2s(f"{seed}/{label}".encode(), digest_size=8).digest()
    low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    counter = xp.arange(size, dtype=xp.int64, device=device)
    return _mix(_mix((counter & _MASK) ^ low) ^ (counter >> 32) ^ high)


def uniform(xp: Namespace, size: int, seed: int, label: str, device: Any = None) -> Array:
    """Return `size` uniform numbers in [0, 1) as float64, multiples of 2**-24 and so exact in float32."""
    bits = random_bits(xp, size, seed, label, device)
    return xp.astype(bits >> 8, xp.float64) * 2.0**-24


def permutation(size: int, seed: int, label: str) -> np.ndarray[Any, Any]:
    """Return 0 .. size-1 in random order, on the host."""
    return np.argsort(random_bits(np, size, seed, label), kind="stable")


def dropout_scale(like: Array, xp: Namespace, p: float, seed: int, label: str) -> Array:
    """Return what inverted dropout multiplies `like` by: 0 with probability `p`, else 1 / (1 - p)."""
    bits = random_bits(xp, math.prod(like.shape), seed, label, like.device)
    # Compared as integers, so that every backend draws the line at the same place.
    keep = xp.astype(xp.reshape(bits >= round(p * 2**32), like.shape), like.dtype)
    return keep * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def _mix(x: Array) -> Array:
    x = _multiply(x ^ (x >> 16), 0x21F0AAAD)
    x = _multiply(x ^ (x >> 15), 0xD35A2D97)
    return x ^ (x >> 15)


def _multiply(x: Array, constant: int) -> Array:
    """Return x * constant modulo 2**32, in two halves: no product leaves int64's range."""
    upper = (x * (constant >> 16)) & 0xFFFF
    return (upper * 65536 + x * (constant & 0xFFFF)) & _MASK
