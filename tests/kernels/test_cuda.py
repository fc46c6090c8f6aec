"""The CuPy kernels without a GPU, beyond what tests/test_kernels.py asks of every kernel module."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from host_device import PACKAGE, fenced, on_host
from test_kernels import TOLERANCE, VARIANTS, assert_agrees, assert_close, problem

import rnnkit
from rnnkit._array import Backend
from rnnkit.kernels import Case, _choose, kernels_for, reference

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@pytest.fixture
def cuda():
    module = on_host()
    module.device.launches.clear()
    yield module
    module.device.order = "forward"


@pytest.fixture
def loader(cuda):
    return cuda.parts[f"{cuda.__name__}._loader"]


def wide(dtype):
    return np.dtype(np.float32) if DTYPES[dtype].itemsize == 2 else DTYPES[dtype]


def in_fences(array):
    copy = fenced(array.shape, array.dtype)
    copy[...] = array
    return copy


# ----------------------------------------------------------------------------------------- the scans


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_order_of_threads_and_no_write_outside(cuda, rng, variant, dtype, order):
    """All arguments lie between fences here, full of NaN: what is read or written beyond them shows."""
    if variant == "rnn-relu" and dtype == "bfloat16":
        pytest.skip(
            "a rounded state may fall on the other side of relu's kink: see SMOOTH in test_kernels.py"
        )
    cuda.device.order = order
    for H, reverse in itertools.product((5, 36, 516), (False, True)):
        case = problem(
            variant, dtype, 3, 4, H, ragged="unsorted", reverse=reverse, seed=int(rng.integers(1 << 30))
        )
        options = {k: in_fences(v) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
        case = case._replace(
            states=[in_fences(state) for state in case.states], weight_hh=in_fences(case.weight_hh),
            options=options, lengths=in_fences(case.lengths), d_output=in_fences(case.d_output),
            d_states=[in_fences(state) for state in case.d_states],
        )  # fmt: skip
        assert_agrees(case, cuda, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ragged", ["none", "unsorted"])
def test_launches_a_step(cuda, variant, ragged):
    """One product and one kernel a step each way; two and two with a projection, and one product after it."""
    per_step = 4 if variant == "lstm-projected" else 2
    for T in (1, 6):
        case = problem(variant, "float32", T, 3, 8, ragged=ragged)
        *_, saved = case.forward(cuda)
        assert len(cuda.device.launches) == per_step * T
        assert cuda.device.launches.count("product") == per_step * T // 2
        cuda.device.launches.clear()
        case.backward(cuda, saved)
        assert len(cuda.device.launches) == per_step * T + (variant == "lstm-projected")
        cuda.device.launches.clear()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_at_odd_addresses(cuda, rng, variant, dtype):
    """A parameter is a view of one flat buffer, at any element: no vector may be loaded there."""

    def odd(array):
        memory = fenced((array.size + 1,), array.dtype)
        memory[1:] = array.reshape(-1)
        return memory[1:].reshape(array.shape)

    case = problem(variant, dtype, 4, 3, 8, ragged="unsorted", seed=int(rng.integers(1 << 30)))
    moved = {k: odd(v) if isinstance(v, np.ndarray) else v for k, v in case.options.items()}
    even = case.both(cuda)
    case = case._replace(weight_hh=odd(case.weight_hh), d_output=odd(case.d_output), options=moved)
    for ours, theirs in zip(itertools.chain(*case.both(cuda)), itertools.chain(*even), strict=True):
        assert_close(ours, theirs, TOLERANCE[dtype], "at odd addresses")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_c_and_gates_in_float32(cuda, rng, dtype):
    """One step from the same h has no rounding in between: c and its gradient agree as in float32."""
    case = problem("lstm", dtype, 1, 5, 16, seed=int(rng.integers(1 << 30)))
    (_, _, c_n), (d_gates, _, d_c_0) = case.both(cuda)
    (_, _, c_ref), (d_gates_ref, _, d_c_ref) = case.both(reference)
    for ours, theirs in [(c_n, c_ref), (d_gates, d_gates_ref), (d_c_0, d_c_ref)]:
        assert ours.dtype == np.float32
        assert_close(ours, theirs, 4e-6, "float32 part")


# ---------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("cell", [rnnkit.RNN, rnnkit.GRU, rnnkit.LSTM])
@pytest.mark.parametrize("tokens", [False, True])
def test_whole_layers(cuda, rng, monkeypatch, cell, tokens):
    """Two layers, two directions, ragged, there and back: the same as from the reference."""
    seed = int(rng.integers(1 << 30))
    x = rng.integers(0, 6, (7, 5)) if tokens else rng.standard_normal((7, 5, 6))
    lengths, d_output = rng.integers(0, 8, 5), rng.standard_normal((7, 5, 8))

    def everything():
        layer = cell(6, 4, num_layers=2, bidirectional=True, dropout=0.5, dtype="float64", seed=seed)
        (output, state), pullback = layer.vjp(x, lengths=lengths, seed=seed)
        grads = pullback(d_output, state)
        states = state if isinstance(state, tuple) else (state,)
        return layer, [output, *states, grads.params.flat, *([] if tokens else [grads.x])]

    monkeypatch.setenv("RNNKIT_KERNELS", "reference")
    expected = everything()[1]
    monkeypatch.delenv("RNNKIT_KERNELS")
    monkeypatch.setitem(rnnkit.kernels._MODULES, "numpy", ("cuda_on_host", "reference"))
    _choose.cache_clear()
    layer, results = everything()
    assert "cuda_on_host" in layer.explain()
    _choose.cache_clear()
    assert cuda.device.launches
    for ours, theirs in zip(results, expected, strict=True):
        assert_close(ours, theirs, 1e-12, cell.__name__)


class CurrentDevice(str):
    """A device for NumPy that can be made the current one, like CuPy's."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@pytest.mark.parametrize("cell", [rnnkit.RNN, rnnkit.GRU, rnnkit.LSTM])
