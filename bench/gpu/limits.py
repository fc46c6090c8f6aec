"""What the machine does at best: copies, matrix products, launches, barriers.

A kernel's time is judged by these: a step of a recurrent layer that stays on the GPU costs at least a
barrier, one that does not at least a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..records import Record
from ..timing import Effort, Side, summarise
from .clock import Clock, alternate
from .plan import PRECISIONS

SOURCE = Path(__file__).with_name("barriers.cu")
COPIED = 1 << 30  # bytes: far more than any cache holds
PRODUCT = 8192  # of the square matrices: a TFLOP, far beyond where the rate still rises
SMALL = (16, 256, 1024)  # of the small product: one step of an LSTM, B = 16 and H = 256
BARRIERS = 1000  # in one launch, whose own cost then hardly shows
LAUNCHES = 100  # in one call, so that the clock's marks hardly show
CLUSTER = 8  # blocks, as in barriers.cu; more than that is not portable
CLUSTERED_BLOCKS = 128
BLOCK = 32  # threads: one waits, and a warp is the least there is


# Returns what is timed, and what says afterwards whether it did what it should.
Made = Callable[[], tuple[Callable[[], Any], Callable[[], bool]]]


class Limit(NamedTuple):
    """One thing to measure of a machine.

    Attributes
    ----------
    measure, detail : str
        What it is, in words.
    make : callable
        See `Made`.
    parts : int
        How many of it one call does.
    work : float
        Bytes or floating-point operations of one call, for the rate; 0 where there is none.
    unit : str
        The rate's.
    tf32 : bool
        Whether float32 products may use TF32.
    """

    measure: str
    detail: str
    make: Made
    parts: int = 1
    work: float = 0.0
    unit: str = ""
    tf32: bool = False


def measure(limit: Limit, effort: Effort, clock: Clock, facts: dict[str, Any]) -> Record:
    """Return the record of a limit; one that fails says so and stops nobody."""
    record: Record = {
        "measure": limit.measure, "detail": limit.detail, "seconds": None, "least": None, "spread": None,
        "rate": None, "unit": limit.unit, "status": "ok", "reason": "", **facts,
    }  # fmt: skip
    try:
        call, holds = limit.make()
        call()
        clock.synchronize()
        if not holds():
            return record | {"status": "wrong", "reason": "it did not do what it should"}
        samples = np.array(alternate([Side(limit.measure, call, dict)], effort, clock)[limit.measure])
        if not holds():
            return record | {"status": "wrong", "reason": "it did not do what it should, in the end"}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return record | {"status": "failed", "reason": reason}
    times = summarise((samples / limit.parts).tolist())
    rate = limit.work / (times.median * limit.parts) if limit.work else None
    least = float(samples.min()) / limit.parts
    return record | {"seconds": times.median, "least": least, "spread": times.spread, "rate": rate}


def of_host() -> list[Limit]:
    """Return the limits of a processor: enough to try the measuring itself."""
    size = 256

    def copy() -> tuple[Callable[[], Any], Callable[[], bool]]:
        source, target = np.ones(1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
        return lambda: np.copyto(target, source), lambda: bool(target.all())

    def product() -> tuple[Callable[[], Any], Callable[[], bool]]:
        a, out = np.ones((size, size), np.float32), np.zeros((size, size), np.float32)
        return lambda: np.matmul(a, a, out=out), lambda: bool((out == size).all())

    return [
        Limit("copy", "1 MiB", copy, work=2.0 * (1 << 20), unit="B/s"),
        Limit("matrix product", f"{size}, float32", product, work=2.0 * size**3, unit="FLOP/s"),
    ]


def of_gpu(cupy: Any, torch: Any) -> list[Limit]:
    """Return the limits of the current GPU; `torch` may be None."""
    found = [Limit("copy", "1 GiB, read and written", _copy(cupy), work=2.0 * COPIED, unit="B/s")]
    for precision in PRECISIONS if torch is not None else ():
        found.append(
            Limit("matrix product", f"{PRODUCT}, {precision}", _product(torch, precision),
                  work=2.0 * PRODUCT**3, unit="FLOP/s", tf32=precision == "tf32")
        )  # fmt: skip
    blocks = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["multiProcessorCount"]
    code = SOURCE.read_text(encoding="utf-8")
    module = cupy.RawModule(code=code)
    return [
        *found,
        Limit("launch", "CuPy RawKernel, empty", _empty(module, (1, 1), False), LAUNCHES),
        Limit("launch", f"cooperative, {blocks} blocks, empty", _empty(module, (1, blocks), True), LAUNCHES),
        Limit("launch", "as rnnkit launches each step of a scan", _step(cupy), LAUNCHES),
        Limit("launch", "CuPy elementwise, out=, 4096 numbers", _elementwise(cupy), LAUNCHES),
        Limit("launch", f"CuPy matmul, out=, {SMALL}, float32", _small_product(cupy), LAUNCHES),
        Limit("barrier", f"grid, {blocks} blocks", _grid(cupy, module, blocks), BARRIERS),
        Limit("barrier", f"cluster, {CLUSTER} blocks, {CLUSTERED_BLOCKS // CLUSTER} clusters",
              _cluster(module), BARRIERS),
    ]  # fmt: skip


def _copy(cupy: Any) -> Made:
    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        source = cupy.arange(COPIED // 4, dtype=cupy.float32)
        target = cupy.zeros_like(source)
        return lambda: cupy.copyto(target, source), lambda: bool((target == source).all())

    return make


def _product(torch: Any, precision: str) -> Made:
    """Return a large product of torch's, on random numbers: zeros run faster."""

    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
        a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.matmul(a, b, out=out), lambda: bool(torch.isfinite(out).all())

    return make


