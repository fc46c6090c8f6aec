"""The machine that a run happens on: `Gpu`, or `Host`, which stands in for it in tests.

Everything that asks CuPy or CUDA for something is in `Gpu` and in `limits`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from rnnkit._array import BackendUnavailableError, resolve_backend
from rnnkit._cuda import cuda_version

from ..records import processor, versions_of
from ..timing import Side
from . import limits
from .clock import Clock, HostClock
from .limits import Limit

# Of the square matrices that keep another stream busy, a few milliseconds long in blocks that come and go.
BUSY, BUSY_PRODUCTS = 1536, 20
WARM_UPS = 3  # before a capture: torch allocates and chooses algorithms in its first calls


class Rig(Protocol):
    """What a run needs of its machine.

    Attributes
    ----------
    backend : str
        rnnkit's.
    torch_device : str or None
        Where torch computes; None where it cannot, and no peer takes part.
    graphs : bool
        Whether torch can capture what it does as a graph.
    clock : Clock
    facts : dict
        What every record says of the machine: device, driver, cuda, versions, processor.
    """

    backend: str
    torch_device: str | None
    graphs: bool
    clock: Clock
    facts: dict[str, Any]

    def precision(self, tf32: bool) -> AbstractContextManager[None]:
        """Return a context in which every library's float32 products use TF32, or none does."""

    def graphed(self, make: Callable[[], Side]) -> Side:
        """Return a side of torch as a graph, which repeats its launches without torch."""

    def limits(self) -> list[Limit]:
        """Return what to measure of the machine itself."""

    def busy(self) -> AbstractContextManager[None]:
        """Return a context in which another stream has work that competes for the device."""

    def free(self) -> None:
        """Give all cached memory back, so that one library's cache does not starve the other."""

    def without_pool(self) -> AbstractContextManager[None]:
        """Return a context in which each array has memory of its own, whose ends a sanitizer knows."""


