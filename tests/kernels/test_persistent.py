"""Scans in one launch on the host device: every cell, product and way of exchange against the reference.

A layout is made by hand here, small enough for a host and yet with several blocks, groups, warps and chunks;
what `_plan.py` would choose for a device is tested at the end. It cannot be seen here whether a store of one
block reaches another in the order that the code asks for.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from host_device import ORDERS, fenced, on_host
from test_kernels import TOLERANCE, Problem, assert_agrees, assert_close, problem

import rnnkit
from rnnkit.kernels import Case, _choose, reference

# Of a TF32 product, in units of the largest entry: float16 has as many digits.
TF32 = TOLERANCE["float16"]


@pytest.fixture
def cuda(monkeypatch):
    module = on_host()
    module.device.launches.clear()
    monkeypatch.setenv("RNNKIT_PERSISTENT", "1")
    yield module
    module.device.order = "forward"


@pytest.fixture
def persistent(cuda):
    return cuda.parts[f"{cuda.__name__}._persistent"]


@pytest.fixture
def plans(cuda):
    return cuda.parts[f"{cuda.__name__}._plan"]


@pytest.fixture
def take(monkeypatch, persistent, plans):
    """Return a function that makes all scans take layouts made by hand, given for each direction."""

    def take(there: dict[str, int], back: dict[str, int], tf32: bool = False) -> None:
        def chosen(cell, backward, dtype, T, B, H, directions=1):
            scan = plans.Scan(cell, backward, dtype, tf32, B, H, directions)
            return by_hand(plans, scan, **(back if backward else there))

        monkeypatch.setattr(persistent, "chosen", chosen)

    return take


def by_hand(
    plans, scan, units, n_tiles=1, warps_m=1, warps_k=1, chunks=1, in_shared=0, streamed=0, ring=0, at_once=99
):  # fmt: skip
    windows = -(-scan.operands * scan.operand_bytes // 64)
    tiles = -(-units * (1 if scan.backward else scan.gates) // 16)
    return plans.Plan(
        product=scan.product, units=units, n_tiles=n_tiles, tiles_m=-(-tiles // warps_m), warps_m=warps_m,
        warps_k=warps_k, windows=-(-windows // (warps_k * chunks)), chunks=chunks, grid=units < scan.H,
        in_shared=in_shared, streamed=streamed, ring=ring, directions=scan.directions, at_once=at_once,
    )  # fmt: skip


def in_fences(case: Problem) -> Problem:
    """Return the problem with all arrays between fences full of NaN."""

    def moved(array):
        if not isinstance(array, np.ndarray):
            return array
        copy = fenced(array.shape, array.dtype)
        copy[...] = array
        return copy

    return case._replace(
        states=[moved(state) for state in case.states], weight_hh=moved(case.weight_hh),
        options={name: moved(value) for name, value in case.options.items()}, lengths=moved(case.lengths),
        d_output=moved(case.d_output), d_states=[moved(state) for state in case.d_states],
    )  # fmt: skip


# One block a group; several; with several warps either way; the gradients of all gates in chunks. H = 24 has
# rows that begin on multiples of 16 bytes, H = 23 none, and neither fills its tiles.
ALONE = {"units": 24, "warps_m": 2, "warps_k": 1}
SEVERAL = {"units": 8, "warps_m": 1, "warps_k": 2}
LAYOUTS = {
    "alone": (ALONE, ALONE | {"warps_k": 2}),
    "several": (SEVERAL, SEVERAL),
    "chunks": (SEVERAL | {"n_tiles": 2}, {"units": 16, "n_tiles": 2, "warps_k": 2, "chunks": 3}),
    "in_shared": ({"units": 8, "in_shared": 1}, {"units": 16, "chunks": 2, "in_shared": 1}),
    "streamed": (
        {"units": 8, "streamed": 2, "ring": 2},
        {"units": 16, "chunks": 2, "in_shared": 1, "streamed": 2, "ring": 3},
    ),
    "streamed alone": (
        {"units": 72, "warps_m": 4, "streamed": 2, "ring": 1},
        {"units": 72, "warps_m": 2, "warps_k": 2, "streamed": 7, "ring": 3},
    ),
    "streamed chunks": (
        {"units": 8, "chunks": 3, "streamed": 1, "ring": 2},
        {"units": 16, "chunks": 4, "streamed": 2, "ring": 3},
    ),
    "launches": (SEVERAL | {"at_once": 2}, SEVERAL | {"at_once": 1}),
    "launches alone": (ALONE | {"at_once": 1}, ALONE | {"at_once": 2}),
}
# Variant of a cell, dtype, TF32, H, layout.
CASES = [
    ("lstm", "bfloat16", False, 24, "alone"),
    ("lstm", "bfloat16", False, 24, "several"),
    ("lstm", "bfloat16", False, 40, "chunks"),
    ("lstm", "bfloat16", False, 40, "in_shared"),
    ("lstm", "bfloat16", False, 23, "several"),
    ("lstm", "float16", False, 24, "several"),
    ("lstm", "float32", True, 24, "several"),
    ("lstm", "float32", False, 24, "alone"),
    ("lstm", "float32", False, 39, "in_shared"),
    ("lstm", "float32", False, 23, "chunks"),
    ("gru", "bfloat16", False, 24, "several"),
    ("gru-bias", "float32", False, 23, "alone"),
    ("rnn-tanh", "bfloat16", False, 24, "several"),
    ("rnn-relu", "float32", False, 23, "alone"),
    ("lstm", "bfloat16", False, 72, "streamed"),
    ("lstm", "float32", True, 40, "streamed"),
    ("gru-bias", "float32", False, 39, "streamed"),
    ("lstm", "float16", False, 72, "streamed alone"),
    ("lstm", "float32", False, 24, "launches"),
    ("gru-bias", "bfloat16", False, 23, "launches"),
    ("lstm", "float32", False, 96, "streamed chunks"),
    ("rnn-tanh", "float32", False, 24, "launches alone"),
]


@pytest.mark.parametrize(("variant", "dtype", "tf32", "H", "layout"), CASES)
def test_agrees_with_the_reference(cuda, take, rng, variant, dtype, tf32, H, layout):
    """In any order of threads; 5 sequences fill no tile of 8, 19 need several groups."""
    take(*LAYOUTS[layout], tf32=tf32)
    orders = itertools.cycle(ORDERS)
    batches = (5, "none"), (5, "unsorted"), (19, "unsorted"), (19, "zero")
    for (B, ragged), reverse in itertools.product(batches, (False, True)):
        cuda.device.order = next(orders)
        T = 2 if ragged == "zero" else 5
        seed = int(rng.integers(1 << 30))
        case = problem(variant, dtype, T, B, H, ragged=ragged, reverse=reverse, seed=seed)
        agrees(in_fences(case), cuda, dtype, TF32 if tf32 else TOLERANCE[dtype])
    assert set(cuda.device.launches) == {
        f"{variant.partition('-')[0]}_{way}_persistent" for way in ("forward", "backward")
    }


@pytest.mark.parametrize("layout", ["alone", "several"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_arrays_at_odd_addresses(cuda, take, rng, dtype, layout):
    """Nothing of theirs is loaded or copied by more than an element at a time."""

    def odd(array):
        memory = fenced((array.size + 1,), array.dtype)
        memory[1:] = array.reshape(-1)
        return memory[1:].reshape(array.shape)

    take(*LAYOUTS[layout])
    case = problem("lstm", dtype, 3, 5, 24, ragged="unsorted", seed=int(rng.integers(1 << 30)))
    case = case._replace(
        states=[odd(state) for state in case.states], weight_hh=odd(case.weight_hh),
        d_output=odd(case.d_output), d_states=[odd(state) for state in case.d_states],
    )  # fmt: skip
    agrees(case, cuda, dtype, TOLERANCE[dtype])


def agrees(case, module, dtype, tolerance):
    if tolerance == TOLERANCE[dtype]:
        return assert_agrees(case, module, dtype)
    (results, gradients), (expected, d_expected) = case.both(module), case.both(reference)
    for ours, theirs in zip(results, expected, strict=True):
        assert_close(ours, theirs, tolerance, "result")
    for ours, theirs in zip(gradients, d_expected, strict=True):
        assert_close(ours, theirs, 2 * tolerance, "gradient")
    return None


# ---------------------------------------------------------------------------- both directions at once


def both_ways(variant, dtype, T, B, H, ragged, seed):
    """Return a problem for each direction of a layer; they share the lengths."""
    one, two = (
        in_fences(problem(variant, dtype, T, B, H, ragged=ragged, reverse=reverse, seed=seed + reverse))
        for reverse in (False, True)
    )
    if one.lengths is not None:
        two = two._replace(lengths=one.lengths)
        two.d_output[np.arange(T)[:, None] >= one.lengths[None, :]] = 0
    return one, two


def run_both(cuda, layouts, problems):
    """Return results and gradients of each direction, from one launch each way."""

    def kinds(states):
        return map(list, zip(*states, strict=True))

    cell, options = problems[0].cell, problems[0].options
    weights = [case.weight_hh for case in problems]
    scanned = cuda._BOTH[f"{cell}_forward"](
        layouts[0], [case.gates.copy() for case in problems], *kinds(case.states for case in problems),
        weights, **{name: [case.options[name] for case in problems] for name in options},
        lengths=problems[0].lengths,
    )  # fmt: skip
    results = [[result.copy() for result in results] for *results, _ in scanned]
    gradients = cuda._BOTH[f"{cell}_backward"](
        layouts[1], [saved for *_, saved in scanned], weights, [case.d_output for case in problems],
        *kinds(case.d_states for case in problems),
    )  # fmt: skip
    return results, gradients


@pytest.mark.parametrize(("variant", "dtype", "H", "layout"), [
    ("lstm", "bfloat16", 24, "alone"),
    ("lstm", "bfloat16", 23, "several"),
    ("lstm", "float32", 39, "streamed"),
    ("gru-bias", "float32", 24, "launches"),
    ("rnn-relu", "bfloat16", 24, "several"),
])  # fmt: skip
def test_both_directions_at_once(cuda, plans, rng, variant, dtype, H, layout):
    """One launch for both, where each has its own arrays, weights and order of time."""
    B, T, cell = 11, 4, variant.partition("-")[0]
    layouts = [
        by_hand(plans, plans.Scan(cell, backward, dtype, False, B, H, 2), **LAYOUTS[layout][backward])
        for backward in (False, True)
    ]
    expected_launches = 3 if layout == "launches" else 2
    for ragged, order in (("none", "shuffled"), ("unsorted", "uneven"), ("zero", "reverse")):
        cuda.device.order = order
        cuda.device.launches.clear()
        problems = both_ways(variant, dtype, T, B, H, ragged, int(rng.integers(1 << 30)))
        results, gradients = run_both(cuda, layouts, problems)
        assert len(cuda.device.launches) == expected_launches
        for k, case in enumerate(problems):
            expected, d_expected = case.both(reference)
            for ours, theirs in zip(results[k], expected, strict=True):
                assert_close(ours, theirs, TOLERANCE[dtype], "result")
            for ours, theirs in zip(gradients[k], d_expected, strict=True):
                assert_close(ours, theirs, 2 * TOLERANCE[dtype], "gradient")


@pytest.fixture
def on_cuda(cuda, monkeypatch):
    """Make NumPy's layers use these kernels."""
    monkeypatch.setitem(rnnkit.kernels._MODULES, "numpy", ("cuda_on_host", "reference"))
    _choose.cache_clear()
    yield cuda
    _choose.cache_clear()


