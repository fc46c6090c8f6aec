"""A device without a GPU: the `cuda` kernels on NumPy arrays, their `.cu` files compiled by g++.

`on_host` returns a second copy of `rnnkit.kernels.cuda` that finds a `HostDevice` where it looks for CuPy:
the same Python, the same kernel source, cuBLAS replaced by NumPy behind the same call with addresses. What it
can show and what it cannot is said in tests/kernels/host.h.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import rnnkit.kernels
from rnnkit._array import resolve_backend

HERE = Path(__file__).parent / "kernels"
PACKAGE = Path(rnnkit.kernels.__file__).parent / "cuda"
SANITIZE = ("-fsanitize=alignment",)
RACES = ("-fsanitize=thread", "-g")
# gold, where it is, takes half the time.
LINK = ("-shared", *(["-fuse-ld=gold"] if shutil.which("ld.gold") else []))
FENCE = 64  # bytes on either side of an array that nobody may write
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2, "uneven": 3}
Size = tuple[int, ...]
LETTERS = {
    np.dtype(kind): letter
    for kind, letter in [
        (np.float32, "f"), (np.float64, "d"), (np.float16, "h"), (ml_dtypes.bfloat16, "b"), (np.int64, "q"),
        (np.bool_, "o"), (np.uint32, "u"),
    ]
}  # fmt: skip
# Where one of these is called every thread must have a fiber, which takes time.
WAITS = re.compile(r"__sync|__shfl|__ballot|__any|__all|barrier|SHARED|__nanosleep|pause\(|mma_\d|wait_for")
MACROS = re.compile(r"^#.*(?:\\\n.*)*$", re.MULTILINE)


# ------------------------------------------------------------------------------- memory with fences


class Memory(np.ndarray):
    """Bytes that hold an array and a fence on either side of it."""

    def __del__(self) -> None:
        if self.base is None:  # what is read after this is NaN, at least until others get the memory
            self[...] = 0xFF


def fenced(shape: Any, dtype: Any) -> np.ndarray:
    """Return an array full of NaN, aligned as on a device, with a fence of NaN around it."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = Memory(size + 3 * FENCE, np.uint8)
    memory[...] = 0xFF
    start = FENCE + -memory.ctypes.data % FENCE
    memory.start, memory.stop = start, start + size
    return np.ndarray(shape, dtype, buffer=memory, offset=start)


def fences_hold(array: np.ndarray) -> bool:
    """Whether nobody wrote around the array; memory that is not ours has no fence and cannot tell."""
    memory = array.base
    while memory is not None and not isinstance(memory, Memory):
        memory = memory.base
    if memory is None:
        return True
    here = memory.ctypes.data
    before, behind = ctypes.string_at(here, memory.start), ctypes.string_at(here + memory.stop, FENCE)
    return before.count(0xFF) == memory.start and behind.count(0xFF) == FENCE


