"""What stands between the kernels and CuPy: launches, the device's limits, the error flag.

On the host device; and where CuPy is installed, against its names and signatures, which takes no GPU.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from host_device import HERE, Function, fenced, on_host, pinned_memory

import rnnkit
from rnnkit import _array


@pytest.fixture
def loader(monkeypatch):
    module = on_host()
    part = module.parts[f"{module.__name__}._loader"]
    monkeypatch.setattr(part, "FOLDER", HERE)
    caches = (part.kernel, part._function, part._module, part._limits, part.error_flag)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(_array, "_arrival_checks", [])
    yield part
    for cache in caches:  # the folder and the device were the test's
        cache.cache_clear()


@pytest.fixture
def device(monkeypatch):
    made = on_host().device
    monkeypatch.setattr(made, "attributes", dict(made.attributes))
    return made


def added_up(loader, grid, shared=4, patience=1 << 20):
    """Launch blocks that wait for each other and return the first number and the error."""
    blocks = int(np.prod(grid))
    x, count, error = fenced((2, blocks, 32), np.float32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    x[...] = 1
    launch = loader.kernel("planted_persistent", "added_up", "float16", cooperative=True)
    launch(grid, (32,), (x, count, error, patience, 1), shared)
    return x[1, 0, 0], error[0]


def test_a_cooperative_launch(loader):
    assert added_up(loader, (1, 4)) == (4, 0)


def test_a_cooperative_grid_that_cupy_would_shorten(loader, device):
    with pytest.raises(ValueError, match=r"a cooperative grid is \(1, n\)"):
        added_up(loader, (4,))
    with pytest.raises(ValueError, match=r"a cooperative grid is \(1, n\)"):
        added_up(loader, (4, 1))
    device.attributes["MultiProcessorCount"] = 2
    with pytest.raises(ValueError, match="exceeds the limit"):
        added_up(loader, (1, 3), shared=200 << 10)
    assert added_up(loader, (1, 2), shared=200 << 10) == (2, 0)


def test_shared_memory_is_asked_for_as_it_grows(loader, monkeypatch):
    asked = []
    setter = Function.max_dynamic_shared_size_bytes
    monkeypatch.setattr(
        Function, "max_dynamic_shared_size_bytes",
        setter.setter(lambda function, size: (asked.append(size), setter.fset(function, size))),
    )  # fmt: skip
    for size in (48 << 10, 60_000, 50_000, 60_000, 70_000):
        assert added_up(loader, (1, 2), shared=size) == (2, 0)
    assert asked == [60_000, 70_000]
    with pytest.raises(AssertionError, match="a block has"):
        added_up(loader, (1, 2), shared=228 << 10)


def test_macros_make_variants(loader):
    first = loader.kernel("planted_persistent", "copied", "float16", macros=(("SIZE", 1),))
    assert first is loader.kernel("planted_persistent", "copied", "float16", macros=(("SIZE", 1),))
    assert first is not loader.kernel("planted_persistent", "copied", "float16", macros=(("SIZE", 2),))
    assert loader.options("float16", macros=(("SIZE", 2), ("GRID", 0)))[-2:] == ("-DSIZE=2", "-DGRID=0")


def test_a_step_gets_its_arguments_and_the_step(loader, rng):
    """Also when they live nowhere else any more."""
    x, y = fenced(96, np.float64), fenced(96, np.float64)
    x[...] = rng.standard_normal(96)
    step = loader.each_step("planted", "moved", "float64", 1, (3, 1), 32, (x.copy(), y, 96))
    for t in (5, 0, 95):
        step(t)
        np.testing.assert_array_equal(y, np.roll(x, -t))


def test_limits(loader, device):
    assert loader.limits() == (8, 227 << 10, 1 << 16, (9, 0))
    device.attributes["CooperativeLaunch"] = 0
    loader._limits.cache_clear()
    assert loader.limits().multiprocessors == 0


def test_the_error_flag_is_raised_once(loader):
    flag = loader.error_flag()
    assert flag is loader.error_flag()
    flag.check()
    np.frombuffer(flag._memory, np.uint32)[0] = 1
    with pytest.raises(RuntimeError, match="RNNKIT_PERSISTENT=0"):
        flag.check()
    flag.check()


def test_a_kernel_reaches_the_error_flag(loader):
    """By its address, which the kernel gets as a number."""
    flag = loader.error_flag()
    x, count = fenced((2, 2, 32), np.float32), np.zeros(1, np.uint32)
    launch = loader.kernel("planted_persistent", "gives_up", "float16", cooperative=True)
    launch((1, 2), (32,), (x, count, flag.address, 20), 4)
    with pytest.raises(RuntimeError, match="gave up"):
        flag.check()


def test_values_that_arrive_on_the_host_are_checked(loader):
    """`to_numpy` waits for the device, and then knows whether a kernel has failed."""
    array = type("ndarray", (), {"__module__": "cupy", "get": lambda self: np.ones(3)})()
    flag = loader.error_flag()
    np.testing.assert_array_equal(rnnkit.to_numpy(array), np.ones(3))
    np.frombuffer(flag._memory, np.uint32)[0] = 1
    with pytest.raises(RuntimeError, match="RNNKIT_PERSISTENT=0"):
        rnnkit.to_numpy(array)
    np.testing.assert_array_equal(rnnkit.to_numpy(array), np.ones(3))


# -------------------------------------------------------------------------- the same names as CuPy's own


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def arguments(call):
    """Return the arguments of a function of CuPy's in its own words: Cython writes them into the text."""
    return re.search(r"\((.*)\)", call.__doc__.partition("\n")[0])[1]


def test_cupy_has_what_the_host_device_stands_in_for(cupy):
    """What `_stand_ins` offers, by the installed CuPy's own words."""
    module = arguments(cupy.RawModule)
    for argument in ("code=", "options="):
        assert argument in module
    assert "shared_mem=0" in cupy.RawKernel.__call__.__doc__
    assert hasattr(cupy.RawKernel, "kernel")
    assert "enable_cooperative_groups=False" in arguments(cupy.cuda.Function.linear_launch)
    assert isinstance(cupy.RawKernel.max_dynamic_shared_size_bytes, type(cupy.RawKernel.num_regs))
    assert "Can be set" in cupy.RawKernel.max_dynamic_shared_size_bytes.__doc__
    assert arguments(cupy.cuda.alloc_pinned_memory) == "size_t size"
    assert hasattr(cupy.cuda.PinnedMemoryPointer, "ptr")
    assert "cudaDevAttr" in cupy.cuda.Device.attributes.__doc__
    assert "represented" in cupy.cuda.Device.compute_capability.__doc__
    for name in on_host().device.attributes:
        assert hasattr(cupy.cuda.runtime, f"cudaDevAttr{name}")
    assert arguments(cupy.cuda.runtime.getDevice) == ""


def test_cupy_has_the_product_that_the_host_device_stands_in_for(cupy):
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:  # CuPy 14 looks for the library itself
        pytest.skip(str(error))
    assert arguments(cublas.gemmEx).count(",") == 18


def test_cupy_has_the_launch_that_the_host_device_stands_in_for(cupy):
    from cupy_backends.cuda.api import driver

    assert arguments(driver.launchKernel).count(",") == 10
    assert hasattr(cupy.cuda.Function, "ptr")
    assert hasattr(cupy.cuda.Stream, "ptr")


def test_pinned_memory_can_be_written_by_the_host():
    memory = pinned_memory(4)
    value = np.frombuffer(memory, np.uint32, 1)
    assert value.ctypes.data == memory.ptr
    value[0] = 7
    assert bytes(memory)[0] == 7