@pytest.mark.parametrize("kind", [rnnkit.LSTM, rnnkit.GRU, rnnkit.RNN])
def test_a_layer_of_two_directions(on_cuda, persistent, monkeypatch, rng, kind):
    """A launch a layer, there and back, whose numbers are those of one direction after the other.

    Also where only one way is together: what the way back needs is of each direction.
    """
    chosen, ways = persistent.chosen, {}
    monkeypatch.setattr(
        persistent, "chosen",
        lambda cell, back, *sizes: chosen(cell, back, *sizes) if sizes[4:] != (2,) or ways[back] else None,
    )  # fmt: skip
    layer = kind(5, 40, 2, bidirectional=True, dropout=0.5, dtype="float32", seed=0)
    d_output, *parts = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((4, 6, 80), (4, 6, 40), (4, 6, 40))
    )
    state = tuple(parts) if kind is rnnkit.LSTM else parts[0]
    for x in (rng.standard_normal((4, 6, 5)).astype(np.float32), rng.integers(0, 5, (4, 6))):
        found = []
        for setting, ways[False], ways[True], launches in (
            ("1", True, True, 6), ("1", True, False, 8), ("1", False, True, 10), ("0", True, True, 0)
        ):  # fmt: skip
            monkeypatch.setenv("RNNKIT_PERSISTENT", setting)
            on_cuda.device.launches.clear()
            plain, _ = layer(x, state, lengths=[4, 0, 2, 4, 1, 3])
            (output, final), pullback = layer.vjp(x, state, lengths=[4, 0, 2, 4, 1, 3], seed=3)
            grads = pullback(d_output, state)
            whole = [name for name in on_cuda.device.launches if name.endswith("_persistent")]
            assert len(whole) == launches
            states = [*final, *grads.state] if kind is rnnkit.LSTM else [final, grads.state]
            d_x = [] if grads.x is None else [grads.x]
            found.append([plain, output, *states, grads.params.flat, *d_x])
        for numbers in zip(*found, strict=True):
            for ours in numbers[:-1]:
                assert_close(ours, numbers[-1], 10 * TOLERANCE["float32"], "of both")


