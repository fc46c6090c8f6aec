"""What only a GPU can show; every test that takes `backend` runs there too. ``pytest -m gpu``.

Streams, allocators, devices, memory that runs out, synchronisation, launches; and the parts of `bench.gpu`
that ask CUDA. No test here looks at how long anything took.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys

import numpy as np
import pytest
from host_device import require_cupys_bfloat16

import rnnkit
from bench import cases, ours
from bench.gpu import limits, measure, plan, rig, sides, soak
from bench.timing import Effort
from rnnkit import to_numpy
from rnnkit._array import BackendUnavailableError, resolve_backend

pytestmark = [
    pytest.mark.gpu,
    # What other libraries have to say about the machine is their affair.
    pytest.mark.filterwarnings("default"),
]

LAYERS = {"lstm": rnnkit.LSTM, "gru": rnnkit.GRU, "rnn": rnnkit.RNN}
KERNELS = (sides.WHOLE, *ours.kernel_modules("cupy"))
QUICK = Effort(0.0, 1)

# Keeps its stream busy for about half a second, and ends by itself.
SPIN = """
extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""
CYCLES = 1_000_000_000

# Kernels a step that rnnkit launches by itself, beside the matrix product of cuBLAS.
LAUNCHES = {"cuda": 1, sides.WHOLE: 0}
CUBLAS = re.compile(r"gemm|gemv|nvjet|cublas|cutlass|xmma|split", re.IGNORECASE)


@pytest.fixture
def cupy():
    """CuPy on a machine where it works."""
    try:
        resolve_backend("cupy")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    import cupy

    return cupy


@pytest.fixture
def torch(torch):
    """The peer, where it computes on the GPU as well."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch


@pytest.fixture(params=KERNELS)
def kernel(request, cupy, monkeypatch):
    """A kernel module, which then serves all layers; what it does not serve comes from the reference."""
    use(monkeypatch, request.param)
    return request.param


def use(monkeypatch, kernel):
    """Have all layers use one of `KERNELS`."""
    monkeypatch.setenv("RNNKIT_KERNELS", sides.module_of(kernel))
    monkeypatch.setenv("RNNKIT_PERSISTENT", str(int(kernel == sides.WHOLE)))


@pytest.fixture
def gpu(cupy):
    return rig.Gpu()


@pytest.fixture
def spin(cupy):
    """Return what keeps the current stream busy, and the event behind it."""
    kernel = cupy.RawKernel(SPIN, "spin")
    kernel((1,), (1,), (np.int64(1),))  # compiled before anybody waits for it

    def start():
        kernel((1,), (1,), (np.int64(CYCLES),))
        event = cupy.cuda.Event()
        event.record()
        return event

    return start


def both(layer, x, lengths, d_output):
    """Return all results of a layer there and back."""
    (output, state), pullback = layer.vjp(x, lengths=lengths)
    grads = pullback(d_output)
    states = state if isinstance(state, tuple) else (state,)
    return [output, *states, grads.x, grads.params.flat]


def problem(rng, layer, T, B, ragged=True):
    """Return random x, lengths and d_output on the layer's device."""
    x, d_output = (
        layer.asarray(rng.standard_normal((T, B, size))) for size in (layer.input_size, layer.hidden_size)
    )
    return x, layer.asarray(rng.integers(0, T + 1, B)) if ragged else None, d_output


def on_host(layer, *arrays):
    """Return what NumPy computes from the same numbers."""
    arrays = [None if array is None else to_numpy(array) for array in arrays]
    return both(layer.to("numpy"), *arrays)


def assert_close(ours, theirs, tolerance=1e-5):
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = to_numpy(mine), to_numpy(other)
        scale = max(1.0, float(np.max(np.abs(other), initial=0.0)))
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance * scale)


# ------------------------------------------------------------------------------------------- being right


def test_small_problems_of_every_kind(gpu):
    assert measure.verify(gpu) == []


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("precision", plan.PRECISIONS)
@pytest.mark.parametrize("operation", plan.OPERATIONS)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_rnnkit_and_torch_against_float64(gpu, cell, operation, precision, ragged):
    """All kernels, torch eager and torch as a graph; of torch only that it takes part where it can."""
    dtype = "float32" if precision == "tf32" else precision
    one = plan.Cell(cases.Case(operation, cell, 33, 24, 40, 136, dtype), precision == "tf32", ragged)
    with gpu.precision(one.tf32):
        checked = measure.check(one, sides.problem_of(one), gpu)
    wrong = {name: fault for name, fault in checked.faults.items() if fault[0] != "unsupported"}
    assert not wrong
    assert set(sides.peers_of(one, gpu)) <= set(checked.right)
    for name, error in checked.errors.items():
        if name.startswith("rnnkit") and precision in sides.HALF:
            assert error <= sides.HALF[precision], name


