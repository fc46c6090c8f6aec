"""Where arrays live: from a backend's name to its Array API namespace and device.

The only module that imports array_api_compat or, by name, an array library (`_cuda` asks CuPy about its
machine). All of them load on first use: array_api_compat alone costs more than NumPy's fastest paths take,
and CuPy or torch may be missing.
NumPy (2.1 and later) needs no compatibility layer and gets none.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import numpy as np

from ._cuda import why_no_cupy
from ._typing import Array, DType, Namespace

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_HOST = (1, 0)  # DLPack's device number for CPU memory


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for is not installed, or has no device to run on."""


@dataclass(frozen=True, eq=False)
class Backend:
    """An array library and one of its devices.

    Attributes
    ----------
    name : str
        What `backend=` takes: ``"numpy"``, ``"cupy:1"``, ``"torch:cuda"``, or a module's name.
    xp : namespace
        The Array API namespace.
    device : object
        The library's own device object.
    array_type : type
        The class of its arrays.
    dlpack_device : (int, int)
        The same device in DLPack's numbers, which all libraries share.
    """

    name: str
    xp: Namespace
    device: Any
    array_type: type
    dlpack_device: tuple[int, int]

    def __reduce__(self) -> tuple[Any, ...]:
        # A module cannot be pickled, but its name can: a model travels to workers and through deepcopy.
        return _from_name, (self.name,)

    @cached_property
    def library(self) -> str:
        """The name without its device: what the kernels are chosen by."""
        return self.name.partition(":")[0]

    @property
    def on_host(self) -> bool:
        """Whether reading a value is free of a device synchronisation."""
        return self.dlpack_device[0] == _HOST[0]

    def active(self) -> AbstractContextManager[Any]:
        """Make this device the current one for a block; only CuPy has such a thing."""
        return self.device if self.library == "cupy" else nullcontext()

    def dtype(self, name: str) -> DType:
        """Return the library's dtype of that name, or raise TypeError."""
        dtype = getattr(self.xp, name, None)
        if dtype is None and name == "bfloat16" and self.library == "cupy":
            dtype = _bfloat16_of_cupy()
        if dtype is None:
            raise TypeError(f"dtype {name!r} does not exist in backend {self.name!r}")
        return dtype

    def asarray(self, values: Any, dtype: str | None = None) -> Array:
        """Move host values (a NumPy array, a list, a number) to this backend and device.

        The result never shares memory with `values`.
        """
        kind = None if dtype is None else self.dtype(dtype)
        with self.active():
            if self.library == "numpy":
                return np.array(values, dtype=kind, order="C")
            if isinstance(values, np.ndarray):
                # Some libraries refuse a read-only or negatively strided NumPy array.
                values = np.array(values, order="C")
            return self.xp.asarray(values, dtype=kind, device=self.device, copy=True)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return zeros on this device."""
        return self.xp.zeros(shape, dtype=self.dtype(dtype), device=self.device)

    def owns(self, value: Any) -> bool:
        """Whether `value` is an array of this library on this device."""
        if not isinstance(value, self.array_type):
            return False
        return self.library == "numpy" or _compat().device(value) == self.device

    def accept(self, value: Any, argument: str) -> Array:
        """Return `value` as an array of this backend without copying it.

        Raises
        ------
        TypeError
            It is no array, or it lies on another device: rnnkit does not copy between devices by itself.
        """
        if isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap):
            # A matrix multiplies differently, a masked array hides values: not what they look like.
            raise TypeError(
                f"{argument} must be a plain array, got {_kind(value)}: pass np.asarray({argument})"
            )
        if self.owns(value):
            if self.library == "torch" and value.requires_grad and self.xp.is_grad_enabled():
                raise TypeError(
                    f"{argument} requires grad, but rnnkit takes no part in torch's autograd: "
                    f"pass {argument}.detach() and take the gradient from vjp"
                )
            return value
        if not hasattr(value, "__dlpack_device__"):
            raise TypeError(
                f"{argument} must be an array of backend {self.name!r}, got {_kind(value)}; "
                f"asarray() of this object moves host values there"
            )
        there = tuple(int(part) for part in value.__dlpack_device__())
        if there != self.dlpack_device:
            call = "asarray(value)" if there[0] == _HOST[0] else "rnnkit.to_numpy(value)"
            if there[0] != _HOST[0] and not self.on_host:
                call = "asarray(rnnkit.to_numpy(value))"
            raise TypeError(
                f"{argument} must lie on the device of backend {self.name!r}, got {_kind(value)} elsewhere; "
                f"nothing is copied between devices unless you ask: {call}"
            )
        if isinstance(value, np.ndarray) and any(stride < 0 for stride in value.strides):
            # torch's DLPack import ends the process on these.
            raise TypeError(
                f"{argument} has negative strides, which cannot be shared with backend {self.name!r}: "
                f"pass np.ascontiguousarray({argument})"
            )
        try:
            with self.active():
                return self.xp.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{argument} ({_kind(value)}) cannot be shared with backend {self.name!r}: {error}"
            ) from error

    def put_rows(self, rows: Array, index: Array, count: int) -> Array:
        """Return (count, N) with `rows` (n, N) at `index` (n,) and zeros elsewhere."""
        if self.library in _LIBRARIES:
            out = self.xp.zeros((count, rows.shape[1]), dtype=rows.dtype, device=self.device)
            out[index] = rows
            return out
        # The standard has no assignment by index: take the rows, or one of zeros behind them.
        where = np.full(count, rows.shape[0])
        where[to_numpy(index)] = np.arange(rows.shape[0])
        zero = self.xp.zeros((1, rows.shape[1]), dtype=rows.dtype, device=self.device)
        return self.xp.take(self.xp.concat([rows, zero]), self.asarray(where), axis=0)

    def contiguous(self, array: Array) -> Array:
        """Return `array` in C order, which kernels rely on; the array itself where it already is."""
        if self.library == "numpy":
            return np.ascontiguousarray(array)
        if self.library == "torch":
            return array.contiguous()
        if self.library == "cupy":
            return self.xp.ascontiguousarray(array)
        return array


def resolve_backend(backend: str | Namespace | Backend | None) -> Backend:
    """Return the `Backend` that a public `backend=` argument means.

    Parameters
    ----------
    backend : str, module or None
        ``"numpy"``, ``"cupy"``, ``"cupy:1"``, ``"torch"``, ``"torch:cuda"``, or an Array API namespace
        module. None means the environment variable ``RNNKIT_BACKEND``, and NumPy without it.

    Raises
    ------
    ValueError
        No such backend.
    BackendUnavailableError
        Not installed, or no such device; the message has the command that would fix it.
    """
    if isinstance(backend, Backend):
        return backend
    origin = ""
    if backend is None:
        backend = os.environ.get("RNNKIT_BACKEND") or "numpy"
        origin = " from the environment variable RNNKIT_BACKEND" if os.environ.get("RNNKIT_BACKEND") else ""
    if isinstance(backend, ModuleType):
        return _from_module(backend)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name or an Array API namespace module, got {_kind(backend)}")
    library, _, device = backend.partition(":")
    if library not in _LIBRARIES or (library == "numpy" and device):
        raise ValueError(
            'backend must be "numpy", "cupy", "cupy:<number>", "torch", "torch:<device>" '
            f"or an Array API namespace module, got {backend!r}{origin}"
        )
    return _LIBRARIES[library](device)


def backend_of(array: Array) -> Backend:
    """Return the backend that an array belongs to, for functions that have no layer.

    Raises
    ------
    TypeError
        It is no array.
    """
    if isinstance(array, np.ndarray):
        return _numpy("")
    try:
        xp = namespace_of(array)
    except TypeError:
        raise TypeError(f"an array was expected, got {_kind(array)}") from None
    return _finish(xp.__name__.removeprefix("array_api_compat."), xp, array)


def to_numpy(array: Any) -> np.ndarray[Any, Any]:
    """Return any backend's array as a NumPy array on the host.

    Parameters
    ----------
    array : array
        Of NumPy, CuPy, torch or any library that exports DLPack.

    Returns
    -------
    numpy.ndarray
        It may share memory with an array that is on the host already. bfloat16, which NumPy lacks,
        becomes float32, exactly.

    Raises
    ------
    TypeError
        `array` is not an array.
    """
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, (int, float, np.generic)):
        return np.asarray(array)
    library = type(array).__module__.partition(".")[0]
    if library == "torch":
        array = array.detach().cpu()
        return np.asarray((array.float() if "bfloat16" in str(array.dtype) else array).numpy())
    if library == "cupy":
        host = array.get()
        for check in _arrival_checks:
            check()
        return np.asarray(host.astype(np.float32) if host.dtype.name == "bfloat16" else host)
    if hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    raise TypeError(f"to_numpy takes an array, got {_kind(array)}")


# Called when values have come from a device: what ran before them is finished, and may have failed.
_arrival_checks: list[Callable[[], None]] = []


def on_arrival(check: Callable[[], None]) -> None:
    """Have `check` called by `to_numpy` after it has waited for CuPy's device."""
    _arrival_checks.append(check)


