"""A device without a GPU: the `cuda` kernels on NumPy arrays, their `.cu` files compiled by g++.

`on_host` returns a second copy of `rnnkit.kernels.cuda` whose loader is a `HostDevice`: the same Python, the
same kernel source, cuBLAS replaced by NumPy. tests/kernels/host.h says what this can show and what it cannot.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rnnkit.kernels

HERE = Path(__file__).parent / "kernels"
PACKAGE = Path(rnnkit.kernels.__file__).parent / "cuda"
FENCE = 64  # bytes on either side of an array that nobody may write
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
LETTERS = {"float32": "f", "float64": "d", "float16": "h", "bfloat16": "b", "int64": "q", "int32": "i"}
# A kernel that uses one of these must have a fiber for every thread.
WAITS = re.compile(r"__sync|__shfl|__ballot|__any|__all|barrier|SHARED|__nanosleep")


# ------------------------------------------------------------------------------- memory with fences


class Memory(np.ndarray):
    """Bytes that hold an array and a fence on either side of it."""


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
    return bool((memory[: memory.start] == 0xFF).all() and (memory[memory.stop :] == 0xFF).all())


class PoisonedNumPy:
    """NumPy, but new memory is fenced and full of NaN: what nobody wrote must not pass for a result."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> np.ndarray:
        return fenced(shape, dtype)

    def astype(self, array: np.ndarray, dtype: Any, *, copy: bool = True) -> np.ndarray:
        if array.dtype == dtype and not copy:
            return array
        result = fenced(array.shape, dtype)
        result[...] = array
        return result


# ---------------------------------------------------------------------------------------- the loader


class HostDevice:
    """Stands in for `rnnkit.kernels.cuda._loader`.

    Attributes
    ----------
    order : str
        In which order threads and blocks take turns: "forward", "reverse" or "shuffled".
    launches : list of str
        The kernels launched and products made since it was last cleared.
    """

    def __init__(self, folder: Path, sources: Path = PACKAGE):
        self.folder, self.sources = folder, sources
        self.order, self.seed = "forward", 0
        self.launches: list[str] = []
        self._lock = threading.RLock()
        self._libraries: dict[tuple[str, str, int], ctypes.CDLL] = {}
        _compile(["-c", str(HERE / "host.cpp")], folder / "host.o")

    def kernel(self, file: str, name: str, dtype: str, vector: int = 1) -> Any:
        with self._lock:
            library = self._library(file, dtype, vector)
        run = library.host_run
        run.restype = ctypes.c_char_p
        entry = getattr(library, f"{name}_call")
        describe = getattr(library, f"{name}_signature")
        describe.restype = ctypes.c_char_p
        kinds, letters = describe().decode().split("|")
        mode = 1 if WAITS.search((self.sources / f"{file}.cu").read_text()) else 0

        def launch(grid: Any, block: Any, args: tuple[Any, ...], shared: int = 0, mode: int = mode) -> None:
            assert len(args) == len(kinds), f"{name} takes {len(kinds)} arguments, got {len(args)}"
            values = [_value(name, k, *each) for k, each in enumerate(zip(args, kinds, letters, strict=True))]
            pointers = (ctypes.c_void_p * len(args))(*[ctypes.addressof(value) for value in values])
            shape = [(ctypes.c_uint * 3)(*size, *[1] * (3 - len(size))) for size in (grid, block)]
            assert all(grid), f"{name}: a grid {grid} without blocks"
            assert np.prod(block) <= 1024, f"{name}: a block {block} of more than 1024 threads"
            with self._lock:
                self.launches.append(name)
                self.seed += 1
                error = run(
                    entry, pointers, *shape, ctypes.c_size_t(shared), mode, ORDERS[self.order],
                    ctypes.c_uint(self.seed),
                )  # fmt: skip
            assert error is None, f"{name}: {error.decode()}"
            for k, arg in enumerate(args):
                assert not isinstance(arg, np.ndarray) or fences_hold(arg), (
                    f"{name} wrote beyond argument {k}"
                )

        return launch

    def product(self, a: np.ndarray, b: np.ndarray, out: np.ndarray, *, add: bool = False) -> Any:
        assert a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}"
        assert out.dtype == (np.float64 if a.dtype == np.float64 else np.float32)
        assert out.flags.c_contiguous, "the product's result is not in C order"
        for matrix in (a, b):
            last = matrix.reshape(-1, *matrix.shape[-2:])[0] if matrix.size else matrix
            assert last.flags.c_contiguous or last.flags.f_contiguous or not last.size
        assert not np.shares_memory(out, a)
        assert not np.shares_memory(out, b)

        def multiply(t: int) -> None:
            self.launches.append("product")
            left, result = (array[t] if array.ndim == 3 else array for array in (a, out))
            product = left.astype(out.dtype, copy=False) @ b.astype(out.dtype, copy=False)
            result[...] = result + product if add else product

        return multiply

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def precision(self, dtype: str) -> str:
        return "DEFAULT"

    def _library(self, file: str, dtype: str, vector: int) -> ctypes.CDLL:
        key = file, dtype, vector
        if key not in self._libraries:
            target = self.folder / ("_".join(map(str, key)) + ".so")
            path = self.sources / f"{file}.cu"
            names = re.findall(r"__global__\s+void\s+(\w+)\s*\(", path.read_text())
            main = target.with_suffix(".cpp")
            lines = [
                f'#include "{HERE / "host.h"}"',
                f'#include "{path}"',
                *[f"EXPORT({name})" for name in names],
            ]
            main.write_text("\n".join(lines) + "\n")
            options = on_host_source().defines(dtype, vector)
            _compile(["-shared", f"-I{PACKAGE}", *options, str(main), str(self.folder / "host.o")], target)
            self._libraries[key] = ctypes.CDLL(str(target))
        return self._libraries[key]