def test_whole_layers_in_bfloat16(cuda, rng, monkeypatch, cell):
    """As on CuPy, whose bfloat16 is ml_dtypes': against float64 from the same rounded numbers."""
    monkeypatch.setitem(rnnkit.kernels._MODULES, "cupy", ("cuda_on_host", "reference"))
    _choose.cache_clear()
    kind, where = DTYPES["bfloat16"], np.where
    nothing = type("ndarray", (), {})
    cupy = SimpleNamespace(__version__="14.2.0", ndarray=nothing, generic=nothing)
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def where_of_cupy(*arguments):  # it has no loop for bfloat16
        result = where(*arguments)
        return result.astype(np.float32) if result.dtype == kind else result

    monkeypatch.setattr(np, "where", where_of_cupy)
    backend = Backend("cupy", np, CurrentDevice("cpu"), np.ndarray, (1, 0))
    layer = cell(6, 4, bidirectional=True, backend=backend, dtype="bfloat16", seed=int(rng.integers(1 << 30)))
    exact = layer.to("numpy", dtype="float64")
    x, d_output = (rng.standard_normal((7, 5, 6 + 2 * k)).astype(kind) for k in (0, 1))
    lengths = rng.integers(0, 8, 5)
    (output, _), pullback = layer.vjp(x, lengths=lengths)
    grads = pullback(d_output)
    (expected, _), exact_pullback = exact.vjp(x.astype(np.float64), lengths=lengths)
    exact_grads = exact_pullback(d_output.astype(np.float64))
    assert "cuda_on_host" in layer.explain()
    _choose.cache_clear()
    pairs = [(output, expected), (grads.x, exact_grads.x), (grads.params.flat, exact_grads.params.flat)]
    for ours, theirs in pairs:
        assert ours.dtype == kind
        # A few units in the last place, 2^-8 at 1, over seven steps.
        assert_close(ours.astype(np.float64), theirs, 8 * 2**-8, cell.__name__)
    layer.load_params(layer.params)
    assert cell(6, 4, bidirectional=True, backend=backend, dtype="bfloat16").load_params(exact.params) is None


def test_explain_says_how_products_are_rounded(cuda, loader, monkeypatch):
    for dtype in ("float32", "float16"):
        assert "full float32" in cuda.note("lstm_forward", Case("lstm", dtype, 8))
    assert "float32" not in cuda.note("lstm_forward", Case("lstm", "float64", 8))
    assert cuda.note("matmul", Case("matmul", "float64", 0)) is None
    monkeypatch.setattr(loader.cupy._core, "get_compute_type", lambda dtype: "TF32")
    assert "products in TF32" in cuda.note("matmul", Case("matmul", "float32", 0))


def test_explain_says_whether_a_sequence_is_one_launch(cuda, monkeypatch):
    case = Case("lstm", "bfloat16", 64)
    monkeypatch.delenv("RNNKIT_PERSISTENT", raising=False)
    for off in ("", "0"):
        monkeypatch.setenv("RNNKIT_PERSISTENT", off)
        assert "step by step (RNNKIT_PERSISTENT=1 takes" in cuda.note("lstm_forward", case)
    monkeypatch.setenv("RNNKIT_PERSISTENT", "1")
    said = cuda.note("lstm_forward", case)
    assert "(RNNKIT_PERSISTENT=1) for any number of sequences" in said
    assert re.search(r"sequences, for both directions of a layer at once for up to \d+ sequences$", said)
    said = cuda.note("lstm_forward", case._replace(hidden_size=384))
    assert re.search(r"for up to \d+ sequences.*; else step by step: an estimated \d+ us a step", said)
    for other, why in [
        (case._replace(dtype="float64"), "float64"),
        (case._replace(hidden_size=1 << 16), "too many"),
        (case._replace(proj_size=3), "a projection"),
    ]:
        assert re.search(f"step by step: .*{why}", cuda.note("lstm_forward", other))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="says what is so without CuPy")
def test_without_cupy_the_seam_says_so():
    kernels = kernels_for("cupy", Case("lstm", "float32", 8))
    assert kernels.modules["lstm_forward"] == "reference"
    assert kernels.refused["lstm_forward"]["cuda"] == "cupy is not installed"


