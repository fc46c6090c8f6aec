"""What a GPU alone can show of the CuPy kernels: streams, allocators, devices, and that nobody waits.

Their numbers are compared in tests/test_kernels.py ("cuda-gpu") and by every test that takes `backend`.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_kernels import assert_close

import rnnkit

pytestmark = pytest.mark.gpu

# Long enough for the host to launch a layer there and back, short enough for a test.
SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
}
"""


@pytest.fixture
def cupy():
    module = pytest.importorskip("cupy")
    if not module.cuda.is_available():
        pytest.skip("no GPU")
    return module


@pytest.fixture(params=[rnnkit.RNN, rnnkit.GRU, rnnkit.LSTM])
def there_and_back(request, rng):
    """Return a function that runs a ragged layer of a backend there and back and returns all its results."""
    x, d_output = rng.standard_normal((9, 4, 6)), rng.standard_normal((9, 4, 8))
    lengths, seed = rng.integers(0, 10, 4), int(rng.integers(1 << 30))

    def run(backend):
        layer = request.param(6, 8, backend=backend, seed=seed)
        arguments = [layer.asarray(x), layer.asarray(lengths), layer.asarray(d_output)]

        def call():
            (output, _), pullback = layer.vjp(arguments[0], lengths=arguments[1])
            grads = pullback(arguments[2])
            return [output, grads.x, grads.params.flat]

        return call

    return run


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert_close(rnnkit.to_numpy(one), rnnkit.to_numpy(other), 1e-5, "on the GPU")


def test_the_kernels_are_taken(cupy):
    text = rnnkit.LSTM(6, 8, backend="cupy").explain()
    assert "lstm_forward: cuda" in text
    assert "float32 products in" in text


def test_nobody_waits_for_the_device(cupy, there_and_back):
    call = there_and_back("cupy")
    expected = call()  # compiles, which does wait
    spin, done = cupy.RawKernel(SPIN, "spin"), cupy.cuda.Event()
    spin((1,), (1,), (0,))
    spin((1,), (1,), (2_000_000_000,))
    done.record()
    results = call()
    assert not done.done, "the layer returned only after the device had done what was in its queue"
    same(results, expected)


def test_the_current_stream_is_used(cupy, there_and_back):
    call = there_and_back("cupy")
    expected = call()
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        results = call()
    stream.synchronize()
    same(results, expected)


def test_the_current_allocator_is_used(cupy, there_and_back):
    call, pool = there_and_back("cupy"), cupy.cuda.MemoryPool()
    before = cupy.get_default_memory_pool().total_bytes()
    with cupy.cuda.using_allocator(pool.malloc):
        results = call()
        assert pool.used_bytes() > 0
    assert cupy.get_default_memory_pool().total_bytes() == before
    assert np.isfinite(rnnkit.to_numpy(results[0])).all()


def test_another_device_is_used_and_the_current_one_stays(cupy, there_and_back):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")
    expected = there_and_back("cupy")()
    results = there_and_back("cupy:1")()
    assert cupy.cuda.Device().id == 0
    assert all(result.device.id == 1 for result in results)
    same(results, expected)