class PoisonedNumPy:
    """NumPy, but new memory is fenced and full of NaN: what nobody wrote must not pass for a result."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> np.ndarray:
        return fenced(shape, dtype)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> np.ndarray:
        array = fenced(shape, dtype)
        array[...] = 0
        return array

    def astype(self, array: np.ndarray, dtype: Any, *, copy: bool = True) -> np.ndarray:
        if array.dtype == dtype and not copy:
            return array
        result = fenced(array.shape, dtype)
        result[...] = array
        return result


# ---------------------------------------------------------------------------------------- the device


class HostDevice:
    """Stands in for CuPy: its `RawModule`, its device and its cuBLAS.

    Attributes
    ----------
    order : str
        In which order threads and blocks take turns: "forward", "reverse" or "shuffled".
    launches : list of str
        The kernels launched and products made since it was last cleared.
    check_races : bool
        Whether kernels that are compiled from now on report a race, as tests/kernels/races.h explains: in any
        order of threads, but slowly.
    attributes : dict
        What `cupy.cuda.Device.attributes` tells of it, as far as it matters; tests may change it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.order, self.seed = "forward", 0
        self.launches: list[str] = []
        self.attributes = dict(ATTRIBUTES)
        self.check_races = False
        # What the driver is told by address.
        self.functions: dict[int, Function] = {}
        self.parameters: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self._host = _host()

    def raw_module(self, *, code: str, options: tuple[str, ...]) -> SimpleNamespace:
        """Stand in for `cupy.RawModule`."""
        library = self._library(code, options)
        return SimpleNamespace(get_function=lambda name: Function(self, library, name, code, options))

    def _library(self, code: str, options: tuple[str, ...]) -> ctypes.CDLL:
        # What the sanitizers call is in host.cpp: their libraries would be linked with the option.
        sanitize = [*SANITIZE, *(RACES if self.check_races else [])]
        name = hashlib.sha256(repr((code, options, sanitize)).encode()).hexdigest()[:16]
        # Other processes may make the same at the same time.
        main, target = self.folder / f"{name}-{os.getpid()}.cpp", self.folder / f"{name}.so"
        kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(", code)
        with self._lock:
            if not target.exists():
                exports = "\n".join(f"EXPORT({kernel})" for kernel in kernels)
                main.write_text(f'#include "device.h"\n{code}\n{exports}\n')
                include = f"-I{self._host}"
                _compile(["-c", *sanitize, include, *options, str(main)], main.with_suffix(".o"))
                made = main.with_suffix(".so")
                _compile([*LINK, str(main.with_suffix(".o")), str(self._host / "host.o")], made)
                made.replace(target)
        library = ctypes.CDLL(str(target))
        library.host_run.restype = ctypes.c_char_p
        return library

    def run(
        self, library: ctypes.CDLL, name: str, pointers: Any, grid: Size, block: Size, shared: int, mode: int
    ) -> None:
        """Run a kernel; fail with what went wrong."""
        with self._lock:
            self.launches.append(name)
            self.seed += 1
            error = library.host_run(
                getattr(library, f"{name}_call"), pointers, SIZES(*grid), SIZES(*block),
                ctypes.c_size_t(shared), mode, ORDERS[self.order], ctypes.c_uint(self.seed),
            )  # fmt: skip
        assert error is None, f"{name}: {_located(error.decode(), library)}"

    def launch_kernel(
        self, function: int, grid_x: int, grid_y: int, grid_z: int, block_x: int, block_y: int, block_z: int,
        shared: int, stream: int, parameters: int, extra: int,
    ) -> None:  # fmt: skip
        """Stand in for cuLaunchKernel: the arguments are where `parameters` points to."""
        assert (stream, extra) == (STREAM, 0)
        called, given = self.functions[function], self.parameters[parameters]
        pointers = (ctypes.c_void_p * len(given.args)).from_address(parameters)
        *args, _ = given.args
        args = (*args, ctypes.c_longlong.from_address(pointers[len(args)]).value)
        for where, value in zip(pointers, called.values(args), strict=True):
            assert ctypes.string_at(where, 8) == bytes(value), f"{called.name} gets other arguments"
        called.launch((grid_x, grid_y, grid_z), (block_x, block_y, block_z), args, shared_mem=shared)

    def blocks_at_once(self, threads: int, shared: int) -> int:
        """Return how many blocks the multiprocessors hold at the same time; registers are not counted."""
        each = min(
            self.attributes["MaxBlocksPerMultiprocessor"],
            self.attributes["MaxThreadsPerMultiProcessor"] // (-(-threads // 32) * 32),
            self.attributes["MaxSharedMemoryPerMultiprocessor"]
            // (shared + self.attributes["ReservedSharedMemoryPerBlock"]),
        )
        return each * self.attributes["MultiProcessorCount"]

    def gemm(
        self, handle: int, op_a: int, op_b: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int,
        ld_a: int, b: int, b_type: int, ld_b: int, beta: int, c: int, c_type: int, ld_c: int, compute: int,
        algorithm: int,
    ) -> None:  # fmt: skip
        """Stand in for cublasGemmEx: c (m, n) = alpha op(a) op(b) + beta c, by address, in Fortran order."""
        assert handle == HANDLE
        kind = np.dtype(TYPES[c_type])
        assert (a_type, c_type, compute) in COMPUTES, "cuBLAS has no such product"
        assert a_type == b_type
        left = _matrix(a, a_type, *((m, k) if op_a == 0 else (k, m)), ld_a)
        right = _matrix(b, b_type, *((k, n) if op_b == 0 else (n, k)), ld_b)
        out = _matrix(c, c_type, m, n, ld_c)
        assert not np.shares_memory(out, left)
        assert not np.shares_memory(out, right)
        one, factor = (np.ctypeslib.as_array((FACTOR[kind.name]).from_address(p)) for p in (alpha, beta))
        assert one == 1
        product = (left.T if op_a else left).astype(kind) @ (right.T if op_b else right).astype(kind)
        with self._lock:
            self.launches.append("product")
        out[...] = product + out if factor else product


class Function:
    """Stands in for `cupy.RawKernel`, as a module of a `HostDevice` returns it."""

    def __init__(
        self, device: HostDevice, library: ctypes.CDLL, name: str, code: str, options: tuple[str, ...]
    ):
        self.device, self.library, self.name = device, library, name
        describe = getattr(library, f"{name}_signature")
        describe.restype = ctypes.c_char_p
        self.kinds, self.letters = describe().decode().split("|")
        self.pointers = ctypes.c_void_p * len(self.kinds)  # to make a type costs more than a launch
        self.mode = int(bool(WAITS.search(MACROS.sub("", code))))
        vectors = [int(option.partition("=")[2]) for option in options if option.startswith("-DVECTOR")]
        self.vector = vectors[0] if vectors else 1
        self._most_shared = device.attributes["MaxSharedMemoryPerBlock"]
        device.functions[id(self)] = self

    @property
    def kernel(self) -> Compiled:
        """Stand in for `cupy.RawKernel.kernel`."""
        return Compiled(self)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._most_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        most = self.device.attributes["MaxSharedMemoryPerBlockOptin"]
        assert 0 <= size <= most, f"{self.name}: {size} bytes of shared memory, a block has {most}"
        self._most_shared = size

    def __call__(self, grid: Size, block: Size, args: tuple[Any, ...], *, shared_mem: int = 0) -> None:
        self.launch(grid, block, args, shared_mem=shared_mem)

    def values(self, args: tuple[Any, ...]) -> list[Any]:
        """Return the C values of the arguments, which must be what the kernel declares."""
        name = self.name
        assert len(args) == len(self.kinds), f"{name} takes {len(self.kinds)} arguments, got {len(args)}"
        return [
            _value(f"argument {k} of {name}", self.vector, *each)
            for k, each in enumerate(zip(args, self.kinds, self.letters, strict=True))
        ]

    def launch(
        self, grid: Size, block: Size, args: tuple[Any, ...], *, shared_mem: int = 0,
        enable_cooperative_groups: bool = False,
    ) -> None:  # fmt: skip
        """Run the kernel after checking all that a device would not notice."""
        name, values = self.name, self.values(args)
        pointers = self.pointers(*[ctypes.addressof(value) for value in values])
        assert all(grid), f"{name}: a grid {grid} without blocks"
        assert math.prod(block) <= 1024, f"{name}: a block {block} of more than 1024 threads"
        assert max(grid[1:], default=1) <= MOST_BLOCKS, f"{name}: a grid {grid} wider than a device takes"
        assert shared_mem <= self._most_shared, (
            f"{name}: {shared_mem} bytes of shared memory, but {self._most_shared} were asked for"
        )
        grid, block = ((*size, *[1] * (3 - len(size))) for size in (grid, block))
        if enable_cooperative_groups:
            grid = self._together(grid, self.device.blocks_at_once(math.prod(block), shared_mem))
        mode = 2 if enable_cooperative_groups else self.mode
        self.device.run(self.library, name, pointers, grid, block, shared_mem, mode)
        for k, arg in enumerate(args):
            assert not isinstance(arg, np.ndarray) or fences_hold(arg), f"{name} wrote beyond argument {k}"

    def _together(self, grid: Size, most: int) -> Size:
        """Do as CuPy does with more blocks than there can be at the same time."""
        if math.prod(grid) <= most:
            return grid
        if grid[1:] != (1, 1):
            raise ValueError(f"The specified grid size {grid} exceeds the limit ({most}).")
        warnings.warn(f"The grid size will be reduced from {grid[0]} to {most}", stacklevel=3)
        return (most, 1, 1)


class Compiled:
    """Stands in for `cupy.cuda.Function`."""

    def __init__(self, function: Function):
        self.ptr, self._function = id(function), function

    def __call__(
        self, grid: Size, block: Size, args: tuple[Any, ...], *, shared_mem: int = 0,
        enable_cooperative_groups: bool = False,
    ) -> None:  # fmt: skip
        self._function.launch(
            grid, block, args, shared_mem=shared_mem, enable_cooperative_groups=enable_cooperative_groups
        )


MOST_BLOCKS = 65535  # along the second and the third axis of a grid
# Of a device of few multiprocessors, each of them an H200's; CuPy's names.
ATTRIBUTES = {
    "MultiProcessorCount": 8,
    "MaxSharedMemoryPerBlock": 48 << 10,
    "MaxSharedMemoryPerBlockOptin": 227 << 10,
    "MaxSharedMemoryPerMultiprocessor": 228 << 10,
    "ReservedSharedMemoryPerBlock": 1 << 10,
    "MaxRegistersPerMultiprocessor": 1 << 16,
    "MaxThreadsPerMultiProcessor": 2048,
    "MaxBlocksPerMultiprocessor": 32,
    "CooperativeLaunch": 1,
}
SIZES = ctypes.c_uint * 3
HANDLE, STREAM = 4711, 815
TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}  # cudaDataType_t
FACTOR = {"float32": ctypes.c_float, "float64": ctypes.c_double}
# What cublasGemmEx allows, of what is used: type of a and b, of c, compute type.
COMPUTES = {(0, 0, "32F"), (0, 0, "32F_FAST_TF32"), (2, 0, "32F"), (14, 0, "32F"), (1, 1, "64F")}