@pytest.mark.parametrize("cell", LAYERS)
def test_large_batches(kernel, cell, rng):
    """More sequences than a grid has blocks in its second dimension: 65535."""
    layer = LAYERS[cell](4, 8, backend="cupy", seed=0)
    arguments = problem(rng, layer, 3, 100_000)
    assert_close(both(layer, *arguments), on_host(layer, *arguments), 1e-4)  # sums over 300,000 terms


@pytest.mark.parametrize("cell", LAYERS)
def test_the_same_input_gives_the_same_bits(kernel, cell, rng):
    layer = LAYERS[cell](33, 65, backend="cupy", seed=0)
    arguments = problem(rng, layer, 20, 40)
    first = both(layer, *arguments)
    for _ in range(3):
        for one, other in zip(first, both(layer, *arguments), strict=True):
            np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


# ------------------------------------------------------------------------------------- streams and memory


@pytest.mark.parametrize("cell", LAYERS)
def test_a_foreign_stream(cupy, kernel, spin, cell, rng):
    """All work goes into the current stream: behind a spin, and behind the arrival of x."""
    layer = LAYERS[cell](5, 64, backend="cupy", seed=0)
    x, lengths, d_output = problem(rng, layer, 7, 6)
    expected = both(layer, x, lengths, d_output)
    late = cupy.full_like(x, np.nan)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        spin()
        cupy.copyto(late, x)
        results = both(layer, late, lengths, d_output)
        stream.synchronize()
        assert_close(results, expected, 1e-6)


def test_a_stream_of_torchs(cupy, rng, torch):
    layer = rnnkit.LSTM(5, 64, backend="cupy", seed=0)
    x, lengths, d_output = problem(rng, layer, 7, 6)
    expected = both(layer, x, lengths, d_output)
    cupy.cuda.runtime.deviceSynchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        doubled = torch.from_dlpack(x) * 2.0
        results = both(layer, doubled / 2.0, lengths, d_output)  # a tensor of torch's goes in as it is
        stream.synchronize()
        assert_close(results, expected, 1e-6)


def test_arrays_of_torch_are_shared_not_copied(cupy, torch):
    tensor = torch.ones(2, 1, 3, device="cuda")
    shared = resolve_backend("cupy").accept(tensor, "x")
    assert isinstance(shared, cupy.ndarray)
    assert shared.data.ptr == tensor.data_ptr()


@pytest.mark.parametrize("cell", LAYERS)
def test_a_users_allocator_gets_every_request(cupy, kernel, cell, rng):
    layer = LAYERS[cell](5, 64, backend="cupy", seed=0)
    arguments = problem(rng, layer, 7, 6)
    expected = both(layer, *arguments)  # and whatever is allocated once
    pool, sizes = cupy.cuda.MemoryPool(), []

    def allocate(size):
        sizes.append(size)
        return pool.malloc(size)

    default = cupy.get_default_memory_pool()
    gc.collect()
    total, used = default.total_bytes(), default.used_bytes()
    with cupy.cuda.using_allocator(allocate):
        results = both(layer, *arguments)
        assert pool.used_bytes() >= sum(result.nbytes for result in results)
        assert default.total_bytes() == total
        assert default.used_bytes() <= used
    assert sizes
    assert_close(results, expected, 1e-6)


@pytest.mark.parametrize("cell", LAYERS)
def test_memory_that_runs_out(cupy, kernel, cell, rng):
    """The error is CuPy's own and names the size; nothing stays behind, and a smaller call works."""
    layer = LAYERS[cell](16, 64, backend="cupy", seed=0)
    small, large = problem(rng, layer, 4, 8), problem(rng, layer, 64, 2048)
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=8 << 20)  # bytes: a quarter of an RNN's gates in the large call
    expected = on_host(layer, *small)
    with cupy.cuda.using_allocator(pool.malloc):
        for _ in range(2):
            with pytest.raises(
                cupy.cuda.memory.OutOfMemoryError, match=r"[Oo]ut of memory allocating [\d,]+ bytes"
            ):
                both(layer, *large)
        assert_close(both(layer, *small), expected)