class Host:
    """The processor in place of a GPU: NumPy for CuPy, torch's CPU, no graphs, no TF32."""

    backend = "numpy"
    graphs = False

    def __init__(self) -> None:
        self.torch_device = "cpu" if importlib.util.find_spec("torch") else None
        self.clock: Clock = HostClock()
        self.facts = {
            "device": "no GPU", "driver": "", "cuda": "",
            "versions": versions_of(("rnnkit", "numpy", "torch")), "processor": processor(),
        }  # fmt: skip

    def precision(self, tf32: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def graphed(self, make: Callable[[], Side]) -> Side:
        raise NotImplementedError("there are no graphs on a processor")

    def limits(self) -> list[Limit]:
        return limits.of_host()

    def busy(self) -> AbstractContextManager[None]:
        return nullcontext()

    def free(self) -> None:
        gc.collect()

    def without_pool(self) -> AbstractContextManager[None]:
        return nullcontext()


class GpuClock:
    """CUDA events on CuPy's current stream, which is torch's as well: `Gpu` makes sure of that."""

    def __init__(self) -> None:
        self._cuda: Any = importlib.import_module("cupy").cuda

    def mark(self) -> Any:
        event = self._cuda.Event()
        event.record()
        return event

    def synchronize(self) -> None:
        self._cuda.runtime.deviceSynchronize()

    def seconds(self, start: Any, stop: Any) -> float:
        return 1e-3 * float(self._cuda.get_elapsed_time(start, stop))


class Gpu:
    """The current CUDA device: CuPy, and torch where it is installed and sees the device too.

    Raises
    ------
    BackendUnavailableError
        There is no device, CuPy cannot use it, or something outside decides what would be pinned here.
    """

    backend = "cupy"

    def __init__(self) -> None:
        resolve_backend("cupy")
        if "NVIDIA_TF32_OVERRIDE" in os.environ:
            raise BackendUnavailableError(
                "NVIDIA_TF32_OVERRIDE is set and overrules the TF32 settings that are pinned here: unset it"
            )
        self._cupy: Any = importlib.import_module("cupy")
        self._torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
        if self._torch is not None and not self._torch.cuda.is_available():
            self._torch = None
        self.torch_device = None if self._torch is None else "cuda"
        self.graphs = self._torch is not None
        self.clock: Clock = GpuClock()
        self.facts = self._facts()
        self._check_streams()

    def _check_streams(self) -> None:
        """Make sure that both libraries enqueue in one stream: events of one then time the other too."""
        ours = self._cupy.cuda.get_current_stream().ptr
        theirs = ours if self._torch is None else self._torch.cuda.current_stream().cuda_stream
        if ours != theirs:
            raise BackendUnavailableError(
                f"CuPy's current stream is {ours} and torch's is {theirs}, so neither can time the other: "
                "unset CUPY_CUDA_PER_THREAD_DEFAULT_STREAM"
            )

    def _facts(self) -> dict[str, Any]:
        runtime = self._cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self._cupy.cuda.Device().id)
        memory = properties["totalGlobalMem"] / 2**30
        versions = versions_of(("rnnkit", "numpy", "cupy", "torch"))
        if self._torch is not None:
            versions["cudnn"] = str(self._torch.backends.cudnn.version())
            versions["torch's CUDA"] = str(self._torch.version.cuda)
        return {
            "device": f"{properties['name'].decode()}, {properties['multiProcessorCount']} SMs, "
            f"{memory:.0f} GiB",
            "driver": driver_version() or f"for CUDA {cuda_version(runtime.driverGetVersion())}",
            "cuda": cuda_version(self._cupy.cuda.get_local_runtime_version()),
            "versions": versions,
            "processor": processor(),
        }

    @contextmanager
    def precision(self, tf32: bool) -> Iterator[None]:
        # CuPy has no public setter: CUPY_TF32 is read once, at the first product of a dtype.
        linalg: Any = importlib.import_module("cupy._core._routines_linalg")
        float32 = np.dtype("float32")
        before = linalg.get_compute_type(float32)
        settings = [] if self._torch is None else [
            (self._torch.backends.cudnn, self._torch.backends.cudnn.allow_tf32),
            (self._torch.backends.cuda.matmul, self._torch.backends.cuda.matmul.allow_tf32),
        ]  # fmt: skip
        try:
            linalg.set_compute_type(
                float32, linalg.COMPUTE_TYPE_TF32 if tf32 else linalg.COMPUTE_TYPE_DEFAULT
            )
            for setting, _ in settings:
                setting.allow_tf32 = tf32
            yield
        finally:
            linalg.set_compute_type(float32, before)
            for setting, value in settings:
                setting.allow_tf32 = value

    def graphed(self, make: Callable[[], Side]) -> Side:
        cuda = self._torch.cuda
        # Tensors of its own, warmed up in the capture's stream: autograd remembers in which stream a leaf
        # was used first, and one of another stream would break the capture.
        stream, graph = cuda.Stream(), cuda.CUDAGraph()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):  # around the capture too: one that fails does not go back by itself
            side = make()
            with side.scope():
                for _ in range(WARM_UPS):
                    side.call()
                with cuda.graph(graph, stream=stream):
                    result = side.call()

        def replay() -> Any:
            graph.replay()
            return result

        return Side(f"{side.name}, graphed", replay, side.results)

    def limits(self) -> list[Limit]:
        return limits.of_gpu(self._cupy, self._torch)

    @contextmanager
    def busy(self) -> Iterator[None]:
        with self._cupy.cuda.Stream(non_blocking=True) as stream:
            a = self._cupy.ones((BUSY, BUSY), self._cupy.float32)
            out = self._cupy.empty_like(a)
            for _ in range(BUSY_PRODUCTS):
                self._cupy.matmul(a, a, out=out)
        yield
        stream.synchronize()

    def free(self) -> None:
        gc.collect()
        self._cupy.get_default_memory_pool().free_all_blocks()
        if self._torch is not None:
            self._torch.cuda.empty_cache()

    def without_pool(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._cupy.cuda.using_allocator(None)
        return context


def driver_version() -> str:
    """Return the NVIDIA driver's version as nvidia-smi knows it; empty where that does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.partition("\n")[0].strip()
