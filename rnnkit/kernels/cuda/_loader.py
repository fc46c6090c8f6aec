"""From a `.cu` file to a function that launches a kernel, and matrix products without an allocation.

The only file that imports CuPy; all else in this package is written against the namespace of its arrays and
calls `kernel`, `product` and `address`. So the tests can put a device made of threads of the host in CuPy's
place. Everything goes to the current stream of the current device, and nothing here waits for it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.api import driver
from cupy_backends.cuda.libs import cublas

from ..._array import on_arrival
from ..._typing import Array
from ._dtypes import name_of
from ._plan import Limits
from ._source import FOLDER, Macros, options, source

Launch = Callable[..., None]


@cache
def kernel(
    file: str, name: str, dtype: str, vector: int = 1, macros: Macros = (), cooperative: bool = False
) -> Launch:
    """Return ``launch(grid, block, args, shared=0)`` of a kernel; it is compiled on first use.

    Parameters
    ----------
    file, name : str
        The `.cu` file without its ending, and a kernel in it.
    dtype : str
        Of the variant: "float32" and so on.
    vector : int
        How many neighbouring elements a thread works on.
    macros : tuple of (str, int)
        What else the variant defines.
    cooperative : bool
        All blocks of a launch are there at the same time, so that they may wait for each other. The grid is
        (1, n) then: where a grid (n, 1) does not fit CuPy launches fewer blocks and only warns, and those
        would wait for the others for ever.

    Notes
    -----
    `args` are arrays, and Python integers and floats, which arrive as long long and double; `or_null` has put
    0 in place of None. An array is its address: strides are not seen. `shared` is dynamic shared memory in
    bytes.

    Raises
    ------
    ValueError
        By a cooperative launch: its blocks do not fit on the device at the same time.
    """
    raw = _function(file, name, dtype, vector, macros)
    most_shared: dict[int, int] = {}  # by device: the function's attribute, which differs between them

    def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared: int = 0) -> None:
        if shared > _UNASKED_SHARED:
            device = cupy.cuda.runtime.getDevice()
            if shared > most_shared.get(device, _UNASKED_SHARED):
                raw.max_dynamic_shared_size_bytes = most_shared[device] = shared
        if not cooperative:
            raw(grid, block, args, shared_mem=shared)
            return
        if grid[0] != 1 or len(grid) < 2:
            raise ValueError(f"a cooperative grid is (1, n), got {grid}")
        # Asked for at the launch, not of the module: CuPy before 14.2 would link that with a library which an
        # installation may lack, for headers that nothing here includes.
        raw.kernel(grid, block, args, shared_mem=shared, enable_cooperative_groups=True)

    return launch


def or_null(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a kernel's arguments with null pointers for None, which ends the process in CuPy 13."""
    return tuple([0 if arg is None else arg for arg in args])


# Bytes of shared memory that a block gets without asking, on every device.
_UNASKED_SHARED = 48 << 10

_WORD = ctypes.sizeof(ctypes.c_longlong)  # a pointer's size too


class Parameters:
    """What a kernel gets, laid out as the driver reads it: the last number may change between launches.

    Attributes
    ----------
    args : tuple
        Arrays and integers, as `kernel` takes them: an address alone keeps no array alive.
    values : ctypes array of n long long
    address : int
        Of n pointers, each to one of the values.
    """

    def __init__(self, args: tuple[Any, ...]):
        self.args = args
        n = len(args)
        self.values = (ctypes.c_longlong * n)(
            *[arg if isinstance(arg, int) else address(arg) for arg in args]
        )
        first = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_void_p * n)(*range(first, first + ctypes.sizeof(self.values), _WORD))
        self.address = ctypes.addressof(self._pointers)


