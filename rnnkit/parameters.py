"""Parameters and gradients: one flat buffer each, seen through named views; how weights begin; `Layer`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np

from ._array import Backend, dtype_name, is_real, namespace_of, resolve_backend, to_numpy
from ._random import uniform
from ._typing import Array
from .kernels import Case, kernels_for
from .validation import NO_SEED

Shapes = Mapping[str, tuple[int, ...]]


class ParameterDict(dict[str, Array]):
    """A dict of arrays that are views of one flat buffer.

    Change a parameter in place (``params["bias_ih_l0"][...] = 0``) or all of them with `load_params`; an
    item cannot be replaced, because the layer would not see the new array.

    Attributes
    ----------
    flat : array (N,)
        All parameters, one after the other, in the order of the dict: what an optimiser works on.
    """

    def __init__(self, flat: Array, shapes: Shapes):
        self.flat = flat
        xp, start = namespace_of(flat), 0
        views = {}
        for name, shape in shapes.items():
            views[name] = xp.reshape(flat[start : start + math.prod(shape)], shape)
            start += math.prod(shape)
        super().__init__(views)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return {name: tuple(array.shape) for name, array in self.items()}

    def part(self, prefix: str) -> ParameterDict:
        """Return the parameters whose names begin with `prefix`, under the rest of their names.

        They are views of the same buffer and stand next to each other in it.
        """
        names = list(self)
        chosen = [name for name in names if name.startswith(prefix)]
        start = sum(math.prod(self[name].shape) for name in names[: names.index(chosen[0])])
        size = sum(math.prod(self[name].shape) for name in chosen)
        shapes = {name.removeprefix(prefix): tuple(self[name].shape) for name in chosen}
        return ParameterDict(self.flat[start : start + size], shapes)

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            "parameters cannot be replaced, added or removed; "
            "write into one (params[name][...] = value) or call load_params"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    pop = popitem = clear = update = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return ParameterDict, (self.flat, self.shapes)


class Gradients(NamedTuple):
    """What a pullback returns.

    Attributes
    ----------
    x : array or None
        Gradient of the input, in its shape; None for integer input, which has none.
    params : ParameterDict
        Gradients of the parameters, by the same names; ``params.flat`` is all of them in one vector.
    state : array, (array, array) or None
        Gradient of the initial state, in its form; None for a layer without one.
    """

    x: Any
    params: ParameterDict
    state: Any = None


def size_of(shapes: Shapes) -> int:
    """Return how many numbers parameters of these shapes have."""
    return sum(math.prod(shape) for shape in shapes.values())


def join(gradients: Mapping[str, Array], dtype: Any) -> ParameterDict:
    """Copy arrays into one flat buffer and return them as views of it."""
    xp = namespace_of(next(iter(gradients.values())))
    flat = xp.concat([xp.reshape(xp.astype(array, dtype, copy=False), (-1,)) for array in gradients.values()])
    return ParameterDict(flat, {name: tuple(array.shape) for name, array in gradients.items()})


def initial_uniform(shapes: Shapes, bound: float, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return each parameter uniform in [-bound, bound), the same on every machine and backend.

    torch's default for recurrent and linear layers, there with ``bound = 1 / sqrt(size)``.
    """
    if seed is NO_SEED:
        return {name: np.zeros(shape) for name, shape in shapes.items()}
    return {
        name: ((2.0 * uniform(np, math.prod(shape), seed, name) - 1.0) * bound).reshape(shape)
        for name, shape in shapes.items()
    }