def test_when_both_directions_go_at_once(cuda, persistent, monkeypatch):
    """Off unless asked for, not with a projection, and only where the model says that it pays."""
    case = Case("lstm", "float32", 40)
    for name in ("lstm_forward", "lstm_backward"):
        assert cuda.both(name, case, 4, 6) is not None
        assert cuda.both(name, case._replace(proj_size=8), 4, 6) is None
        assert cuda.both(name, case._replace(dtype="float64"), 4, 6) is None
        assert cuda.both(name, case, 1, 6) is None
        with monkeypatch.context() as patch:
            patch.setattr(persistent, "_seconds", lambda layout, *rest: 1.0 + 2 * (layout.directions == 2))
            persistent._best.cache_clear()
            assert cuda.both(name, case, 4, 6) is None
        persistent._best.cache_clear()
        with monkeypatch.context() as patch:
            patch.setenv("RNNKIT_PERSISTENT", "0")
            assert cuda.both(name, case, 4, 6) is None


# -------------------------------------------------------------------------------------------- details


def test_tf32_is_what_was_asked_for(cuda, take):
    """The products are rounded with TF32, and not without."""
    case = problem("lstm", "float32", 2, 3, 24, seed=1)
    exact, errors = case.forward(reference)[0], []
    for tf32 in (False, True):
        take(SEVERAL, SEVERAL, tf32=tf32)
        errors.append(np.abs(case.forward(cuda)[0] - exact).max())
    assert errors[0] < 1e-6 < 1e-5 < errors[1] < TF32


