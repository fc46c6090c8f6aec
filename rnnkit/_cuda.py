"""What CuPy has to run on: its devices, its CUDA and driver, and if there is nothing, why."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


def why_no_cupy(backend: str) -> str | None:
    """Return why CuPy cannot be used here and what would help, in one sentence, or None where it can.

    Parameters
    ----------
    backend : str
        The backend that somebody asked for, such as "cupy:1".
    """
    needs = f'backend "{backend}" needs'
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return (
                f'{needs} CuPy, which is not installed: pip install "rnnkit[cuda13]" '
                '(or "rnnkit[cuda12]" for CUDA 12; nvidia-smi shows which)'
            )
        return _does_not_load(needs, error)  # CuPy 13 loads CUDA's libraries here
    # `import cupy` succeeds without a driver and fails at the first array: ask before.
    if not cupy.cuda.is_available():
        return _no_device(needs, cupy)
    count, number = cupy.cuda.runtime.getDeviceCount(), backend.partition(":")[2]
    if number and int(number) >= count:
        return (
            f'backend "{backend}" names a device that is not there: CuPy finds {count} '
            f"(numbered from 0; nvidia-smi -L lists them)"
        )
    try:  # CuPy 14 loads them here: at the first kernel and the first matrix product otherwise
        cupy.cuda.nvrtc.getVersion()
        importlib.import_module("cupy.cublas")
    except (ImportError, RuntimeError) as error:
        return _does_not_load(needs, error)
    return None


def _no_device(needs: str, cupy: Any) -> str:
    runtime = cupy.cuda.runtime
    # CUDA calls a driver insufficient that is too old, and one that is missing too, but its version is 0.
    driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    theirs, ours = driver // 1000, built // 1000
    if 0 < theirs < ours:
        return (
            f"{needs} a driver for CUDA {ours}, which this CuPy {cupy.__version__} is built for, and the one "
            f"here is for CUDA {cuda_version(driver)}: update the driver, or pip uninstall cupy-cuda{ours}x "
            f'and pip install "rnnkit[cuda{theirs}]"'
        )
    return (
        f"{needs} an NVIDIA GPU, and CuPy {cupy.__version__} finds none: "
        'check the driver with nvidia-smi, or use backend="numpy"'
    )


def _does_not_load(needs: str, error: BaseException) -> str:
    # CuPy 13 wraps the reason in a page of advice, whose cause it is.
    reason = error.__cause__ if str(error).startswith("\n") and error.__cause__ else error
    return (
        f"{needs} CuPy and the CUDA libraries of its version, which do not load here "
        f'({str(reason).partition(chr(10))[0]}): pip install "cupy-cuda13x[ctk]" '
        '(or "cupy-cuda12x[ctk]" for CUDA 12)'
    )


def cuda_version(number: int) -> str:
    """Return CUDA's number of a version, 13020, as people write it: 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def describe_cupy() -> list[str]:
    """Return CuPy's devices, versions and precision in lines to print; only where CuPy can be used."""
    cupy: Any = importlib.import_module("cupy")
    runtime = cupy.cuda.runtime
    lines = []
    for number in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(number)
        name, memory = properties["name"].decode(), properties["totalGlobalMem"] / 2**30
        capability = f"compute capability {properties['major']}.{properties['minor']}"
        lines.append(f"device {number}: {name}, {memory:.0f} GiB, {capability}")
    lines.append(
        f"CUDA {cuda_version(cupy.cuda.get_local_runtime_version())}; "
        f"the driver is for CUDA {cuda_version(runtime.driverGetVersion())}"
    )
    state = "on" if uses_tf32() else "off"
    lines.append(f"TF32 in float32 matrix products: {state} (CUPY_TF32=1 turns it on)")
    return lines


def uses_tf32() -> bool:
    """Whether CuPy's float32 matrix products may round their operands to TF32.

    CuPy reads CUPY_TF32 once, at the first such product; this function counts as one.
    """
    linalg: Any = importlib.import_module("cupy._core._routines_linalg")
    return bool(linalg.get_compute_type(np.dtype("float32")) == linalg.COMPUTE_TYPE_TF32)