def namespace_of(array: Array) -> Namespace:
    """Return the Array API namespace that `array` belongs to."""
    if isinstance(array, np.ndarray):
        return np
    kind = type(array)
    if kind not in _namespaces:
        _namespaces[kind] = _compat().array_namespace(array)
    return _namespaces[kind]


# By the class of array: to ask takes longer than many a small operation.
_namespaces: dict[type, Namespace] = {}


def dtype_name(dtype: Any) -> str:
    """Return the name of a floating-point dtype given as a name or as any library's dtype object.

    Raises
    ------
    TypeError
        Not one of float16, bfloat16, float32 and float64.
    """
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    if name not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype!r}")
    return str(name)


def accumulation_dtype(name: str) -> str:
    """Return the dtype that sums are kept in: float32 for the two half precisions, else the same."""
    return "float32" if name in ("float16", "bfloat16") else name


def is_integer(array: Array) -> bool:
    """Whether the array holds integers (booleans are none)."""
    # 2 us less than isdtype, at every call of a stream; and isdtype refuses CuPy's bfloat16.
    kind = getattr(array.dtype, "kind", None)
    return bool(namespace_of(array).isdtype(array.dtype, "integral")) if kind is None else kind in "iu"


def is_real(array: Array) -> bool:
    """Whether the array holds real floating-point numbers."""
    if getattr(array.dtype, "name", "") == "bfloat16":
        return True
    return bool(namespace_of(array).isdtype(array.dtype, "real floating"))


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


