"""The host device itself: that it computes what a device would, and that it catches what it must catch."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from host_device import HERE, ORDERS, HostDevice, fenced, kernel_source, on_host, require_compiler

SCHEDULES = list(ORDERS)


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    require_compiler()
    return HostDevice(tmp_path_factory.mktemp("planted"))


@pytest.fixture(params=SCHEDULES)
def launch(planted, request):
    """Launch a kernel of planted.cu, in float64, or of another file under one of the schedules."""
    planted.order = request.param

    def call(
        name, grid, block, args, *, file="planted", most_shared=None, shared=0, cooperative=False, **variant
    ):
        function_ = function(planted, name, file, **variant)
        if most_shared is not None:
            function_.max_dynamic_shared_size_bytes = most_shared
        function_.kernel(grid, block, args, shared_mem=shared, enable_cooperative_groups=cooperative)

    return call


def function(device, name, file="planted", dtype="float64"):
    source = kernel_source()
    code, options = source.source(HERE / f"{file}.cu"), source.options(dtype, vector=1)
    return device.raw_module(code=code, options=options).get_function(name)


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


def test_none_is_refused_where_zero_is_a_null_pointer(launch):
    """CuPy 13 ends the process at a launch with None, CuPy 14 takes it: no kernel may get one."""
    with pytest.raises(AssertionError, match="argument 1 of reversed is None"):
        launch("reversed", (1,), (32,), (fenced(32, np.float64), None), shared=32 * 8)
    loader = on_host().parts["rnnkit.kernels.cuda_on_host._loader"]
    assert loader.or_null((None, 1.5, 0, None)) == (0, 1.5, 0, 0)


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


# ------------------------------------------------------------------- what a whole sequence's kernels need


HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def matrices(rng, rows, depth, columns, dtype):
    """Return a (rows, depth), b (depth, columns), d (rows, columns) in fences, d float32."""
    arrays = [fenced(shape, dtype) for shape in ((rows, depth), (depth, columns))]
    arrays.append(fenced((rows, columns), np.float32))
    for array in arrays:
        array[...] = rng.standard_normal(array.shape)
    return arrays


def exact_product(a, b, d):
    return d.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_warp_multiplies_halves(launch, rng, dtype):
    a, b, d = matrices(rng, 16, 16, 8, HALVES[dtype])
    expected = exact_product(a, b, d)
    tensor = partial(launch, file="planted_persistent", dtype=dtype)
    tensor("product_of_halves", (1,), (32,), (a, b, d))
    np.testing.assert_allclose(d, expected, rtol=0, atol=1e-5)
    tensor("product_with_wrong_lanes", (1,), (32,), (a, b, d))
    assert np.abs(d - exact_product(a, b, expected)).max() > 1e-2
    a[3, 4], b[1, 2] = np.nan, np.inf
    tensor("product_of_halves", (1,), (32,), (a, b, d))
    assert np.isnan(d[3]).all()
    assert (np.isinf(d[:, 2]) | np.isnan(d[:, 2])).all()
    assert np.isfinite(np.delete(np.delete(d, 3, axis=0), 2, axis=1)).all()


def test_a_warp_multiplies_in_tf32(launch, rng):
    a, b, d = matrices(rng, 16, 8, 8, np.float32)
    expected = exact_product(a, b, d)
    # Each operand is off by up to 2^-11, and there are eight products.
    bound = 2**-10 * (np.abs(a).astype(np.float64) @ np.abs(b)) + 1e-5
    tensor = partial(launch, file="planted_persistent", dtype="float16")
    tensor("product_in_tf32", (1,), (32,), (a, b, d))
    error = np.abs(d - expected)
    assert (error <= bound).all()
    assert error.max() > 1e-5
    with pytest.raises(AssertionError, match="has not rounded"):
        tensor("product_of_unrounded", (1,), (32,), (a, b, d))


def test_tf32_rounds_to_the_nearest_and_ties_away_from_zero(launch, rng):
    x, bits = fenced(64, np.float32), fenced(64, np.uint32)
    x[...] = rng.standard_normal(64)
    x[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-11, -1 - 2**-11, 2**-140]
    launch("rounded_to_tf32", (1,), (64,), (x, bits), file="planted_persistent", dtype="float16")
    rounded = bits.view(np.float32)
    assert not (bits & 0x1FFF).any()
    np.testing.assert_array_equal(rounded[:8], [0, 0, np.inf, -np.inf, np.nan, 1 + 2**-10, -1 - 2**-10, 0])
    assert (np.abs(rounded[8:] - x[8:]) <= 2**-11 * 2.0 ** np.floor(np.log2(np.abs(x[8:])))).all()


def test_a_product_needs_all_lanes_in_one_place(launch, rng):
    a, b, d = matrices(rng, 16, 16, 8, np.float16)
    tensor = partial(launch, file="planted_persistent", dtype="float16")
    with pytest.raises(AssertionError, match="divergent barrier"):
        tensor("product_of_half_a_warp", (1,), (32,), (a, b, d))
    with pytest.raises(AssertionError, match="divergent barrier"):
        tensor("product_in_two_places", (1,), (32,), (a, b, d))
    with pytest.raises(AssertionError, match="a warp of 32 lanes"):
        tensor("product_of_half_a_warp", (1,), (16,), (a, b, d))


# --------------------------------------------------------------------------------------------- races


@pytest.fixture(scope="session")
def racing(tmp_path_factory):
    """A device whose kernels report races."""
    require_compiler()
    device = HostDevice(tmp_path_factory.mktemp("racing"))
    device.check_races = True
    return device


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize(("name", "fault"), [
    ("reversed", "reversed_without_barrier"), ("rotated", "rotated_without_second_barrier")
])  # fmt: skip
def test_a_race_is_found_in_any_order(racing, rng, name, fault, order):
    """A missing barrier shows in the first launch, whoever came first in it."""
    racing.order = order
    x, y = drawn(rng, 64), fenced(64, np.float64)
    args = (x, y) if name == "reversed" else (x, y, 3)
    function(racing, name)((1,), (64,), args, shared_mem=64 * 8)
    with pytest.raises(AssertionError, match="a race"):
        function(racing, fault)((1,), (64,), args, shared_mem=64 * 8)


@pytest.mark.parametrize("order", SCHEDULES)
def test_a_race_between_blocks_is_found_in_any_order(racing, order):
    """Also where a plain store takes the place of a release, which the order of threads never shows."""
    racing.order = order

    def run(name):
        x, count, error = fenced((2, 3, 40), np.float32), *(np.zeros(1, np.uint32) for _ in range(2))
        x[...] = 1
        call = function(racing, name, "planted_persistent", "float16").kernel
        call(
            (1, 3), (40,), (x, count, error, 1 << 20, 3), shared_mem=4, enable_cooperative_groups=True
        )  # fmt: skip

    run("added_up")
    for fault in ("without_wait", "without_barrier", "in_one_slot", "without_release"):
        with pytest.raises(AssertionError, match="a race"):
            run(f"added_up_{fault}")


@pytest.mark.parametrize("order", SCHEDULES)
def test_a_race_of_a_copy_is_found_in_any_order(racing, rng, order):
    racing.order = order
    x = fenced(64, np.float32)
    x[...] = rng.standard_normal(64)

    def run(name):
        call = function(racing, name, "planted_persistent", "float16")
        call((1,), (16,), (x, fenced(128, np.float32), 24), shared_mem=512)

    run("copied")
    for fault in ("without_wait", "without_barrier"):
        with pytest.raises(AssertionError, match="a race"):
            run(f"copied_{fault}")


# ------------------------------------------------------------------------------------------- waiting


BLOCKS, THREADS, ROUNDS = 5, 40, 6


@pytest.fixture
def adding(launch, rng):
    """Return a function that runs a variant of added_up: its result, the expected one, the error."""

    def run(name, patience=1 << 20, rounds=ROUNDS):
        x, count, error = (
            fenced(shape, kind)
            for shape, kind in [((2, BLOCKS, THREADS), np.float32), (1, np.uint32), (1, np.uint32)]
        )
        x[...] = np.nan
        x[0] = now = rng.integers(0, 4096, (BLOCKS, THREADS)).astype(np.float64)
        count[...] = error[...] = 0
        launch(
            name, (1, BLOCKS), (THREADS,), (x, count, error, patience, rounds), shared=4,
            file="planted_persistent", dtype="float16", cooperative=True,
        )  # fmt: skip
        for _ in range(rounds):
            total = now.sum(axis=0)
            now = total % 4096 + np.arange(BLOCKS * THREADS).reshape(BLOCKS, THREADS)
        return x[0 if "one_slot" in name else rounds % 2], now, int(error[0])

    return run


def test_blocks_wait_for_each_other(adding):
    ours, expected, error = adding("added_up")
    np.testing.assert_array_equal(ours, expected)
    assert error == 0


@pytest.mark.parametrize("fault", ["without_wait", "without_barrier", "in_one_slot"])
def test_a_fault_in_waiting_is_caught(adding, planted, fault):
    """By the order `uneven`, which lets other blocks and warps run ahead in every launch."""
    planted.order = "uneven"
    right = [np.array_equal(*adding(f"added_up_{fault}")[:2]) for _ in range(20)]
    assert not all(right)
    assert fault != "without_wait" or not any(right)


def test_a_wait_without_an_end_is_given_up_or_reported(adding):
    ours, expected, error = adding("added_up_by_one_block_less", patience=50)
    assert error == 1
    assert not np.array_equal(ours, expected)
    with pytest.raises(AssertionError, match=r"every thread spins, thread .* in line"):
        adding("added_up_by_one_block_less")


def test_a_spin_without_a_pause_is_reported(launch):
    with pytest.raises(AssertionError, match="a spin without pause"):
        launch(
            "spins_without_pause", (1,), (1,), (np.zeros(1, np.uint32),), file="planted_persistent",
            dtype="float16", cooperative=True,
        )  # fmt: skip


def test_copies_arrive_when_they_are_waited_for(launch, rng):
    x = fenced(64, np.float32)
    x[...] = rng.standard_normal(64)

    def copied(name, *more):
        y = fenced(128, np.float32)
        launch(name, (1,), (16,), (x, y, *more), shared=512, file="planted_persistent", dtype="float16")
        return y

    y = copied("copied", 24)
    np.testing.assert_array_equal(y[:64], np.roll(np.where(np.arange(64) < 24, x, 0), -4))
    np.testing.assert_array_equal(y[64:], x)
    for fault in ("without_wait", "without_barrier"):
        assert np.isnan(copied(f"copied_{fault}", 24)[:64]).any()
    with pytest.raises(AssertionError, match="before its copies arrived"):
        launch("copied_and_left", (1,), (1,), (x,), shared=16, file="planted_persistent", dtype="float16")
    with pytest.raises(AssertionError, match="outside of the shared memory"):
        launch("copied_and_left", (1,), (1,), (x,), shared=8, file="planted_persistent", dtype="float16")
    with pytest.raises(AssertionError, match="a misaligned copy"):
        launch("copied_and_left", (1,), (1,), (x[1:],), shared=16, file="planted_persistent", dtype="float16")
    y = fenced(1, np.float32)
    launch(
        "zeros_copied", (1,), (1,), (x, y), shared=16, file="planted_persistent",
        dtype="float16",
    )  # fmt: skip
    assert y[0] == 0
    with pytest.raises(AssertionError, match="a misaligned copy"):  # though nothing is read from there
        launch("zeros_copied", (1,), (1,), (x[1:], y), shared=16, file="planted_persistent", dtype="float16")


def test_a_misaligned_access_is_reported(launch, rng):
    x, y = fenced(16, np.float32), fenced(4, np.float32)
    x[...] = rng.standard_normal(16)
    load = partial(launch, "loads_16_bytes", (1,), (1,), file="planted_persistent", dtype="float16")
    load((x, y, 8))
    np.testing.assert_array_equal(y, x[8:12])
    with pytest.raises(AssertionError, match="a misaligned access"):
        load((x, y, 9))


def test_shared_memory_must_have_been_asked_for(launch, rng):
    """As on a device: above 48 KB a launch fails unless the function's attribute was raised."""
    x, y = drawn(rng, 96), fenced(96, np.float64)
    call = partial(launch, "reversed", (1,), (96,), (x, y))
    call(shared=48 << 10)
    with pytest.raises(AssertionError, match="were asked for"):
        call(shared=(48 << 10) + 1)
    call(shared=100_000, most_shared=100_000)
    with pytest.raises(AssertionError, match="were asked for"):
        call(shared=100_001, most_shared=100_000)
    with pytest.raises(AssertionError, match="a block has"):
        call(shared=0, most_shared=228 << 10)


def test_a_grid_wider_than_a_device_takes(launch):
    x = fenced(8, np.float64)
    launch("writes_beyond", (65536,), (1,), (x, 1))
    launch("writes_beyond", (1, 65535), (1,), (x, 1))
    with pytest.raises(AssertionError, match="wider than a device takes"):
        launch("writes_beyond", (1, 65536), (1,), (x, 1))


def test_more_blocks_than_fit_at_the_same_time(launch, planted, monkeypatch):
    """CuPy shortens a grid (n,) with a warning, so that some would wait for ever, and refuses any other."""
    monkeypatch.setitem(planted.attributes, "MultiProcessorCount", 3)
    x = fenced(8, np.float64)
    call = partial(
        launch, "around_the_grid", block=(3,), args=(x, 1), cooperative=True, most_shared=200 << 10
    )
    call((3,), shared=150 << 10)
    call((6,), shared=100 << 10)
    with pytest.warns(UserWarning, match="reduced from 4 to 3"):
        call((4,), shared=150 << 10)
    with pytest.raises(ValueError, match="exceeds the limit"):
        call((1, 4), shared=150 << 10)


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
