"""The loss and the optimiser of the CuPy kernels without a GPU, against the reference."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from host_device import ORDERS as SCHEDULES
from host_device import fenced, on_host
from test_cuda import DTYPES, in_fences, wide

import rnnkit
from rnnkit.kernels import _choose, reference

ORDERS = ("forward", "reverse", "shuffled")
# Around a vector, a warp and a block of 256 threads that each work on 4 elements.
SIZES = (0, 1, 3, 4, 129, 1024, 1027, 4099)
# A few operations in the dtype, of which those of half precision are one, when a float32 is rounded to it.
ROUNDING = {"float32": 2e-6, "float64": 1e-14, "float16": 2**-10, "bfloat16": 2**-7}


@pytest.fixture
def cuda():
    module = on_host()
    module.device.launches.clear()
    yield module
    module.device.order = "forward"


def at_odd_address(array):
    memory = fenced((array.size + 1,), array.dtype)
    memory[1:] = array.reshape(-1)
    return memory[1:].reshape(array.shape)


# ---------------------------------------------------------------------------------------------- Adam


def vectors(rng, N, dtype):
    """Return flat, d_flat, mean and square as a run would have them."""
    kind = DTYPES[dtype]
    mean, square = rng.standard_normal(N), rng.standard_normal(N) ** 2
    flat, d_flat = (rng.standard_normal(N).astype(kind) for _ in range(2))
    return [flat, d_flat, mean.astype(wide(dtype)), square.astype(wide(dtype))]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_agrees_with_the_reference(cuda, rng, dtype, order, decay):
    cuda.device.order = order
    settings = {"betas": (0.8, 0.95), "lr": 0.05, "eps": 1e-3, "weight_decay": decay}
    for N, move in itertools.product(SIZES, (in_fences, at_odd_address)):
        expected = vectors(rng, N, dtype)
        ours = [move(array) for array in expected]
        for steps in (1, 2):
            cuda.device.launches.clear()
            cuda.adam(*ours, steps=steps, **settings)
            assert cuda.device.launches == ["adam"] * (N > 0)
            reference.adam(*expected, steps=steps, **settings)
        for name, one, other in zip(("flat", "d_flat", "mean", "square"), ours, expected, strict=True):
            # The vectors beside the parameters are never rounded to half precision.
            bound = ROUNDING[dtype if name == "flat" else str(wide(dtype))]
            assert one.dtype == other.dtype
            one, other = one.astype(np.float64), other.astype(np.float64)
            np.testing.assert_allclose(one, other, rtol=bound, atol=bound, err_msg=f"{name}, N={N}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adam_in_half_precision_is_float32_but_for_the_parameters(cuda, rng, dtype):
    """eps is 1e-8 and squares of 1e-5: in half precision both would be 0, and the step infinite."""
    flat, d_flat, mean, square = (in_fences(array) for array in vectors(rng, 70, dtype))
    before = flat.astype(np.float32)
    d_flat[...], mean[...], square[...] = 1e-5, 0.0, 0.0
    cuda.adam(flat, d_flat, mean, square, betas=(0.9, 0.999), steps=1, lr=0.25, eps=1e-8, weight_decay=0.0)
    exact = before.astype(np.float64) - 0.25 / 1.001
    # Of numbers up to 4 that nearly cancel, float32 leaves no more digits.
    np.testing.assert_allclose(flat.astype(np.float64), exact, rtol=ROUNDING[dtype], atol=2**-20)


# ------------------------------------------------------------------------------------- cross-entropy


def rows_and_targets(rng, M, V, dtype, how):
    """Return logits, targets and counts; what does not count holds NaN and no class."""
    logits, targets = (4 * rng.standard_normal((M, V))).astype(DTYPES[dtype]), rng.integers(0, V, M)
    if how == "all":
        return logits, targets, None
    counts = rng.random(M) < 0.5 if how == "some" else np.zeros(M, bool)
    logits[~counts], targets[~counts] = np.nan, rng.choice([-100, -1, V, 1 << 40])
    return logits, targets, counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["all", "some", "none"])
def test_cross_entropy_agrees_with_the_reference(cuda, rng, dtype, how):
    """One class, a warp and more, several times a block of 512 threads; in any order the same bits."""
    for (M, V), move in itertools.product([(1, 1), (7, 5), (40, 65), (5, 128), (2, 4100), (600, 2)],
                                          (in_fences, at_odd_address)):  # fmt: skip
        problem = rows_and_targets(rng, M, V, dtype, how)
        wide_problem = problem[0].astype(wide(dtype)), *problem[1:]
        expected, d_expected = reference.softmax_cross_entropy(*wide_problem)
        results = []
        for order in ORDERS:
            cuda.device.order = order
            cuda.device.launches.clear()
            moved = [None if array is None else move(array) for array in problem]
            results.append(cuda.softmax_cross_entropy(*moved))
            assert len(cuda.device.launches) == 2 + (how != "all")
        loss, d_logits = results[0]
        assert (loss.shape, loss.dtype, d_logits.dtype) == ((), wide(dtype), DTYPES[dtype])
        tolerance = ROUNDING[str(wide(dtype))]
        np.testing.assert_allclose(loss, expected, rtol=4 * tolerance, atol=tolerance, err_msg=f"{M} {V}")
        # Gradients of a small probability are small: their error is relative to the largest one's. Where
        # that too is small, since every target is likely, (p - 1) / n is left with the rounding of p.
        n = M if problem[2] is None else max(1, int(problem[2].sum()))
        bound = ROUNDING[dtype] * max(np.abs(d_expected).max(), 2.0**-20) + 2 * np.finfo(wide(dtype)).eps / n
        np.testing.assert_allclose(d_logits.astype(wide(dtype)), d_expected, rtol=0, atol=bound)
        if problem[2] is not None:
            assert not d_logits[~problem[2]].any()
        for other, d_other in results[1:]:
            np.testing.assert_array_equal(loss, other)
            np.testing.assert_array_equal(d_logits, d_other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["all", "some", "none"])
def test_cross_entropy_without_a_gradient(cuda, rng, monkeypatch, dtype, how):
    """The same bits of the loss, and no memory for a gradient."""
    problems = [rows_and_targets(rng, M, V, dtype, how) for M, V in ((1, 1), (7, 5), (40, 65), (2, 4100))]
    if how == "all":
        problems[1][1][2], problems[2][1][3] = -1, 65
    shapes, part = [], cuda.parts[f"{cuda.__name__}._training"]
    xp = part.namespace_of(None)

    def empty(shape, dtype):
        shapes.append(shape)
        return xp.empty(shape, dtype)

    watched = SimpleNamespace(empty=empty, ascontiguousarray=np.ascontiguousarray)
    monkeypatch.setattr(part, "namespace_of", lambda array: watched)
    for problem, order in itertools.product(problems, ORDERS):
        cuda.device.order = order
        moved = [None if array is None else in_fences(array) for array in problem]
        expected, _ = cuda.softmax_cross_entropy(*moved)
        assert shapes.count(problem[0].shape) == 1
        shapes.clear()
        cuda.device.launches.clear()
        loss, nothing = cuda.softmax_cross_entropy(*moved, gradient=False)
        assert nothing is None
        assert max(map(len, shapes)) < 2
        assert len(cuda.device.launches) == 2 + (how != "all")
        np.testing.assert_array_equal(loss, expected)
        shapes.clear()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy_of_extreme_logits(cuda, dtype):
    """Impossible classes, whole threads of them too, large numbers, and what can only be NaN."""
    logits = np.full((6, 600), -np.inf, dtype)
    logits[0, 599], logits[1, [3, 7]], logits[2] = 5.0, (1e4, 1e4 - 2), -1e30
    logits[3, ::2], logits[4], logits[5, 0] = 1.0, 0.0, np.finfo(dtype).max
    targets = np.array([599, 7, 0, 2, 11, 0])
    for k in range(6):
        one = logits[k : k + 1], targets[k : k + 1], None
        (ours, d_ours), (theirs, d_theirs) = (m.softmax_cross_entropy(*one) for m in (cuda, reference))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        np.testing.assert_allclose(d_ours, d_theirs, rtol=1e-6, atol=1e-7)
        assert np.isfinite(ours)
    hopeless = np.zeros((3, 8), dtype)
    hopeless[0], hopeless[1, 3], hopeless[2, 3] = -np.inf, np.nan, np.inf
    for row in hopeless:
        loss, d_row = cuda.softmax_cross_entropy(row[None], np.array([3]), None)
        assert np.isnan(loss)
        assert np.isnan(d_row).any()


@pytest.mark.parametrize("target", [-1, 5, -(1 << 40), 1 << 40])
@pytest.mark.parametrize("module", ["cuda", "reference"])
def test_a_target_out_of_range_makes_the_loss_nan(cuda, rng, monkeypatch, module, target):
    """Nothing is read there, and nothing looks like a loss."""
    # Not the memory full of NaN of other tests, in which a loss that nobody wrote would pass.
    zeros = SimpleNamespace(empty=np.zeros, ascontiguousarray=np.ascontiguousarray)
    monkeypatch.setattr(cuda.parts[f"{cuda.__name__}._training"], "namespace_of", lambda array: zeros)
    logits, targets = in_fences(rng.standard_normal((4, 5))), rng.integers(0, 5, 4)
    targets[2] = target
    function = {"cuda": cuda, "reference": reference}[module].softmax_cross_entropy
    loss, d_logits = function(logits, targets, None)
    assert np.isnan(loss)
    assert np.isfinite(d_logits).all()


def test_cross_entropy_of_arrays_in_any_memory_order(cuda, rng):
    logits, targets = np.asfortranarray(rng.standard_normal((9, 4))), rng.integers(0, 4, 18)[::2]
    counts = np.broadcast_to(np.array(True), (9,))
    results = (m.softmax_cross_entropy(logits, targets, counts) for m in (cuda, reference))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clipping_agrees_with_the_reference(cuda, rng, dtype, max_norm):
    """Two launches, with one block and several, in any order the same bits."""
    for N, move in itertools.product((*SIZES, 9001), (in_fences, at_odd_address)):
        flat, results = rng.standard_normal(N).astype(DTYPES[dtype]), []
        for order in ORDERS:
            cuda.device.order = order
            cuda.device.launches.clear()
            ours = move(flat)
            results.append((cuda.clip(ours, max_norm), ours))
            assert cuda.device.launches == ["clip_sums", "clip_scale"]
        expected = flat.copy()
        norm, (ours_norm, ours) = reference.clip(expected, max_norm), results[0]
        assert (ours_norm.shape, ours_norm.dtype) == ((), wide(dtype))
        np.testing.assert_allclose(ours_norm, norm, rtol=ROUNDING[str(wide(dtype))])
        bound = ROUNDING[dtype] if max_norm < norm else 0
        np.testing.assert_allclose(ours.astype(np.float64), expected.astype(np.float64), rtol=bound)
        for other_norm, other in results[1:]:
            np.testing.assert_array_equal(ours_norm, other_norm)
            np.testing.assert_array_equal(ours, other)


def test_clipping_more_than_one_round_of_the_grid(cuda, rng):
    """512 blocks of 512 threads at most: what is beyond them is done in a second round."""
    flat = rng.standard_normal(512 * 512 + 700)
    ours, expected = at_odd_address(flat), flat.copy()
    norms = cuda.clip(ours, 1.0), reference.clip(expected, 1.0)
    np.testing.assert_allclose(*norms, rtol=1e-14)
    np.testing.assert_allclose(ours, expected, rtol=1e-13)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clipping_of_what_has_no_norm(cuda, value):
    ours, expected = (np.array([3.0, value, 4.0]) for _ in range(2))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(cuda.clip(ours, 1.0), reference.clip(expected, 1.0))
    np.testing.assert_array_equal(ours, expected)


# ----------------------------------------------------------------------------- clipping and Adam in one


ONE_STEP = {"betas": (0.8, 0.95), "steps": 2, "lr": 0.05, "eps": 1e-3, "weight_decay": 0.1}


@pytest.fixture
def waiting(cuda, monkeypatch):
    """Return the module where blocks may wait for each other."""
    monkeypatch.setenv("RNNKIT_PERSISTENT", "1")
    return cuda


def clipped_by_the_reference(arrays, max_norm, **settings):
    """Change arrays as `clipped_adam` does, with the scaled gradient not rounded; return the norm."""
    flat, d_flat, mean, square = arrays
    d_wide = d_flat.astype(wide(str(flat.dtype)))
    norm = reference.clip(d_wide, max_norm)
    reference.adam(flat, d_wide, mean, square, **settings)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.25, 1e4])
def test_clipped_adam_agrees_with_the_reference(waiting, rng, dtype, max_norm):
    """One launch, with one block and several, in any order the same bits; the gradient stays as it is."""
    # Around the 512 threads of a block as well, and several rounds of 8 blocks, one for each multiprocessor.
    for N, move in itertools.product((*SIZES, 2048, 2051, 17000), (in_fences, at_odd_address)):
        given, results = vectors(rng, N, dtype), []
        for order in SCHEDULES:
            waiting.device.order = order
            waiting.device.launches.clear()
            ours = [move(array) for array in given]
            norm = waiting.clipped_adam(*ours, max_norm=max_norm, **ONE_STEP)
            assert waiting.device.launches == ["clipped_adam"]
            assert (norm.shape, norm.dtype) == ((), wide(dtype))
            np.testing.assert_array_equal(ours[1], given[1])
            results.append((norm, *ours))
        expected = clipped_by_the_reference(given, max_norm, **ONE_STEP), *given
        for name, one, other in zip(
            ("norm", "flat", "d_flat", "mean", "square"), results[0], expected, strict=True
        ):
            bound = ROUNDING[dtype if name == "flat" else str(wide(dtype))]
            assert one.dtype == other.dtype
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            np.testing.assert_allclose(one, other, rtol=bound, atol=bound, err_msg=f"{name}, N={N}")
        for other in results[1:]:
            for one, its in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(one, its)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_clipped_adam_of_a_gradient_without_a_norm(waiting, rng, dtype, value):
    """It reaches what it reaches in the reference: with NaN the other elements are not scaled."""
    with np.errstate(over="ignore"):
        given, numbers = vectors(rng, 3000, dtype), np.array([value, 1.5]).astype(DTYPES[dtype])
    given[1][[7, 2999]] = numbers
    ours = [in_fences(array) for array in given]
    norm = waiting.clipped_adam(*ours, max_norm=1.0, **ONE_STEP)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = clipped_by_the_reference(given, 1.0, **ONE_STEP)
    assert np.isfinite(norm) == (dtype == "float64" and value == 3e38)
    for one, other in zip((norm, *ours), (expected, *given), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_clipped_adam_in_two_launches_and_one_where_blocks_may_not_wait(cuda, rng, monkeypatch):
    """By default; without cooperative launches, which shows as no multiprocessors; on old devices."""
    loader = cuda.parts[f"{cuda.__name__}._loader"]
    limits = loader.limits()

    def launches():
        ours = [in_fences(array) for array in vectors(rng, 70, "float32")]
        expected = [array.copy() for array in ours]
        cuda.device.launches.clear()
        norm = cuda.clipped_adam(*ours, max_norm=0.25, **ONE_STEP)
        launched = list(cuda.device.launches)
        np.testing.assert_allclose(norm, clipped_by_the_reference(expected, 0.25, **ONE_STEP), rtol=1e-6)
        np.testing.assert_allclose(ours[0], expected[0], rtol=0, atol=1e-6)
        return launched

    separate = ["clip_sums", "clip_scale", "adam"]
    monkeypatch.delenv("RNNKIT_PERSISTENT", raising=False)
    assert launches() == separate
    monkeypatch.setenv("RNNKIT_PERSISTENT", "0")
    assert launches() == separate
    monkeypatch.setenv("RNNKIT_PERSISTENT", "1")
    assert launches() == ["clipped_adam"]
    for lacking in ({"multiprocessors": 0}, {"capability": (7, 5)}):
        monkeypatch.setattr(loader, "limits", lambda lacking=lacking: limits._replace(**lacking))
        assert launches() == separate


def test_clipped_adam_has_no_more_blocks_than_fit(waiting, rng, monkeypatch):
    """One for each multiprocessor: more of them could wait for one that has no room."""
    loader = waiting.parts[f"{waiting.__name__}._loader"]
    limits, kernel, grids = loader.limits(), loader.kernel, []

    def watched(*names, **options):
        launch = kernel(*names, **options)
        return lambda grid, *rest: (grids.append(grid), launch(grid, *rest))

    monkeypatch.setattr(loader, "kernel", watched)
    for multiprocessors, N, blocks in [(8, 1, 1), (8, 2049, 2), (8, 30000, 8), (3, 30000, 3)]:
        monkeypatch.setattr(
            loader, "limits", lambda there=multiprocessors: limits._replace(multiprocessors=there)
        )
        ours = [in_fences(array) for array in vectors(rng, N, "float32")]
        waiting.clipped_adam(*ours, max_norm=1.0, **ONE_STEP)
        assert grids.pop() == (1, blocks)


def test_a_block_that_does_not_come_to_clipped_adam_is_an_error_and_not_a_hang(waiting, rng, monkeypatch):
    """The second one returns at once: the others give up, and the next call says so."""
    loader = waiting.parts[f"{waiting.__name__}._loader"]
    kernel, source, begin = loader.kernel, loader.source, "    SHARED(REAL, room);\n    const long long first"

    def without_a_block(path):
        text = source(path)
        assert text.count(begin) == 1
        return text.replace(begin, f"    if (blockIdx.y == 1) return;\n{begin}")

    def incomplete(*names, **options):
        return kernel(*names, macros=(("MOST_SPINS", 640),), **options)

    ours = [in_fences(array) for array in vectors(rng, 9000, "float32")]
    before = [array.copy() for array in ours]
    with monkeypatch.context() as patch:
        patch.setattr(loader, "kernel", incomplete)
        patch.setattr(loader, "source", without_a_block)
        waiting.clipped_adam(*ours, max_norm=1.0, **ONE_STEP)
        for one, other in zip(ours, before, strict=True):
            np.testing.assert_array_equal(one, other)
        with pytest.raises(RuntimeError, match="RNNKIT_PERSISTENT=0"):
            waiting.clipped_adam(*ours, max_norm=1.0, **ONE_STEP)
    waiting.clipped_adam(*ours, max_norm=1.0, **ONE_STEP)
    loader.error_flag().check()


# ----------------------------------------------------------------------------------- a training step


@pytest.mark.parametrize("waits", [False, True], ids=["three launches", "one launch"])
def test_a_run_is_the_same_as_with_the_reference(cuda, rng, monkeypatch, waits):
    """Loss, clipping and Adam through the public functions, on a batch with lengths."""
    tokens, lengths = rng.integers(0, 7, (6, 3)), [5, 0, 3]
    seed = int(rng.integers(1 << 30))

    def run():
        model = rnnkit.LanguageModel(7, 8, dtype="float64", seed=seed)
        optimizer = rnnkit.Adam(0.05, weight_decay=0.1)
        for _ in range(3):
            (logits, _), pullback = model.vjp(tokens[:-1], lengths=lengths)
            loss, d_logits = rnnkit.softmax_cross_entropy(logits, tokens[1:], lengths=lengths)
            norm = optimizer.step(model.params, pullback(d_logits).params, clip_norm=0.1)
        return loss, norm, model.params.flat

    monkeypatch.setenv("RNNKIT_KERNELS", "reference")
    expected = run()
    monkeypatch.delenv("RNNKIT_KERNELS")
    monkeypatch.setenv("RNNKIT_PERSISTENT", str(int(waits)))
    monkeypatch.setitem(rnnkit.kernels._MODULES, "numpy", ("cuda_on_host", "reference"))
    _choose.cache_clear()
    results = run()
    _choose.cache_clear()
    last = ["clipped_adam"] if waits else ["clip_sums", "clip_scale", "adam"]
    assert cuda.device.launches[-len(last) :] == last
    assert "cross_entropy_rows" in cuda.device.launches
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