def _value(name: str, k: int, arg: Any, kind: str, letter: str) -> Any:
    """Return the C value of an argument, which must be what the kernel declares: a GPU would not notice."""
    where = f"argument {k} of {name}"
    if kind == "=":
        assert type(arg) is {"q": int, "d": float}.get(letter), f"{where} is {letter!r}, got {arg!r}"
        return ctypes.c_longlong(arg) if letter == "q" else ctypes.c_double(arg)
    if arg is None:
        return ctypes.c_void_p()
    assert isinstance(arg, np.ndarray), f"{where} is a pointer, got {arg!r}"
    assert arg.flags.c_contiguous, f"{where} is not in C order"
    assert LETTERS[str(arg.dtype)] == letter, f"{where} points to {letter!r}, got {arg.dtype}"
    assert kind == "&" or arg.flags.writeable, f"{where} would be written, but is an input"
    return ctypes.c_void_p(arg.ctypes.data)


def _compile(arguments: list[str], target: Path) -> None:
    compiler = shutil.which("g++")
    command = [
        str(compiler), "-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas",
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


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rnnkit-host-device-")


def on_host() -> ModuleType:
    """Return `rnnkit.kernels.cuda` on the host; its `_loader` is the `HostDevice`."""
    require_compiler()
    return _on_host()


@cache
def _on_host() -> ModuleType:
    name = "rnnkit.kernels.cuda_on_host"
    device = HostDevice(Path(_folder().name))
    sys.modules[f"{name}._loader"] = device  # type: ignore[assignment]
    module = _load_copy(name)
    for part in [value for key, value in sys.modules.items() if key.startswith(f"{name}.")]:
        if hasattr(part, "namespace_of"):
            part.namespace_of = lambda array: PoisonedNumPy()
    module.device = device
    return module


def _load_copy(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def on_host_source() -> ModuleType:
    """Return `_source`, which needs no GPU library, without its package."""
    spec = importlib.util.spec_from_file_location("rnnkit_cuda_source", PACKAGE / "_source.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