def each_step(
    file: str, name: str, dtype: str, vector: int, grid: tuple[int, int], threads: int, args: tuple[Any, ...]
) -> Callable[[int], None]:
    """Return a function that launches a kernel with `args` and behind them t, for the steps of one scan.

    What `kernel` returns has CuPy look at each argument, the stream and the device anew: longer than all else
    that the host does in a step, for which a small layer's device waits. Here that is done once.

    Parameters
    ----------
    file, name, dtype, vector
        As in `kernel`.
    grid : (int, int)
    threads : int
        Of a block.
    args : tuple
        Arrays and integers.

    Notes
    -----
    All launches are in the stream that is current now. CuPy must have launched something in this thread
    before, as it does to copy the initial state: the first time it makes CUDA's context the thread's own.
    """
    compiled = _function(file, name, dtype, vector, ()).kernel  # the current device's; it keeps its module
    function, stream, (rows, columns) = compiled.ptr, cupy.cuda.get_current_stream().ptr, grid
    parameters = Parameters((*args, 0))
    values, where, launch = parameters.values, parameters.address, driver.launchKernel

    def step(t: int, _alive: tuple[Any, ...] = (compiled, parameters)) -> None:
        values[-1] = t
        launch(function, rows, columns, 1, threads, 1, 1, 0, stream, where, 0)

    return step


@cache
def _function(file: str, name: str, dtype: str, vector: int, macros: Macros) -> Any:
    return _module(file, dtype, vector, macros).get_function(name)


@cache
def _module(file: str, dtype: str, vector: int, macros: Macros) -> Any:
    return cupy.RawModule(code=source(FOLDER / f"{file}.cu"), options=options(dtype, vector, macros))


def address(array: Array) -> int:
    """Return where an array's first element lies."""
    return int(array.data.ptr)


# ------------------------------------------------------------------------------------- the device


def limits() -> Limits:
    """Return what the current device has."""
    return _limits(cupy.cuda.runtime.getDevice())


@cache
def _limits(device: int) -> Limits:
    this = cupy.cuda.Device(device)
    number, has = int(this.compute_capability), this.attributes
    return Limits(
        # Without cooperative launches, as under some virtual machines, no blocks can wait for each other.
        has["MultiProcessorCount"] if has["CooperativeLaunch"] else 0,
        has["MaxSharedMemoryPerBlockOptin"],
        has["MaxRegistersPerMultiprocessor"],
        divmod(number, 10),
    )


class ErrorFlag:
    """A number in memory of the host into which a kernel writes when it gives up waiting.

    The kernel's own results are then wrong, and the host must hear of it although nothing waits for the
    device: `check` is called before every launch that may fail so, and whenever values have arrived on the
    host through `rnnkit.to_numpy`.

    Attributes
    ----------
    address : int
        Where a kernel finds it. CUDA maps all page-locked memory into the address space of all devices.
    """

    def __init__(self) -> None:
        self._memory = cupy.cuda.alloc_pinned_memory(4)
        self._value = np.frombuffer(self._memory, np.uint32, 1)
        self._value[0] = 0
        self._lock = threading.Lock()
        self.address = int(self._memory.ptr)

    def check(self) -> None:
        """Raise RuntimeError if a kernel has failed since the last call."""
        if not self._value[0]:
            return
        with self._lock:
            failed, self._value[0] = bool(self._value[0]), 0
        if failed:
            raise RuntimeError(
                "a kernel gave up: its blocks waited too long for each other, and what was computed since "
                "the last check, parameters included, may be wrong. Set RNNKIT_PERSISTENT=0 and compute it "
                "again"
            )


@cache
def error_flag() -> ErrorFlag:
    """Return the process's only error flag."""
    flag = ErrorFlag()
    on_arrival(flag.check)
    return flag


# ---------------------------------------------------------------------------------- matrix products

_CUDA_TYPES = {
    "float32": cupy.cuda.runtime.CUDA_R_32F,
    "float64": cupy.cuda.runtime.CUDA_R_64F,
    "float16": cupy.cuda.runtime.CUDA_R_16F,
}
if hasattr(cupy.cuda.runtime, "CUDA_R_16BF"):  # CuPy 13 has no such arrays
    _CUDA_TYPES["bfloat16"] = cupy.cuda.runtime.CUDA_R_16BF
# cuBLAS reads its factors, 0 and 1, through pointers to the host, in the type that it computes in.
_FACTORS = {dtype: np.array([0, 1], dtype) for dtype in ("float32", "float64")}
_AT = {dtype: [pair[k:].ctypes.data for k in (0, 1)] for dtype, pair in _FACTORS.items()}