def _matrix(address: int, kind: int, rows: int, columns: int, leading: int) -> np.ndarray:
    """Return the memory at an address as a matrix in Fortran order."""
    dtype = np.dtype(TYPES[kind])
    assert leading >= max(1, rows), f"leading dimension {leading} of {rows} rows"
    if not rows or not columns:
        return np.zeros((rows, columns), dtype)
    size = (leading * (columns - 1) + rows) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return np.ndarray((rows, columns), dtype, memory, strides=(dtype.itemsize, leading * dtype.itemsize))


def _value(where: str, vector: int, arg: Any, kind: str, letter: str) -> Any:
    """Return the C value of an argument, which must be what the kernel declares: a GPU would not notice."""
    if kind == "=":
        assert type(arg) is {"q": int, "d": float}.get(letter), f"{where} is {letter!r}, got {arg!r}"
        return ctypes.c_longlong(arg) if letter == "q" else ctypes.c_double(arg)
    assert arg is not None, f"{where} is None, with which CuPy 13 ends the process: see or_null"
    if type(arg) is int and arg == 0:
        return ctypes.c_void_p()
    assert isinstance(arg, np.ndarray), f"{where} is a pointer, got {arg!r}"
    assert arg.flags.c_contiguous, f"{where} is not in C order"
    assert LETTERS[arg.dtype] == letter, f"{where} points to {letter!r}, got {arg.dtype}"
    assert kind == "&" or arg.flags.writeable, f"{where} would be written, but is an input"
    address = arg.ctypes.data
    aligned = letter in "qo" or address % min(16, vector * arg.itemsize) == 0
    assert aligned, f"{where} lies at an address from which no {vector} elements can be loaded at once"
    return ctypes.c_void_p(address)