def _repeated(launch: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        for _ in range(LAUNCHES):
            launch()

    return call


def _empty(module: Any, grid: tuple[int, int], cooperative: bool) -> Made:
    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        raw = module.get_function("empty")
        if not cooperative:
            return _repeated(lambda: raw(grid, (BLOCK,), ())), lambda: True
        return _repeated(lambda: _together(raw, grid, ())), lambda: True

    return make


def _together(raw: Any, grid: tuple[int, int], arguments: tuple[Any, ...]) -> None:
    """Launch a kernel whose blocks are all there at the same time; rnnkit's loader says why in this way."""
    raw.kernel(grid, (BLOCK,), arguments, enable_cooperative_groups=True)


def _step(cupy: Any) -> Made:
    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        from rnnkit.kernels.cuda._step import elementwise

        h = cupy.zeros((1, BLOCK), cupy.float32)
        gates, output = cupy.ones((1, 1, BLOCK), cupy.float32), cupy.zeros((1, 1, BLOCK), cupy.float32)
        launch = elementwise("rnn", "rnn_forward", "float32", 1, BLOCK, (gates, h, output, None, 0))
        return _repeated(lambda: launch(0)), lambda: bool((output > 0).all())

    return make


def _elementwise(cupy: Any) -> Made:
    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        a, out = cupy.ones(4096, cupy.float32), cupy.zeros(4096, cupy.float32)
        return _repeated(lambda: cupy.tanh(a, out=out)), lambda: bool((out > 0).all())

    return make


def _small_product(cupy: Any) -> Made:
    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        rows, inner, columns = SMALL
        a, b = cupy.ones((rows, inner), cupy.float32), cupy.ones((inner, columns), cupy.float32)
        out = cupy.zeros((rows, columns), cupy.float32)
        return _repeated(lambda: cupy.matmul(a, b, out=out)), lambda: bool((out == inner).all())

    return make


def _grid(cupy: Any, module: Any, blocks: int) -> Made:
    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        kernel = module.get_function("grid_barriers")
        arrived, failed = cupy.zeros(1, cupy.uint32), cupy.zeros(1, cupy.int32)

        def call() -> None:
            arrived.fill(0)
            # As (1, n): CuPy shrinks a cooperative grid (n, 1) that does not fit, but raises for this one.
            _together(kernel, (1, blocks), (arrived, failed, np.int32(BARRIERS)))

        return call, lambda: int(arrived[0]) == blocks * BARRIERS and not int(failed[0])

    return make


def _cluster(module: Any) -> Made:
    def make() -> tuple[Callable[[], Any], Callable[[], bool]]:
        kernel = module.get_function("cluster_barriers")
        return lambda: kernel((CLUSTERED_BLOCKS,), (BLOCK,), (np.int32(BARRIERS),)), lambda: True

    return make
