"""Losses: each returns its value and its gradient from the same pass."""

from __future__ import annotations

import math
from typing import Any

from ._array import Backend, accumulation_dtype, backend_of, dtype_name, is_integer
from ._typing import Array
from .kernels import Case, kernels_for
from .validation import check_lengths, check_tokens, padding_mask


def softmax_cross_entropy(
    logits: Array, targets: Array, *, mask: Array | None = None, lengths: Any = None, gradient: bool = True
) -> tuple[Array, Any]:
    """Return the mean negative log-likelihood of the targets and its gradient.

    Parameters
    ----------
    logits : array (..., V)
        Unnormalised log-probabilities.
    targets : array (...) of integers in [0, V)
        Where they do not count, they may be anything.
    mask : array (...) of booleans, optional
        Which targets count.
    lengths : array or list of B integers in [0, T], optional
        Instead of a mask, for logits (T, B, V): the targets that count of each sequence.
    gradient : bool
        Whether the gradient is wanted, which takes as much memory as the logits.

    Returns
    -------
    loss : array ()
        In nats, the mean over the targets that count (0 if none does); on the logits' device.
    d_logits : array (..., V), or None where it is not wanted
        Zero where targets do not count.

    Raises
    ------
    ValueError
        Shapes do not fit, or a target that counts is out of range. A GPU's are not looked at: there the loss
        is NaN.
    TypeError
        Targets are not integers.
    """
    backend = backend_of(logits)
    with backend.active():
        return _softmax_cross_entropy(backend, logits, targets, mask, lengths, gradient)


def _softmax_cross_entropy(
    backend: Backend, logits: Array, targets: Any, mask: Any, lengths: Any, gradient: bool
) -> tuple[Array, Any]:
    xp, targets = backend.xp, backend.accept(targets, "targets")
    if logits.ndim < 1 or tuple(targets.shape) != tuple(logits.shape[:-1]):
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    if not is_integer(targets):
        raise TypeError(f"targets must be integers, got dtype {targets.dtype}")
    V = logits.shape[-1]
    targets = xp.astype(xp.reshape(targets, (-1,)), xp.int64, copy=False)
    counts = _counted(backend, mask, lengths, logits.shape[:-1])
    if math.prod(logits.shape) == 0:
        dtype = _accumulation(xp, logits)
        loss = xp.zeros((), dtype=dtype, device=logits.device)
        return loss, xp.zeros_like(logits) if gradient else None
    if backend.on_host:
        looked_at = targets if counts is None else xp.where(counts, targets, xp.zeros_like(targets))
        check_tokens("targets", looked_at, V, on_host=True)
    case = Case("softmax_cross_entropy", dtype_name(logits.dtype), 0, device=backend.name)
    kernel = kernels_for(backend.library, case)["softmax_cross_entropy"]
    loss, d_logits = kernel(xp.reshape(logits, (-1, V)), targets, counts, gradient)
    return loss, None if d_logits is None else xp.reshape(d_logits, logits.shape)


def mean_squared_error(
    prediction: Array, target: Array, *, mask: Array | None = None, lengths: Any = None
) -> tuple[Array, Array]:
    """Return the mean of (prediction - target)**2 and its gradient with respect to the prediction.

    Parameters
    ----------
    prediction, target : array (..., N)
        Of the same shape and dtype.
    mask : array (...) of booleans, optional
        Which vectors of N numbers count.
    lengths : array or list of B integers in [0, T], optional
        Instead of a mask, for a prediction (T, B, N).

    Returns
    -------
    loss : array ()
        The mean over all numbers that count (0 if none does); on the prediction's device.
    d_prediction : array (..., N)

    Raises
    ------
    ValueError
        Shapes differ.
    """
    backend = backend_of(prediction)
    with backend.active():
        return _mean_squared_error(backend, prediction, target, mask, lengths)


def _mean_squared_error(
    backend: Backend, prediction: Array, target: Any, mask: Any, lengths: Any
) -> tuple[Array, Array]:
    xp, target = backend.xp, backend.accept(target, "target")
    if prediction.ndim < 1 or tuple(target.shape) != tuple(prediction.shape):
        raise ValueError(f"target must have shape {tuple(prediction.shape)}, got {tuple(target.shape)}")
    N = prediction.shape[-1]
    dtype = _accumulation(xp, prediction)
    counts = _counted(backend, mask, lengths, prediction.shape[:-1])
    error = xp.reshape(xp.astype(prediction, dtype) - xp.astype(target, dtype), (-1, N))
    if math.prod(error.shape) == 0:
        return xp.zeros((), dtype=dtype, device=prediction.device), xp.zeros_like(prediction)
    loss, scale = _mean(xp, xp.mean(error * error, axis=-1), counts)
    d_prediction = _weighted(xp, 2.0 / N * error, counts, scale)
    return loss, xp.reshape(xp.astype(d_prediction, prediction.dtype, copy=False), prediction.shape)


def _counted(backend: Backend, mask: Any, lengths: Any, shape: tuple[int, ...]) -> Array | None:
    """Return which of the flattened positions count, or None for all."""
    if mask is not None and lengths is not None:
        raise ValueError("give mask or lengths, not both")
    if lengths is not None:
        if len(shape) != 2:
            raise ValueError(f"lengths needs a batch (T, B, .), got {len(shape) + 1} axes")
        mask = padding_mask(shape[0], check_lengths(lengths, backend, *shape))
    if mask is None:
        return None
    mask = backend.accept(mask, "mask")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    return backend.xp.reshape(backend.xp.astype(mask, backend.xp.bool, copy=False), (-1,))


def _mean(xp: Any, losses: Array, counts: Array | None) -> tuple[Array, Any]:
    """Return the mean over what counts and the weight 1/n of each, without reading n on the host."""
    if counts is None:
        return xp.mean(losses), 1.0 / losses.shape[0]
    losses = xp.where(counts, losses, xp.zeros_like(losses))
    n = xp.sum(xp.astype(counts, losses.dtype))
    n = xp.where(n > 0, n, xp.ones_like(n))
    return xp.sum(losses) / n, 1.0 / n


def _weighted(xp: Any, d: Array, counts: Array | None, scale: Any) -> Array:
    d = d * scale
    return d if counts is None else xp.where(counts[:, None], d, xp.zeros_like(d))


def _accumulation(xp: Any, array: Array) -> Any:
    return getattr(xp, accumulation_dtype(dtype_name(array.dtype)))