def test_another_device(cupy, kernel, rng):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU alone")
    first = rnnkit.LSTM(5, 64, backend="cupy:0", seed=0)
    second = first.to("cupy:1")
    arguments = problem(rng, first, 7, 6)
    moved = [second.asarray(to_numpy(array)) for array in arguments]
    with cupy.cuda.Device(0):
        results = both(second, *moved)
        assert cupy.cuda.Device().id == 0
        assert {result.device.id for result in results} == {1}
        assert_close(results, both(first, *arguments), 1e-6)
    with pytest.raises(TypeError, match="x must lie on the device of backend 'cupy:1'"):
        second(arguments[0])


def test_training_on_another_device(cupy, kernel, counting, tmp_path):
    """All that a program calls: tests/test_backends.py asks the same of every function, without a GPU."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU alone")
    vocabulary, data = counting
    found = []
    for backend in ("cupy:0", "cupy:1"):
        model = rnnkit.LanguageModel(
            len(vocabulary), 16, embedding_dim=4, dropout=0.2, backend=backend, seed=0
        )
        history = rnnkit.fit(
            model, data, data, epochs=2, batch_size=8, clip_norm=1.0, seed=0, progress=False,
            checkpoint=tmp_path / backend.replace(":", ""),
        )  # fmt: skip
        found.append([*history.train_loss, *history.validation_loss, rnnkit.evaluate(model, data).loss])
        assert model.generate([0], 5, seed=0)
        assert model.params.flat.device.id == int(backend[-1])
        assert cupy.cuda.Device().id == 0
    np.testing.assert_allclose(*found, rtol=1e-5)


# -------------------------------------------------------------------------- synchronisation and launches


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("cell", LAYERS)
def test_nobody_waits_for_the_device(cupy, kernel, spin, cell, ragged, dtype, rng):
    """A layer returns, there and back, while the device has not even begun with it."""
    layer = LAYERS[cell](5, 64, backend="cupy", dtype=dtype, seed=0)
    # Few steps: a stream takes about a thousand launches before whoever launches has to wait.
    arguments = problem(rng, layer, 4, 8, ragged)
    for _ in range(2):  # compiled, and the memory in the pool
        both(layer, *arguments)
    cupy.cuda.runtime.deviceSynchronize()
    busy = spin()
    results = both(layer, *arguments)
    assert not busy.done
    busy.synchronize()
    assert busy.done
    assert_close(results, both(layer, *arguments), 0.0)


def launched(torch, call):
    """Return the names of the kernels that a call runs, CuPy's included, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.lower().startswith(("memcpy", "memset"))]


@pytest.mark.parametrize("direction", ["forward", "there and back"])
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("name", [name for name in KERNELS if name in LAUNCHES])
def test_launches_a_step(cupy, monkeypatch, name, cell, direction, rng, torch):
    use(monkeypatch, name)
    layer = LAYERS[cell](64, 64, backend="cupy", seed=0)
    counts = []
    for T in (8, 16, 24):
        x, _, d_output = problem(rng, layer, T, 16, ragged=False)

        def call(x=x, d_output=d_output):
            return layer(x) if direction == "forward" else both(layer, x, None, d_output)

        call()
        names = launched(torch, call)
        assert names, "the profiler saw no kernel"
        counts.append(sum(not CUBLAS.search(kernel) for kernel in names))
    scans = 1 if direction == "forward" else 2
    assert np.diff(counts).tolist() == [8 * scans * LAUNCHES[name]] * 2


# ------------------------------------------------------------------------- whole sequences in one launch

# (B, H): one block a group, several blocks, several groups of several blocks, rows that begin at odd places,
# several launches, of an LSTM and of an RNN, and streamed weights.
GROUPS = [(3, 40), (5, 256), (70, 264), (20, 301), (600, 200), (600, 512), (9, 1800)]
WHOLE_TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 1e-1}