@pytest.mark.parametrize("layout", ["alone", "several"])
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read_and_always_zero(cuda, take, layout, reverse):
    take(*LAYOUTS[layout])
    cuda.device.order = "shuffled"
    clean, dirty = (
        problem("lstm", "bfloat16", 6, 11, 24, ragged="unsorted", reverse=reverse, seed=3, poison=poison)
        for poison in (0.0, np.nan)
    )
    padding = np.arange(6)[:, None] >= clean.lengths[None, :]
    assert padding.any()
    results = [list(itertools.chain(*case.both(cuda))) for case in (dirty, clean)]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.ndim < 3 or not ours[padding].any()


@pytest.mark.parametrize(
    ("dtype", "layout"), [("bfloat16", "alone"), ("bfloat16", "several"), ("float32", "alone")]
)
def test_nan_and_infinity_pass_through(cuda, take, dtype, layout):
    """They reach what they reach in the reference, no other sequence, and nobody waits for ever."""
    take(*LAYOUTS[layout])
    case = problem("lstm", dtype, 4, 5, 24, seed=2)
    case.gates[1, 1, 3], case.gates[2, 2, 30], case.states[0][3, 5] = np.nan, np.inf, np.nan
    case.d_output[1, 0, 2], case.d_output[2, 4, 7] = np.inf, np.nan
    with np.errstate(invalid="ignore", over="ignore"):
        expected = list(itertools.chain(*case.both(reference)))
    for ours, theirs in zip(itertools.chain(*case.both(cuda)), expected, strict=True):
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(ours), kind(theirs))
        finite = np.isfinite(theirs)
        assert not finite.all()
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=0, atol=8 * TOLERANCE[dtype])