# -------------------------------------------------------------------------------- products and tables


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_every_layout(loader, rng, dtype):
    kind, result = DTYPES[dtype], wide(dtype)
    for M, K, N in [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1), (3, 0, 5), (0, 4, 5), (7, 33, 20)]:
        for a_order, b_order, add in itertools.product("CF", "CF", (False, True)):
            a = np.asarray(rng.standard_normal((M, K)), kind, order=a_order)
            b = np.asarray(rng.standard_normal((K, N)), kind, order=b_order)
            out = in_fences(rng.standard_normal((M, N)).astype(result))
            expected = a.astype(result) @ b.astype(result) + (out if add else 0)
            loader.product(a, b, out, add=add)(0)
            np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13 if dtype == "float64" else 1e-5)


def test_products_of_a_time_step(loader, rng):
    a, b = rng.standard_normal((4, 3, 5)), rng.standard_normal((5, 2))
    out, one = fenced((4, 3, 2), np.float64), fenced((3, 2), np.float64)
    loader.product(a, b, out)(2)
    np.testing.assert_allclose(out[2], a[2] @ b, rtol=0, atol=1e-14)
    assert np.isnan(out[[0, 1, 3]]).all()
    loader.product(a, b, one)(3)
    np.testing.assert_allclose(one, a[3] @ b, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="in neither order"):
        loader.product(a[0], rng.standard_normal((5, 4))[:, ::2], one)


@pytest.mark.parametrize("setting", ["DEFAULT", "TF32", "PEDANTIC"])
def test_the_compute_type_is_cupys(loader, monkeypatch, setting):
    """TF32 rounds float32 operands; for others cuBLAS has no such compute type, which `HostDevice` checks."""
    monkeypatch.setattr(loader.cupy._core, "get_compute_type", lambda dtype: setting)
    suffix = {"DEFAULT": "", "TF32": "_FAST_TF32", "PEDANTIC": "_PEDANTIC"}[setting]
    assert loader._compute_type(DTYPES["float32"]) == "32F" + suffix
    rest = suffix if setting == "PEDANTIC" else ""
    assert loader._compute_type(DTYPES["float64"]) == "64F" + rest
    assert loader._compute_type(DTYPES["bfloat16"]) == "32F" + rest


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products(cuda, rng, dtype):
    kind = DTYPES[dtype]
    a, b = (rng.standard_normal(shape).astype(kind) for shape in ((6, 9), (9, 4)))
    cut = rng.standard_normal((6, 20)).astype(kind)[:, 3:12]  # rows apart: in neither order
    pairs = [(a, b), (np.asfortranarray(a), b), (cut, b), (cut.T, a), (a.astype(wide(dtype)), b)]
    for left, right in pairs:
        ours, theirs = cuda.matmul(left, right), reference.matmul(left, right)
        assert_close(ours, theirs, 1e-13 if dtype == "float64" else 5e-6, "matmul")
        apart = fenced((*theirs.shape, 2), theirs.dtype)[..., 0]  # in neither order
        for out in (fenced(theirs.shape, theirs.dtype), fenced(theirs.shape, kind), apart):
            assert cuda.matmul(left, right, out) is out
            np.testing.assert_array_equal(out, ours.astype(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table_add_up_in_one_order(cuda, rng, dtype):
    """The same bits however the threads take turns, also where many hits lie in one block or in none."""
    for M, N, V in [(0, 3, 5), (300, 5, 3), (700, 8, 400), (129, 520, 2), (200, 3, 1)]:
        d_rows, index = rng.standard_normal((M, N)).astype(DTYPES[dtype]), rng.integers(0, V, M)
        results = []
        for order in ("forward", "reverse", "shuffled"):
            cuda.device.order = order
            results.append(cuda.embedding_backward(d_rows, index, V))
        for result in results[1:]:
            np.testing.assert_array_equal(results[0], result)
        expected = reference.embedding_backward(d_rows.astype(np.float64), index, V)
        scale = {"float64": 1e-12, "float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
        np.testing.assert_allclose(
            results[0].astype(np.float64), expected, rtol=scale, atol=scale * np.abs(expected).max(initial=1)
        )
        assert results[0].dtype == DTYPES[dtype]


def test_rows_of_a_table_in_any_memory_order(cuda, rng):
    d_rows, index = rng.standard_normal((12, 8)), rng.integers(0, 5, 24).astype(np.int32)
    ours = cuda.embedding_backward(np.asfortranarray(d_rows), index[::2], 5)
    np.testing.assert_allclose(ours, reference.embedding_backward(d_rows, index[::2], 5), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------- the sources


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.cu*")), ids=lambda path: path.name)
def test_sources_need_no_cuda_headers(path):
    """NVRTC finds none by itself, and an installation of CuPy may have none."""
    includes = re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE)
    assert set(includes) <= {f'"{header.name}"' for header in PACKAGE.glob("*.cuh")}
    assert "__shared__" not in path.read_text().replace(
        "extern __shared__ __align__(16) unsigned char shared_[]", ""
    )