@pytest.mark.parametrize("precision", plan.PRECISIONS)
@pytest.mark.parametrize("shape", GROUPS, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_whole_sequences_against_single_steps(gpu, monkeypatch, cell, shape, precision, rng):
    """Ragged, both directions, there and back."""
    B, H = shape
    dtype = "float32" if precision == "tf32" else precision
    if dtype == "bfloat16":
        require_cupys_bfloat16()
    layer = LAYERS[cell](9, H, bidirectional=True, backend="cupy", dtype=dtype, seed=0)
    x, d_output = (layer.asarray(rng.standard_normal((13, B, size))) for size in (9, 2 * H))
    lengths = layer.asarray(rng.integers(0, 14, B))
    with gpu.precision(precision == "tf32"):
        use(monkeypatch, "cuda")
        expected = both(layer, x, lengths, d_output)
        use(monkeypatch, sides.WHOLE)
        case = cases.Case("train", cell, 13, B, 9, H, dtype)
        if (reason := sides.why_not(sides.WHOLE, case, gpu, 2)) is not None:
            pytest.skip(reason)
        results = both(layer, x, lengths, d_output)
    assert_close(results, expected, WHOLE_TOLERANCE[precision])


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (700, 1501)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_clipping_and_adam_in_one_launch(cupy, gpu, monkeypatch, dtype, size, rng):
    """Against one after the other, and in every repetition the same bits, with another stream at work."""
    if dtype == "bfloat16":
        require_cupys_bfloat16()
    x, d_output = (rng.standard_normal((5, width)) for width in size)
    seed, clip_norm = int(rng.integers(1 << 30)), ((size[0] + 1) * size[1]) ** 0.5  # about half of the norm

    def run(kernel):
        use(monkeypatch, kernel)
        layer = rnnkit.Linear(*size, backend="cupy", dtype=dtype, seed=seed)
        optimizer = rnnkit.Adam(1e-3, weight_decay=0.1)
        for _ in range(3):
            _, pullback = layer.vjp(layer.asarray(x))
            grads = pullback(layer.asarray(d_output)).params
            norm = optimizer.step(layer.params, grads, clip_norm=clip_norm)
        return [to_numpy(value) for value in (norm, layer.params.flat, *optimizer.state.values())]

    expected, results = run("cuda"), []
    for _ in range(10):
        with gpu.busy():
            results.append(run(sides.WHOLE))
    assert_close(results[0], expected, {"float64": 1e-12, **WHOLE_TOLERANCE}[dtype])
    for result in results[1:]:
        for ours_, theirs in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(ours_, theirs)


def test_two_streams_of_whole_sequences(cupy, monkeypatch, rng):
    """Two launches that both want the whole device, again and again: each gets it in its turn."""
    use(monkeypatch, sides.WHOLE)
    layer = rnnkit.LSTM(8, 256, backend="cupy", seed=0)
    problems = [problem(rng, layer, 40, B) for B in (16, 64)]
    expected = [both(layer, *one) for one in problems]
    cupy.cuda.runtime.deviceSynchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    results = []
    for _ in range(20):
        results = []
        for stream, one in zip(streams, problems, strict=True):
            with stream:
                results.append(both(layer, *one))
    cupy.cuda.runtime.deviceSynchronize()
    for ours_, theirs in zip(results, expected, strict=True):
        assert_close(ours_, theirs, 0.0)


def test_whole_sequences_with_nan_and_infinity(cupy, monkeypatch, rng):
    """They spoil their own sequence from their step on, and nobody waits for ever."""
    layer = rnnkit.LSTM(8, 256, backend="cupy", seed=0)
    x, _, d_output = problem(rng, layer, 12, 9, ragged=False)
    x[5, 2, 0], x[7, 4, 1] = np.nan, np.inf
    use(monkeypatch, "cuda")
    expected = both(layer, x, None, d_output)
    use(monkeypatch, sides.WHOLE)
    for ours_, theirs in zip(both(layer, x, None, d_output), expected, strict=True):
        ours_, theirs = to_numpy(ours_), to_numpy(theirs)
        np.testing.assert_array_equal(np.isnan(ours_), np.isnan(theirs))
        np.testing.assert_allclose(ours_[~np.isnan(ours_)], theirs[~np.isnan(theirs)], rtol=0, atol=1e-4)


def test_a_kernel_reaches_the_error_flag(cupy, rng):
    """Its address, in memory of the host, is one that the device can write to."""
    from rnnkit.kernels.cuda import _loader

    flag = _loader.error_flag()
    flag.check()
    kernel = cupy.RawKernel(
        'extern "C" __global__ void fail(long long error) { *(volatile unsigned*)error = 1; }', "fail"
    )
    kernel((1,), (1,), (flag.address,))
    value = cupy.ones(1)
    with pytest.raises(RuntimeError, match="RNNKIT_PERSISTENT=0"):
        to_numpy(value)
    to_numpy(value)
    kernel((1,), (1,), (flag.address,))
    cupy.cuda.runtime.deviceSynchronize()
    with pytest.raises(RuntimeError, match="gave up"):
        flag.check()


def test_cupy_refuses_what_would_wait_for_ever(cupy):
    """A cooperative grid (1, n) that does not fit; of (n, 1) CuPy leaves blocks away."""
    from rnnkit.kernels.cuda import _loader

    kernel = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing").kernel
    blocks = 1 + 64 * _loader.limits().multiprocessors
    with pytest.raises(ValueError, match="exceeds the limit"):
        kernel((1, blocks), (32,), (), enable_cooperative_groups=True)
    with pytest.warns(UserWarning, match="will be reduced"):
        kernel((blocks,), (32,), (), enable_cooperative_groups=True)


def test_the_limits_are_the_devices(cupy):
    from rnnkit.kernels.cuda import _loader

    found = _loader.limits()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    assert found.multiprocessors == properties["multiProcessorCount"]
    assert found.shared_per_block == properties["sharedMemPerBlockOptin"]
    assert found.registers_per_multiprocessor == properties["regsPerMultiprocessor"]
    assert found.capability == (properties["major"], properties["minor"])


def test_soaking_for_a_moment(gpu):
    """`python -m bench.gpu --soak 10000` does so for longer."""
    assert soak.soak(gpu, 200, 1) == []


# ------------------------------------------------------------------------------------- what users pass in


def test_host_arrays_are_refused_with_the_call_that_moves_them(cupy):
    layer = rnnkit.LSTM(3, 4, backend="cupy", seed=0)
    with pytest.raises(TypeError, match=r"x must lie on the device of backend 'cupy'.*asarray\(value\)$"):
        layer(np.zeros((2, 1, 3), np.float32))
    with pytest.raises(
        TypeError, match=r"x must lie on the device of backend 'numpy'.*rnnkit\.to_numpy\(value\)$"
    ):
        layer.to("numpy")(layer.asarray(np.zeros((2, 1, 3))))


def test_lengths_may_come_from_the_host(cupy, rng):
    layer = rnnkit.GRU(3, 4, backend="cupy", seed=0)
    x, lengths, d_output = problem(rng, layer, 5, 6)
    expected = both(layer, x, lengths, d_output)
    assert_close(both(layer, x, to_numpy(lengths).tolist(), d_output), expected, 0.0)


def test_info_names_the_device(cupy):
    done = subprocess.run(
        [sys.executable, "-m", "rnnkit", "info"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    for text in ("cupy: available", f"device 0: {name}", "the driver is for CUDA", "TF32 in float32"):
        assert text in done.stdout


# ------------------------------------------------------------------------------------------ the benchmark


def test_both_libraries_settings_are_pinned_and_restored(gpu, torch):
    from rnnkit._cuda import uses_tf32

    def settings():
        return uses_tf32(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = settings()
    for tf32 in (True, False):
        with gpu.precision(tf32):
            assert settings() == (tf32,) * 3
        assert settings() == before


def test_tf32_is_less_exact_than_float32(cupy, gpu, rng):
    a = cupy.asarray(rng.standard_normal((256, 256)), cupy.float32)
    exact = to_numpy(a).astype(np.float64) @ to_numpy(a)
    errors = []
    for tf32 in (False, True):
        with gpu.precision(tf32):
            errors.append(np.abs(to_numpy(a @ a) - exact).max())
    # Sums of 256 products near 1, each rounded to 24 or to 11 bits.
    assert errors[0] < 1e-3 < errors[1]


def test_a_measured_cell(gpu, torch):
    found = measure.measure("q", plan.Cell(cases.Case("train", "lstm", 16, 8, 32, 32)), gpu, QUICK)
    assert {record["graphed"] for record in found} == {False, True}
    for record in found:
        assert (record["status"], record["reason"]) == ("ok", "")
        assert record["seconds"] > 0.0
        assert record["peer_seconds"] > 0.0
        assert "SMs" in record["device"]


def test_the_machines_limits(cupy, gpu):
    for limit in gpu.limits():
        with gpu.precision(limit.tf32):
            record = limits.measure(limit, QUICK, gpu.clock, gpu.facts)
        gpu.free()
        assert (record["status"], record["reason"]) == ("ok", ""), limit.detail
        assert record["seconds"] > 0.0