def test_more_sequences_than_are_sorted(cuda, take):
    """Then they stay in their order."""
    take({"units": 4, "n_tiles": 8}, {})
    case = problem("rnn-tanh", "float32", 2, 2100, 4, ragged="unsorted")
    for ours, theirs in zip(case.forward(cuda)[:2], case.forward(reference)[:2], strict=True):
        assert_close(ours, theirs, TOLERANCE["float32"], "result")


def test_a_group_is_done_with_its_longest_sequence(cuda, take, monkeypatch, rng):
    """Sequences are taken by length: in one long group of two only one block has many steps to wait in."""
    take(SEVERAL, SEVERAL)
    lengths = rng.permutation(np.repeat([9, 1], 8))
    case = problem("lstm", "bfloat16", 9, 16, 24, seed=5)._replace(lengths=lengths)
    case.d_output[np.arange(9)[:, None] >= lengths[None, :]] = 0
    told = flags_of(cuda, monkeypatch)
    agrees(case, cuda, "bfloat16", TOLERANCE["bfloat16"])
    for flags, steps in zip(told, (9, 10, 9), strict=True):  # there, back with one product more, without save
        np.testing.assert_array_equal(flags, [0, *[steps] * 3, *[steps - 8] * 3])


def flags_of(cuda, monkeypatch):
    """Return a list that gets the flags of each launch."""
    loader, told = cuda.parts[f"{cuda.__name__}._loader"], []
    kernel = loader.kernel

    def watched(*names, **options):
        launch = kernel(*names, **options)

        def watching(grid, block, args, shared=0):
            told.extend(arg for arg in args if isinstance(arg, np.ndarray) and arg.dtype == np.uint32)
            launch(grid, block, args, shared)

        return watching

    monkeypatch.setattr(loader, "kernel", watched)
    return told


# ------------------------------------------------------------------------------------------- giving up


def test_a_block_that_does_not_come_is_an_error_and_not_a_hang(cuda, take, monkeypatch):
    """One block less than there should be: the others give up, and the next call says so."""
    take(SEVERAL, SEVERAL)
    loader = cuda.parts[f"{cuda.__name__}._loader"]
    kernel = loader.kernel

    def incomplete(*names, macros, **options):
        launch = kernel(*names, macros=(*macros, ("MOST_SPINS", 640)), **options)
        return lambda grid, *rest: launch((1, grid[1] - 1), *rest)

    case = problem("lstm", "bfloat16", 3, 5, 24)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "kernel", incomplete)
        *_, saved = case.forward(cuda)
        with pytest.raises(RuntimeError, match="RNNKIT_PERSISTENT=0"):
            case.backward(cuda, saved)
        case.backward(cuda, saved)
        with pytest.raises(RuntimeError, match="RNNKIT_PERSISTENT=0"):
            loader.error_flag().check()
    assert_agrees(case, cuda, "bfloat16")


# --------------------------------------------------------------------------------------- who takes them


def test_launches_do_not_depend_on_the_steps(on_cuda, monkeypatch, rng):
    """A whole layer, there and back: one launch each way whatever T is, and off unless it is asked for."""
    cuda = on_cuda
    layer = rnnkit.LSTM(5, 16, dtype="float32", seed=0)

    def launches(T):
        x = rng.standard_normal((T, 3, 5)).astype(np.float32)
        cuda.device.launches.clear()
        (output, _), pullback = layer.vjp(x)
        pullback(output)
        return [name for name in cuda.device.launches if name != "product"]

    few, many = launches(3), launches(8)
    assert few == many
    assert [name.endswith("_persistent") for name in few] == [True, True]
    monkeypatch.setenv("RNNKIT_PERSISTENT", "0")
    assert not any(name.endswith("_persistent") for name in launches(3))
    monkeypatch.delenv("RNNKIT_PERSISTENT")
    assert not any(name.endswith("_persistent") for name in launches(3))


def test_what_goes_step_by_step(cuda):
    for variant, dtype, T in [
        ("lstm", "float64", 3),
        ("lstm-projected", "float32", 3),
        ("lstm", "float32", 1),
    ]:
        case = problem(variant, dtype, T, 3, 16)
        assert_agrees(case, cuda, dtype)
    assert_agrees(problem("lstm", "float32", 3, 0, 16), cuda, "float32")
    assert not any(name.endswith("_persistent") for name in cuda.device.launches)


# ------------------------------------------------------------------------------------------- the plan

H200 = (132, 232448, 65536, (9, 0))