@cache
def _compat() -> Any:
    return importlib.import_module("array_api_compat")


def _numpy(device: str) -> Backend:
    return Backend("numpy", np, "cpu", np.ndarray, _HOST)


def _torch(device: str) -> Backend:
    name = f"torch:{device}" if device else "torch"
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise BackendUnavailableError(
            f'backend "{name}" needs PyTorch, which is not installed: pip install torch'
        ) from error
    try:
        where = torch.device(device) if device else torch.get_default_device()
    except RuntimeError as error:
        raise ValueError(f"backend {name!r} names no torch device: {_first_line(error)}") from None
    try:
        probe = torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackendUnavailableError(
            f"backend {name!r} has no such device here: {_first_line(error)}; install a PyTorch build for it "
            "(https://pytorch.org/get-started/locally), or use backend 'torch:cpu'"
        ) from None
    try:
        return _finish(name, importlib.import_module("array_api_compat.torch"), probe)
    except (ValueError, BufferError) as error:  # the meta device, whose tensors hold no numbers
        raise ValueError(f"backend {name!r} cannot be computed on: {_first_line(error)}") from None


def _cupy(device: str) -> Backend:
    name = f"cupy:{device}" if device else "cupy"
    if device and not device.isdecimal():
        raise ValueError(f'backend "cupy:<number>" takes a device number, got {name!r}')
    if (reason := why_no_cupy(name)) is not None:
        raise BackendUnavailableError(reason)
    cupy: Any = importlib.import_module("cupy")
    with cupy.cuda.Device(int(device)) if device else nullcontext():
        probe = cupy.empty(0)
    return _finish(name, importlib.import_module("array_api_compat.cupy"), probe)


def _bfloat16_of_cupy() -> Any:
    """Return the dtype that CuPy 14 takes for bfloat16, which its namespace does not name."""
    version = importlib.import_module("cupy").__version__
    if int(version.partition(".")[0]) < 14:
        raise TypeError(f"dtype 'bfloat16' needs CuPy 14 or later, and this is CuPy {version}")
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise TypeError("dtype 'bfloat16' needs ml_dtypes on CuPy: pip install ml_dtypes") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _from_module(module: ModuleType) -> Backend:
    name = module.__name__.removeprefix("array_api_compat.")
    if name in _LIBRARIES:
        return _LIBRARIES[name]("")
    if not hasattr(module, "from_dlpack") or not hasattr(module, "matmul"):
        raise TypeError(f"backend must be an Array API namespace module, and {name} is none")
    return _finish(name, module, module.empty(0))


def _from_name(name: str) -> Backend:
    if name.partition(":")[0] in _LIBRARIES:
        return resolve_backend(name)
    return _from_module(importlib.import_module(name))


def _finish(name: str, xp: Namespace, probe: Array) -> Backend:
    kind, index = probe.__dlpack_device__()
    return Backend(name, xp, _compat().device(probe), type(probe), (int(kind), int(index)))


_LIBRARIES: dict[str, Callable[[str], Backend]] = {"numpy": _numpy, "cupy": _cupy, "torch": _torch}