def _located(error: str, library: ctypes.CDLL) -> str:
    """Return an error with the functions and lines in place of the address that it may end with."""
    text, _, place = error.partition(" at +")
    if not place or shutil.which("addr2line") is None:
        return error
    command = ["addr2line", "-Cfsipe", library._name, place]
    return f"{text}: {subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()}"


def _compile(arguments: list[str], target: Path) -> None:
    command = [
        str(shutil.which("g++")), "-std=c++17", "-Og", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",  # which takes a jump from one stack to another for an attack
        *arguments, "-o", str(target),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------------- a copy of the package


def require_compiler() -> None:
    """Skip the test where there is no g++; in CI, which must have one, fail."""
    if shutil.which("g++") is None:
        if os.environ.get("RNNKIT_REQUIRE_ORACLE") == "1":
            pytest.fail("g++ is missing, which the tests of the CUDA kernels need")
        pytest.skip("no g++: the CUDA kernels are tested on the host with it")


def require_cupys_bfloat16() -> None:
    """Skip the test where CuPy has no bfloat16."""
    try:
        resolve_backend("cupy").dtype("bfloat16")
    except TypeError as error:
        pytest.skip(str(error))


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rnnkit-host-device-")


@cache
def _host() -> Path:
    """Return the folder with what all kernels are compiled with."""
    folder = Path(_folder().name) / "host"
    folder.mkdir()
    _compile(["-c", str(HERE / "host.cpp")], folder / "host.o")
    # Precompiled, since what host.h includes takes longer than most kernels; g++ finds it by its name.
    (folder / "device.h").write_text(f'#include "{HERE / "host.h"}"\n')
    _compile([*SANITIZE, "-x", "c++-header", str(folder / "device.h")], folder / "device.h.gch")
    return folder


def on_host() -> ModuleType:
    """Return `rnnkit.kernels.cuda` on the host; its `device` is the `HostDevice`."""
    require_compiler()
    return _on_host()


@cache
def _on_host() -> ModuleType:
    name = "rnnkit.kernels.cuda_on_host"
    device = HostDevice(Path(os.environ.get("RNNKIT_HOST_DEVICE") or _folder().name))
    with mock.patch.dict(sys.modules, _stand_ins(device)):
        module = _load(name, PACKAGE / "__init__.py", [str(PACKAGE)])
    sys.modules.update(module.parts)
    for part in module.parts.values():
        if hasattr(part, "namespace_of"):
            part.namespace_of = lambda array: PoisonedNumPy()
    loader = module.parts[f"{name}._loader"]
    loader.address = lambda array: array.ctypes.data
    loader.Parameters = _recorded(loader.Parameters, device)
    module.device = device
    return module


def _recorded(parameters: type, device: HostDevice) -> type:
    """Return the class with a memory: whoever is told an address finds the arguments."""

    class Recorded(parameters):  # type: ignore[misc]
        def __init__(self, args: tuple[Any, ...]):
            super().__init__(args)
            device.parameters[self.address] = self

    return Recorded


def _load(name: str, path: Path, folders: list[str] | None = None) -> ModuleType:
    """Import a file under a name of its own; `parts` is what it imports from its folders."""
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    module.parts = {key: value for key, value in sys.modules.items() if key.startswith(name)}
    return module


def pinned_memory(size: int) -> Any:
    """Stand in for `cupy.cuda.alloc_pinned_memory`: a buffer that knows its address, full of ones."""
    kind = type("PinnedMemoryPointer", (ctypes.c_char * size,), {"ptr": property(ctypes.addressof)})
    return kind.from_buffer(bytearray(b"\xff" * size))


def _stand_ins(device: HostDevice) -> dict[str, Any]:
    """Return the modules that `_loader` imports."""
    settings = SimpleNamespace(compute_type_to_str=lambda setting: f"COMPUTE_TYPE_{setting}")
    kinds = {"CUDA_R_32F": 0, "CUDA_R_64F": 1, "CUDA_R_16F": 2, "CUDA_R_16BF": 14}
    computes = ("32F", "32F_FAST_TF32", "32F_PEDANTIC", "64F", "64F_PEDANTIC")
    cublas = SimpleNamespace(
        gemmEx=device.gemm, CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLAS_GEMM_DEFAULT=-1,
        **{f"CUBLAS_COMPUTE_{compute}": compute for compute in computes},
    )  # fmt: skip
    cupy = SimpleNamespace(
        RawModule=device.raw_module,
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(**kinds, getDevice=lambda: 0),
            device=SimpleNamespace(get_cublas_handle=lambda: HANDLE),
            Device=lambda number: SimpleNamespace(attributes=device.attributes, compute_capability="90"),
            get_current_stream=lambda: SimpleNamespace(ptr=STREAM),
            alloc_pinned_memory=pinned_memory,
        ),
        _core=SimpleNamespace(get_compute_type=lambda dtype: "DEFAULT", _routines_linalg=settings),
    )
    packages = {name: ModuleType(name) for name in ("cupy_backends", "cupy_backends.cuda")}
    driver = SimpleNamespace(launchKernel=device.launch_kernel)
    return {
        "cupy": cupy, **packages, "cupy_backends.cuda.libs": SimpleNamespace(cublas=cublas),
        "cupy_backends.cuda.api": SimpleNamespace(driver=driver),
    }  # fmt: skip


@cache
def plans() -> ModuleType:
    """Return `_plan`, which needs no GPU library, without its package."""
    return _load("rnnkit_plans", PACKAGE / "_plan.py")


@cache
def kernel_source() -> ModuleType:
    """Return `_source`, which needs no GPU library, without its package."""
    return _load("rnnkit_kernel_source", PACKAGE / "_source.py")