def initial_normal(shapes: Shapes, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return each parameter standard normal, by the Box-Muller transform: torch's default for embeddings."""
    if seed is NO_SEED:
        return {name: np.zeros(shape) for name, shape in shapes.items()}
    result = {}
    for name, shape in shapes.items():
        u, v = uniform(np, 2 * math.prod(shape), seed, name).reshape(2, -1)
        # 1 - u lies in (0, 1], where the logarithm is finite.
        result[name] = (np.sqrt(-2.0 * np.log(1.0 - u)) * np.cos(2.0 * np.pi * v)).reshape(shape)
    return result


def create(backend: Backend, dtype: str, initial: Mapping[str, np.ndarray[Any, Any]]) -> ParameterDict:
    """Move initial values from the host into one flat buffer of the backend."""
    flat = np.concatenate([value.reshape(-1) for value in initial.values()])
    return ParameterDict(backend.asarray(flat, dtype), {name: value.shape for name, value in initial.items()})


def load_into(params: ParameterDict, values: Mapping[str, Any], backend: Backend, dtype: str) -> None:
    """Copy `values` into `params`; on any error nothing is changed.

    Raises
    ------
    ValueError
        Names are missing or unknown, a shape differs, or a value is NaN or infinite.
    TypeError
        A value is no array of floating-point numbers.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"load_params takes a mapping of names to arrays, got {type(values).__name__}")
    missing = [name for name in params if name not in values]
    unknown = [name for name in values if name not in params]
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing)
        parts += [f"unknown: {', '.join(map(str, unknown))}"] * bool(unknown)
        raise ValueError(f"parameters must be exactly {', '.join(params)}; {'; '.join(parts)}")
    checked = {}
    for name, parameter in params.items():
        value = values[name]
        if not backend.owns(value):
            value = np.asarray(value) if isinstance(value, (list, tuple, float)) else to_numpy(value)
        if tuple(value.shape) != tuple(parameter.shape):
            raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
        if not is_real(value):
            raise TypeError(f"{name} must hold floating-point numbers, got dtype {value.dtype}")
        with np.errstate(over="ignore"):  # what overflows in this dtype is found below
            if backend.owns(value):
                # A copy: the values may be views of these very parameters. A torch parameter is detached.
                value = value.detach() if backend.library == "torch" else value
                value = backend.xp.astype(value, parameter.dtype, copy=True)
            else:
                value = backend.asarray(value, dtype)
        if not bool(backend.xp.all(backend.xp.isfinite(value))):
            raise ValueError(f"{name} holds NaN or infinite values in {dtype}")
        checked[name] = value
    for name, parameter in params.items():
        parameter[...] = checked[name]


class Layer:
    """What every layer with parameters has: a backend, a dtype, named parameters, and a way to move them.

    Subclasses give `__init__` their configuration and the initial values; the configuration is what
    rebuilds the layer elsewhere: in `to`, in a pickle, in a file.
    """

    def __init__(self, config: Mapping[str, Any], backend: Any, dtype: Any):
        self._config = dict(config)
        self._backend = resolve_backend(backend)
        self._dtype = dtype_name(dtype)
        self._backend.dtype(self._dtype)
        self._matmul_case = Case("matmul", self._dtype, 0, device=self._backend.name)
        self._params: ParameterDict

    def _adopt(self, params: ParameterDict) -> None:
        """Take `params`, or views of a larger model's, as this layer's own."""
        self._params = params

    @property
    def params(self) -> ParameterDict:
        """The parameters by name: views of one flat buffer, ``params.flat``."""
        return self._params

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, but for backend, dtype and seed."""
        return dict(self._config)

    @property
    def backend(self) -> str:
        """The backend's name, such as ``"torch:cuda"``."""
        return self._backend.name

    @property
    def dtype(self) -> str:
        """The name of the parameters' dtype."""
        return self._dtype

    @property
    def num_params(self) -> int:
        """How many numbers the parameters have in all."""
        return size_of(self._params.shapes)

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Copy parameters in, for example a torch state dict.

        Parameters
        ----------
        params : mapping of str to array
            Exactly the names and shapes of `params`, in any floating-point dtype; arrays of this backend
            or of the host.

        Raises
        ------
        ValueError
            A name is missing or unknown, a shape differs, or a value is NaN or infinite.
        TypeError
            A value is no floating-point array.
            After either error nothing has changed.
        """
        with self._backend.active():
            load_into(self._params, params, self._backend, self._dtype)

    def asarray(self, values: Any) -> Array:
        """Move host values to this layer's backend and device.

        Parameters
        ----------
        values : array_like
            A NumPy array or a list on the host. Integers stay integers (int64: tokens, lengths); all
            else gets the layer's dtype.

        Returns
        -------
        array
            A new array of the backend.
        """
        host = to_numpy(values) if hasattr(values, "__dlpack__") else np.asarray(values)
        return self._backend.asarray(host, "int64" if host.dtype.kind in "iu" else self._dtype)

    def to(self, backend: Any = None, *, dtype: Any = None) -> Self:
        """Return a copy with the same numbers on another backend or in another dtype.

        Parameters
        ----------
        backend : str or module, optional
            As in the constructor; by default the same.
        dtype : str, optional
            By default the same.
        """
        moved: Self = _rebuild(
            type(self),
            self._config,
            backend or self._backend,
            dtype or self._dtype,
            to_numpy(self._params.flat),
        )
        return moved

    def _matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """Return a @ b for 2-D arrays, in the dtype that sums are kept in, or in `out`."""
        product: Array = kernels_for(self._backend.library, self._matmul_case)["matmul"](a, b, out)
        return product

    def __reduce__(self) -> tuple[Any, ...]:
        flat = to_numpy(self._params.flat)
        return _rebuild, (type(self), self._config, self._backend, self._dtype, flat)

    def __repr__(self) -> str:
        args = [f"{name}={value!r}" for name, value in self._config.items()]
        return f"{type(self).__name__}({', '.join(args)}, backend={self.backend!r}, dtype={self.dtype!r})"


def _rebuild(cls: Any, config: Mapping[str, Any], backend: Any, dtype: Any, flat: Any) -> Any:
    layer = cls(**config, backend=backend, dtype=dtype, seed=NO_SEED)
    with np.errstate(over="ignore"):
        moved = layer._backend.asarray(flat, layer.dtype)
    if np.all(np.isfinite(flat)) and not np.all(np.isfinite(to_numpy(moved))):
        raise ValueError(f"the parameters do not fit into {layer.dtype}: some would become infinite")
    with layer._backend.active():
        layer.params.flat[...] = moved
    return layer
