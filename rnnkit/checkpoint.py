"""Models in files: safetensors, with the configuration in the metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._array import FLOAT_DTYPES, dtype_name, resolve_backend, to_numpy
from ._version import __version__
from .layers import Embedding, Linear
from .model import LanguageModel
from .parameters import Layer
from .recurrent import GRU, LSTM, RNN
from .validation import NO_SEED

_CLASSES: dict[str, type[Layer]] = {
    cls.__name__: cls for cls in (RNN, LSTM, GRU, Linear, Embedding, LanguageModel)
}
_FORMAT = "rnnkit"

HostArrays = dict[str, np.ndarray[Any, Any]]


def save(model: Layer, path: str | Path) -> None:
    """Write a model's parameters and configuration into one safetensors file.

    Parameters
    ----------
    model : LanguageModel, RNN, LSTM, GRU, Linear or Embedding
    path : path
        An existing file is replaced at once and as a whole: a crash leaves the old one or the new one.

    Raises
    ------
    OSError
        The file cannot be written.

    Notes
    -----
    Tensors have torch's names, so that other tools can read them. bfloat16 is stored as float32, exactly.
    """
    write(path, host_params(model), describe(model))


def load(path: str | Path, *, backend: Any = None, dtype: Any = None) -> Any:
    """Read a model that `save` wrote, onto any backend.

    Parameters
    ----------
    path : path
    backend : str or module, optional
        As in `LSTM`.
    dtype : str, optional
        By default the one it was saved in.

    Returns
    -------
    LanguageModel, RNN, LSTM, GRU, Linear or Embedding
        As it was saved.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        It is truncated or no safetensors file, is not rnnkit's, has missing or unknown parameters, or
        NaN or infinite values.
    """
    arrays, metadata = read(path)
    return rebuild(path, arrays, metadata, backend=backend, dtype=dtype)


def describe(model: Layer) -> dict[str, str]:
    """Return the metadata from which `rebuild` makes a model of the same configuration."""
    name = type(model).__name__
    if name not in _CLASSES:
        raise TypeError(f"save takes one of {', '.join(_CLASSES)}, got {name}")
    return {
        "format": _FORMAT,
        "version": __version__,
        "class": name,
        "config": json.dumps(model.config),
        "dtype": model.dtype,
    }


def host_params(model: Layer) -> HostArrays:
    """Return the parameters as NumPy arrays."""
    return {name: np.ascontiguousarray(to_numpy(value)) for name, value in model.params.items()}


def rebuild(
    path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str], *, backend: Any, dtype: Any
) -> Any:
    """Make the model that the metadata describe, with these parameters."""
    if metadata.get("format") != _FORMAT or metadata.get("class") not in _CLASSES:
        raise ValueError(f"{path} is a safetensors file, but no model that rnnkit saved")
    where = resolve_backend(backend)  # before the try: what the caller got wrong is not the file's fault
    dtype = dtype or metadata.get("dtype")
    if dtype in FLOAT_DTYPES or dtype != metadata.get("dtype"):
        where.dtype(dtype_name(dtype))
    try:
        config = json.loads(metadata["config"])
        model = _CLASSES[metadata["class"]](**config, backend=where, dtype=dtype, seed=NO_SEED)  # type: ignore[call-arg]
    except (KeyError, TypeError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path} has a configuration that this version cannot read: {error}") from error
    try:
        model.load_params(arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def write(path: str | Path, arrays: HostArrays, metadata: dict[str, str]) -> None:
    """Write a safetensors file so that a crash at any moment leaves the old file or the new one."""
    from safetensors.numpy import save as to_bytes

    replace(path, to_bytes(arrays, metadata))


def replace(path: str | Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[HostArrays, dict[str, str]]:
    """Return the arrays and the metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there or no file")
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
