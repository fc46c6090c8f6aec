"""The host device itself: that it computes what a device would, and that it catches what it must catch."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from host_device import HERE, ORDERS, HostDevice, fenced, kernel_source, require_compiler

SCHEDULES = list(ORDERS)


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    require_compiler()
    return HostDevice(tmp_path_factory.mktemp("planted"))


@pytest.fixture(params=SCHEDULES)
def launch(planted, request):
    """Launch a kernel of planted.cu, in float64, under one of the schedules."""
    planted.order = request.param

    def call(name, grid, block, args, dtype="float64", shared=0, cooperative=False):
        source = kernel_source()
        options = source.options(dtype, vector=1)
        module = planted.raw_module(
            code=source.source(HERE / "planted.cu"), options=options, enable_cooperative_groups=cooperative
        )
        module.get_function(name)(grid, block, args, shared_mem=shared)

    return call


def drawn(rng, n):
    x = fenced(n, np.float64)
    x[...] = rng.standard_normal(n)
    return x


def test_barriers_order_what_threads_exchange(launch, rng):
    x, y = drawn(rng, 96), fenced(96, np.float64)
    launch("reversed", (1,), (96,), (x, y), shared=96 * 8)
    np.testing.assert_array_equal(y, x[::-1])
    launch("rotated", (1,), (96,), (x, y, 5), shared=96 * 8)
    np.testing.assert_array_equal(y, np.roll(x, -5))


def test_a_missing_barrier_is_caught(launch, rng):
    x, y = drawn(rng, 96), fenced(96, np.float64)
    launch("reversed_without_barrier", (1,), (96,), (x, y), shared=96 * 8)
    assert not np.array_equal(y, x[::-1])


def test_a_missing_second_barrier_is_caught(launch, rng):
    x, y = drawn(rng, 96), fenced(96, np.float64)
    launch("rotated_without_second_barrier", (1,), (96,), (x, y, 5), shared=96 * 8)
    assert not np.array_equal(y, np.roll(x, -5))


def test_a_divergent_barrier_is_reported(launch):
    for name in ("divergent", "divergent_lines"):
        with pytest.raises(AssertionError, match="divergent barrier"):
            launch(name, (1,), (8,), (fenced(8, np.float64),))


def test_a_thread_that_waits_for_ever_is_reported(launch):
    with pytest.raises(AssertionError, match="every thread spins"):
        launch("spins_for_ever", (1,), (2,), (np.zeros(1),))


def test_a_write_beyond_an_array_is_caught(launch):
    x = fenced(8, np.float64)
    launch("writes_beyond", (1,), (1,), (x, 7))
    with pytest.raises(AssertionError, match="wrote beyond argument 0"):
        launch("writes_beyond", (1,), (1,), (x, 8))
    with pytest.raises(AssertionError, match="wrote beyond argument 0"):
        launch("writes_before", (1,), (1,), (fenced(8, np.float64),))
    launch("writes_beyond_shared", (1,), (1,), (7,), shared=64)
    with pytest.raises(AssertionError, match="behind the shared memory"):
        launch("writes_beyond_shared", (1,), (1,), (8,), shared=64)


def test_shuffles_and_ballots(launch, rng):
    x, down, across = drawn(rng, 64), fenced(2, np.float64), fenced(64, np.float64)
    launch("warp_sums", (1,), (64,), (x, down, across))
    np.testing.assert_allclose(down, x.reshape(2, 32).sum(axis=1), rtol=0, atol=1e-13)
    np.testing.assert_allclose(across, np.repeat(down, 32), rtol=0, atol=1e-13)
    votes, count = fenced(2, np.int64), fenced(1, np.int64)
    launch("negatives", (1,), (64,), (x, votes, count))
    assert [f"{vote:032b}"[::-1] for vote in votes] == [
        "".join("1" if value < 0 else "0" for value in half) for half in x.reshape(2, 32)
    ]
    assert count[0] == (x < 0).sum()


def test_all_blocks_of_a_cooperative_launch_meet(launch):
    x = fenced(5, np.float64)
    x[...] = np.arange(5.0)
    launch("around_the_grid", (5,), (3,), (x, 7), cooperative=True)
    np.testing.assert_array_equal(x, np.roll(np.arange(5.0), 7) + 7)
    counter, y = np.zeros(1, np.int64), fenced(10, np.float64)
    launch("meet_at_a_counter", (5,), (2,), (y, counter), cooperative=True)
    np.testing.assert_array_equal(y, np.full(10, 5.0))
    with pytest.raises(AssertionError, match="every thread spins"):  # one block after the other: none comes
        launch("meet_at_a_counter", (5,), (2,), (y, np.zeros(1, np.int64)))


def test_arguments_are_checked_against_the_declaration(launch):
    x, readonly = fenced(4, np.float64), np.zeros(4)
    readonly.flags.writeable = False
    call = partial(launch, "writes_beyond", (1,), (1,))
    for wrong, message in [
        ((x,), "takes 2 arguments"),
        ((x, 1.0), "argument 1"),
        ((x, np.int32(1)), "argument 1"),
        ((x.astype(np.float32), 1), "points to 'd'"),
        ((x[::2], 1), "not in C order"),
        ((readonly, 1), "would be written"),
    ]:
        with pytest.raises(AssertionError, match=message):
            call(wrong)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_as_everywhere(launch, rng, dtype):
    """Every number of either type comes back, and what lies between rounds to the nearest, ties to even."""
    kind = np.dtype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        every = np.arange(1 << 16, dtype=np.uint16).view(kind).astype(np.float32)
    ordered = np.unique(every[np.isfinite(every)])
    middle = ordered[1:] / 2 + ordered[:-1] / 2
    spread = (10.0 ** rng.uniform(-10, 6, 5000) * rng.choice([-1, 1], 5000)).astype(np.float32)
    x = np.concatenate([every, middle, np.nextafter(middle, np.float32(0)), spread])
    y, back = fenced(x.shape, kind), fenced(x.shape, np.float32)
    launch("halves", (-(-x.size // 128),), (128,), (x, y, back, x.size), dtype=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(kind)
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(back, expected.astype(np.float32))