def product(a: Array, b: Array, out: Array, *, add: bool = False) -> Callable[[int], None]:
    """Return a function that computes ``out = a @ b``, or with `add` ``out += a @ b``, for a time step.

    Parameters
    ----------
    a : array (M, K) or (T, M, K)
    b : array (K, N)
        Of a's dtype. Matrices may be transposed: in C or Fortran order.
    out : array (M, N) or (T, M, N)
        In C order; of a's dtype, but float32 where that is a half precision, and so are the sums.

    Returns
    -------
    callable
        Of t, which chooses a[t] and out[t] where they have an axis T.

    Notes
    -----
    `cupy.matmul` rearranges its operands anew at every call, allocates where `out` differs from them in
    dtype, and cannot add. So this calls cuBLAS with addresses, as CuPy itself does in the end. The precision
    of float32 products is CuPy's setting at the time.
    """
    (M, K), N = a.shape[-2:], b.shape[1]
    if not (M and N and K):  # which cuBLAS's manual leaves open
        return lambda t: None if add else (out[t] if out.ndim == 3 else out).fill(0)
    op_a, ld_a = _layout(a)
    op_b, ld_b = _layout(b)
    a_type, out_type = _CUDA_TYPES[name_of(a.dtype)], _CUDA_TYPES[name_of(out.dtype)]
    zero, one = _AT[name_of(out.dtype)]
    beta = one if add else zero
    from_a, from_b, to = address(a), address(b), address(out)
    step_a = a.strides[0] if a.ndim == 3 else 0
    step_out = out.strides[0] if out.ndim == 3 else 0
    compute, algorithm = _compute_type(a.dtype), cublas.CUBLAS_GEMM_DEFAULT
    handle = cupy.cuda.device.get_cublas_handle()

    def multiply(t: int, _alive: tuple[Array, ...] = (a, b, out)) -> None:
        # _alive: an address keeps no array, and CuPy would give a widened copy's memory to the next one.
        # In Fortran order, which is cuBLAS's, these are the transposes: out^T = b^T a^T.
        cublas.gemmEx(
            handle, op_b, op_a, N, M, K, one, from_b, a_type, ld_b, from_a + t * step_a, a_type, ld_a,
            beta, to + t * step_out, out_type, N, compute, algorithm,
        )  # fmt: skip

    return multiply


def _layout(matrix: Array) -> tuple[int, int]:
    """Return cuBLAS's operation and leading dimension of (the steps of) a matrix, seen in Fortran order."""
    rows, columns = matrix.shape[-2:]
    row, column = (stride // matrix.itemsize for stride in matrix.strides[-2:])
    if (column == 1 or columns == 1) and (row == columns or rows == 1):
        return cublas.CUBLAS_OP_N, max(1, columns)
    if not (row == 1 or rows == 1) or not (column == rows or columns == 1):
        raise ValueError(f"a matrix {matrix.shape} with strides {matrix.strides} is in neither order")
    return cublas.CUBLAS_OP_T, max(1, rows)


def _compute_type(dtype: Any) -> Any:
    """Return cuBLAS's compute type for operands of this dtype, as CuPy would choose it."""
    setting, wide = precision(dtype), name_of(dtype) == "float64"
    if setting == "PEDANTIC":
        return cublas.CUBLAS_COMPUTE_64F_PEDANTIC if wide else cublas.CUBLAS_COMPUTE_32F_PEDANTIC
    if wide:
        return cublas.CUBLAS_COMPUTE_64F
    rounded = setting == "TF32" and name_of(dtype) == "float32"  # cuBLAS refuses it for half precision
    return cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if rounded else cublas.CUBLAS_COMPUTE_32F


def precision(dtype: Any) -> str:
    """Return the name of CuPy's setting for products of the dtype: "DEFAULT", "TF32", "PEDANTIC" and so on.

    CuPy reads the environment variable CUPY_TF32 once, at the first product; `cupy._core.set_compute_type`
    changes the setting later.
    """
    return _setting(cupy._core.get_compute_type(dtype))


@cache
def _setting(number: int) -> str:
    return str(cupy._core._routines_linalg.compute_type_to_str(number)).removeprefix("COMPUTE_TYPE_")