def test_plans_keep_within_a_device(plans):
    found, streamed, launches = 0, 0, 0
    for small, cell, backward in itertools.product((False, True), plans.GATES, (False, True)):
        if small and cell != "gru":
            continue
        limits = plans.Limits(20, 101376, 65536, (8, 6)) if small else plans.Limits(*H200)
        for dtype, B, H, directions in itertools.product(
            ("bfloat16", "float32"), (9, 300), (1, 50, 256, 1000, 3000), (1, 2)
        ):
            scan = plans.Scan(cell, backward, dtype, False, B, H, directions)
            plan = plans.plan(scan, limits)
            if isinstance(plan, str):
                assert "step by step" in plan or "too many" in plan
                continue
            found += 1
            window = 64 // scan.operand_bytes
            assert plan.shared <= limits.shared_per_block
            assert (
                plan.threads * plan.registers(scan.gates, limits.capability)
                <= limits.registers_per_multiprocessor
            )
            assert plan.blocks(H) * plan.units >= H
            assert plan.groups(B) * plan.sequences >= B
            assert plan.rows >= plan.units * (1 if backward else scan.gates)
            assert plan.warps_k * plan.windows * plan.chunks * window >= scan.operands
            assert plan.grid == (plan.blocks(H) > 1)
            together = plan.blocks(H) * min(plan.at_once, plan.groups(B)) * directions
            assert together <= (limits.multiprocessors if plan.grid else 65535)
            assert plan.launches(B) * plan.at_once >= plan.groups(B)
            assert plan.in_shared + plan.streamed < plan.windows
            assert min(plan.ring, 1) <= plan.ring <= plan.streamed * plan.chunks
            streamed += plan.streamed > 0
            launches += plan.launches(B) > 1
            times = plans.step_times(plan, scan, limits)
            assert all(seconds >= 0 for seconds in times.values())
            assert (times["exchange"] > 0) == plan.grid
    assert found > 100
    assert streamed > 20
    assert launches > 5


def test_plans_for_what_matters_most(plans):
    """PERFORMANCE.md's goals: each has a plan; a small layer has a block to itself."""
    for cell, backward in itertools.product(plans.GATES, (False, True)):
        for dtype, tf32, B, H in [
            ("bfloat16", False, 16, 768), ("bfloat16", False, 64, 1024), ("float32", True, 64, 512),
            ("bfloat16", False, 256, 512), ("bfloat16", False, 16, 2048), ("float32", True, 16, 1024),
        ]:  # fmt: skip
            scan = plans.Scan(cell, backward, dtype, tf32, B, H)
            assert isinstance(plans.plan(scan, plans.Limits(*H200)), plans.Plan), scan
        alone = plans.plan(plans.Scan(cell, backward, "bfloat16", False, 64, 192), plans.Limits(*H200))
        assert not alone.grid


def test_why_there_is_no_plan(plans):
    def why(scan=None, limits=None):
        scan = plans.Scan("lstm", False, "float32", False, 4, 64)._replace(**scan or {})
        return plans.plan(scan, plans.Limits(*H200)._replace(**limits or {}))

    assert isinstance(why(), plans.Plan)
    assert "float64" in why({"dtype": "float64"})
    assert "8.0" in why(limits={"capability": (7, 5)})
    assert "40000 hidden units" in why({"H": 40000})
    assert "step by step" in why({"B": 256, "H": 2048})
    assert why({"H": 1024}).streamed == 0 < why({"H": 2048}).streamed
    assert "no sequences" in why({"B": 0})
    # A device without cooperative launches has 0 multiprocessors here: one block a group is all there can be.
    assert not why(limits={"multiprocessors": 0}).grid
    assert isinstance(why({"H": 1024}, {"multiprocessors": 0}), str)


def test_two_directions_share_a_device(plans):
    """Side by side they take little longer than one alone, and less than one after the other."""
    for cell, backward in itertools.product(plans.GATES, (False, True)):
        scan, limits = plans.Scan(cell, backward, "bfloat16", False, 32, 512), plans.Limits(*H200)
        times = []
        for directions in (1, 2):
            plan = plans.plan(scan._replace(directions=directions), limits)
            assert plan.directions == directions
            times.append(sum(plans.step_times(plan, scan._replace(directions=directions), limits).values()))
        assert times[0] < times[1] < 1.5 * times[0]
