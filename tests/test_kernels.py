"""Every kernel module behind the seam against the reference: the same numbers for every case it claims.

The kernels are called directly, as the layers call them. Tolerances: 2e-6 for what a float32 scan computes
forward, up to T = 1000, and 1e-12 in float64, absolute where values are at most 1; what can grow (a gradient,
the state of a relu network, c) is measured against the largest of its entries. In half precision h is rounded
at every step, and where two sums differ in their last float32 bit it may fall on the next number: four units
in the last place of 1.

"cuda" is the CuPy module on the host, on NumPy arrays; "cuda-gpu" is the same on a GPU.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from typing import Any, NamedTuple

import host_device
import ml_dtypes
import numpy as np
import pytest
from property_based import given, settings, st

from rnnkit.kernels import Case, kernels_for, reference

# Module, dtype. A module whose compiler or library is missing is skipped.
MODULES = [
    ("numba", "float32"),
    ("numba", "float64"),
    ("numpy", "float32"),
    ("numpy", "float64"),
    *(
        (name, dtype)
        for name in ("cuda", "cuda-gpu")
        for dtype in ("float32", "float64", "float16", "bfloat16")
    ),
]
TOLERANCE = {"float32": 2e-6, "float64": 1e-12, "float16": 4 * 2**-11, "bfloat16": 4 * 2**-8}
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
VARIANTS = {
    "rnn-tanh": ("rnn", {"nonlinearity": "tanh"}),
    "rnn-relu": ("rnn", {"nonlinearity": "relu"}),
    "lstm": ("lstm", {}),
    "lstm-projected": ("lstm", {"weight_hr": True}),
    "gru": ("gru", {}),
    "gru-bias": ("gru", {"bias_hn": True}),
}


UNCLAIMED = {("numba", "lstm-projected")}  # what a module refuses by `why_not`
HALVES = {"cuda", "cuda-gpu"}  # modules that serve float16 and bfloat16


def marked(*parameters: str) -> Any:
    """Return a test's parameters, of which the first is a module, with the mark that it needs."""
    marks = [pytest.mark.gpu] if parameters[0] == "cuda-gpu" else []
    return pytest.param(*parameters, marks=marks, id="-".join(parameters))


NAMES = [marked(name) for name in sorted({name for name, _ in MODULES})]
SERVED = [
    (*module, variant) for module in MODULES for variant in VARIANTS if (module[0], variant) not in UNCLAIMED
]
SERVED_NAMES = [
    marked(*pair)
    for pair in sorted({(name, variant) for name, dtype, variant in SERVED if dtype == "float64"})
]
# Where a state of half precision falls on another number, relu may fall on the other side of its kink, and a
# gradient is another one: no tolerance holds for every problem that can be drawn.
SMOOTH = [
    marked(*served)
    for served in SERVED
    if served[2] != "rnn-relu" or served[1] not in ("float16", "bfloat16")
]
SERVED = [marked(*served) for served in SERVED]


@pytest.fixture(params=[pytest.param(param.values, marks=param.marks, id=param.id) for param in SERVED])
def served(request):
    """The name of a module, a dtype and a variant that it serves."""
    return request.param


@pytest.fixture
def kernel(served):
    """A kernel module and a dtype that it serves."""
    return load(served[0]), served[1]


@pytest.fixture
def variant(served):
    """A variant that the module of `kernel` serves."""
    return served[2]


class OnGPU:
    """The CuPy kernels, given and giving NumPy arrays; what is saved stays on the device."""

    def __init__(self, module: Any):
        self._module, self._cupy = module, importlib.import_module("cupy")

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            there = {name: self._there(value) for name, value in options.items()}
            results = getattr(self._module, name)(*[self._there(arg) for arg in args], **there)
            return (
                tuple(self._here(result) for result in results)
                if type(results) is tuple
                else self._here(results)
            )

        return getattr(self._module, name) if name == "why_not" else call

    def _there(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.name == "bfloat16":
            host_device.require_cupys_bfloat16()
        return self._cupy.asarray(value)

    def _here(self, value: Any) -> Any:
        return self._cupy.asnumpy(value) if isinstance(value, self._cupy.ndarray) else value


def emulated(module: Any) -> bool:
    """Whether each launch takes a tenth of a millisecond: tests then choose fewer sizes."""
    return hasattr(module, "device")


def load(name: str) -> Any:
    if name == "cuda":
        return host_device.on_host()
    if name == "cuda-gpu":
        cupy = pytest.importorskip("cupy")
        if not cupy.cuda.is_available():
            pytest.skip("no GPU")
        return OnGPU(importlib.import_module("rnnkit.kernels.cuda"))
    module = importlib.import_module(f"rnnkit.kernels.{name}")
    reason = module.why_not("rnn_forward", Case("rnn", "float32", 1))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    return module


# ------------------------------------------------------------------------------------------ a problem


class Problem(NamedTuple):
    """The arguments of one scan there and back, as the layers would make them."""

    cell: str
    gates: np.ndarray
    states: list[np.ndarray]
    weight_hh: np.ndarray
    options: dict[str, Any]
    lengths: np.ndarray | None
    reverse: bool
    d_output: np.ndarray
    d_states: list[np.ndarray]

    def forward(self, module: Any, save: bool = True) -> tuple[Any, ...]:
        scan = getattr(module, f"{self.cell}_forward")
        return scan(
            self.gates.copy(), *self.states, self.weight_hh, **self.options,
            lengths=self.lengths, reverse=self.reverse, save=save,
        )  # fmt: skip

    def backward(self, module: Any, saved: Any) -> tuple[np.ndarray, ...]:
        scan = getattr(module, f"{self.cell}_backward")
        extra = {name: self.options[name] for name in self.options if name == "weight_hr"}
        return scan(saved, self.weight_hh, self.d_output, *self.d_states, **extra)

    def both(self, module: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return copies of what the forward and the backward scan compute."""
        *results, saved = self.forward(module)
        results = [result.copy() for result in results]
        return results, [gradient.copy() for gradient in self.backward(module, saved)]

    def inputs(self) -> list[np.ndarray]:
        """Return all arrays that a kernel must leave as they are."""
        options = [value for value in self.options.values() if isinstance(value, np.ndarray)]
        lengths = [] if self.lengths is None else [self.lengths]
        return [*self.states, self.weight_hh, *options, *lengths, self.d_output, *self.d_states]


def problem(
    variant: str, dtype: str, T: int, B: int, H: int, *, ragged: str = "none", reverse: bool = False,
    seed: int = 0, poison: float = 0.0,
) -> Problem:  # fmt: skip
    """Draw a problem; `poison` is what lies in the padding of gates and, for gates alone, of d_output."""
    cell, wanted = VARIANTS[variant]
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    wide = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
    rng = np.random.default_rng(seed)
    P = max(1, H // 2) if "weight_hr" in wanted else H
    # As layers begin, but with twice the spread: gates then reach their nonlinear parts.
    scale = 2.0 / np.sqrt(H)

    def normal(*shape: int, scale: float = 1.0, kind: np.dtype[Any] = dtype) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(kind)

    options = dict(wanted)
    if "weight_hr" in wanted:
        options["weight_hr"] = normal(P, H, scale=1.0 / np.sqrt(H))
    if "bias_hn" in wanted:
        options["bias_hn"] = normal(H)
    lengths = None
    if ragged != "none":
        lengths = rng.integers(0, T + 1, B)
        if ragged == "sorted":
            lengths = np.sort(lengths)[::-1].copy()
        if ragged == "zero":
            lengths = np.zeros(B, np.int64)
    # h, and of an LSTM c, which is kept in the dtype of sums.
    kinds = ((P, dtype), (H, wide)) if cell == "lstm" else ((P, dtype),)
    gates, d_output = normal(T, B, GATES[cell] * H, kind=wide), normal(T, B, P)
    weight_hh = (rng.uniform(-scale, scale, (GATES[cell] * H, P)) / 2).astype(dtype)
    if lengths is not None:
        padding = np.arange(T)[:, None] >= lengths[None, :]
        d_output[padding] = poison
        if poison:
            gates[padding] = poison
    states, d_states = ([normal(B, N, kind=kind) for N, kind in kinds] for _ in ("initial", "final"))
    return Problem(cell, gates, states, weight_hh, options, lengths, reverse, d_output, d_states)


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    if ours.dtype.itemsize == 2:
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    scale = max(1.0, float(np.max(np.abs(theirs), initial=0.0)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=what)


def assert_agrees(case: Problem, module: Any, dtype: str) -> None:
    """Compare a scan there and back, and the scan without `save`, with the reference."""
    tolerance = TOLERANCE[dtype]
    expected, d_expected = case.both(reference)
    results, gradients = case.both(module)
    assert len(results) == len(expected)
    for k, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        assert ours.flags.c_contiguous
        assert_close(ours, theirs, tolerance, f"result {k}")
    for k, (ours, theirs) in enumerate(zip(gradients, d_expected, strict=True)):
        assert ours.flags.c_contiguous
        assert_close(ours, theirs, 2 * tolerance, f"gradient {k}")
    *lean, nothing = case.forward(module, save=False)
    assert nothing is None
    for k, (ours, theirs) in enumerate(zip(lean, expected, strict=True)):
        assert_close(ours, theirs, tolerance, f"result {k} without save")


# ------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ragged", ["none", "unsorted", "sorted", "zero"])
@pytest.mark.parametrize("H", [1, 3, 17, 64, 200])
def test_agrees_with_the_reference(kernel, variant, H, ragged, reverse):
    module, dtype = kernel
    shapes = itertools.product((1, 2, 9), (0, 1, 2, 5))
    for T, B in [(2, 5), (9, 2)] if emulated(module) else shapes:
        case = problem(variant, dtype, T, B, H, ragged=ragged, reverse=reverse, seed=H + 10 * T + B)
        assert_agrees(case, module, dtype)


@settings(deadline=None, max_examples=20)
@given(
    T=st.integers(1, 40), B=st.integers(0, 40),
    H=st.integers(1, 70), ragged=st.sampled_from(["none", "unsorted"]), reverse=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@pytest.mark.parametrize(("name", "dtype", "variant"), SMOOTH)
def test_agrees_with_the_reference_on_random_problems(name, dtype, variant, T, B, H, ragged, reverse, seed):
    assert_agrees(
        problem(variant, dtype, T, B, H, ragged=ragged, reverse=reverse, seed=seed), load(name), dtype
    )


@pytest.mark.parametrize(("T", "B", "H"), [(70, 32, 48), (3, 130, 128), (400, 3, 20)])
@pytest.mark.parametrize("ragged", ["none", "unsorted"])
def test_agrees_with_the_reference_beyond_a_block(kernel, variant, T, B, H, ragged):
    """Kernels may work in blocks of time steps, of rows or of columns; these sizes need several of each."""
    module, dtype = kernel
    if emulated(module) and T == 400:
        pytest.skip("an emulated kernel has the thousand steps of the next test")
    for reverse in [ragged == "none"] if emulated(module) else [False, True]:
        assert_agrees(problem(variant, dtype, T, B, H, ragged=ragged, reverse=reverse), module, dtype)


@pytest.mark.parametrize("B", [1, 6])
def test_long_sequences(kernel, variant, B):
    """Rounding errors may not add up: the same 2e-6 after a thousand steps."""
    module, dtype = kernel
    if emulated(module) and (B == 1 or dtype not in ("float32", "float64")):
        pytest.skip("an emulated kernel does the same for every sequence, and takes its time")
    case = problem(variant, dtype, 1000, B, 24, seed=7)
    for ours, theirs in zip(case.both(module)[0], case.both(reference)[0], strict=True):
        # A relu state is not bounded by 1, so that its error is relative to its largest value.
        assert_close(ours, theirs, TOLERANCE[dtype], "after 1000 steps")


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_padding_is_never_read_and_always_zero(kernel, variant, reverse):
    module, dtype = kernel
    clean = problem(variant, dtype, 12, 7, 10, ragged="unsorted", reverse=reverse, seed=3)
    dirty = problem(variant, dtype, 12, 7, 10, ragged="unsorted", reverse=reverse, seed=3, poison=np.nan)
    padding = np.arange(12)[:, None] >= clean.lengths[None, :]
    assert padding.any()
    assert np.isnan(dirty.gates[padding]).all()
    assert np.isnan(dirty.d_output[padding]).all()
    for ours, theirs in zip(
        itertools.chain(*dirty.both(module)), itertools.chain(*clean.both(module)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    results, gradients = dirty.both(module)
    sequences = [array for array in [*results, *gradients] if array.ndim == 3]
    assert len(sequences) >= 2
    for sequence in sequences:
        assert not sequence[padding].any()
    *lean, _ = dirty.forward(module, save=False)
    for ours, theirs in zip(lean, results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("value", [-1e4, 1e4, -90.0, 90.0])
def test_saturated_gates_are_exact_and_silent(kernel, variant, value):
    """Nothing overflows into NaN, and no warning comes (warnings are errors in this test suite)."""
    module, dtype = kernel
    case = problem(variant, dtype, 3, 4, 5)
    case.gates[...] = value
    case.weight_hh[...] = 0.0
    assert_agrees(case, module, dtype)


@pytest.mark.parametrize("ragged", ["none", "unsorted", "sorted", "zero"])
def test_inputs_stay_and_results_are_new(kernel, variant, ragged):
    module, dtype = kernel
    for T, reverse in itertools.product((1, 5), (False, True)):
        case = problem(variant, dtype, T, 4, 6, ragged=ragged, reverse=reverse)
        inputs = case.inputs()
        before = [array.copy() for array in inputs]
        for array in inputs:
            array.flags.writeable = False
        *lean, _ = case.forward(module, save=False)
        *results, saved = case.forward(module)
        gradients = case.backward(module, saved)
        for array, copy in zip(inputs, before, strict=True):
            np.testing.assert_array_equal(array, copy)
        for result in [*lean, *results, *gradients]:
            assert not any(np.shares_memory(result, array) for array in inputs)
        returned = [*results, *gradients]
        for one, other in itertools.combinations(returned, 2):
            assert not np.shares_memory(one, other)


def test_the_backward_scan_leaves_the_results_alone(kernel, variant):
    """The output goes to the next layer, whose parameter gradients need it after this layer's way back."""
    module, dtype = kernel
    case = problem(variant, dtype, 6, 3, 5, ragged="unsorted")
    *results, saved = case.forward(module)
    before = [result.copy() for result in results]
    case.backward(module, saved)
    for result, copy in zip(results, before, strict=True):
        np.testing.assert_array_equal(result, copy)


def test_the_same_input_gives_the_same_bits(kernel, variant):
    module, dtype = kernel
    for B, ragged in itertools.product((1, 3, 40), ("none", "unsorted")):
        case = problem(variant, dtype, 20, B, 33, ragged=ragged)
        first = list(itertools.chain(*case.both(module)))
        for _ in range(3):
            for ours, again in zip(first, itertools.chain(*case.both(module)), strict=True):
                np.testing.assert_array_equal(ours, again)


def test_threads_do_not_meet(kernel, variant):
    module, dtype = kernel
    cases = [problem(variant, dtype, 30, 5, 16, seed=k) for k in range(4)]
    alone = [case.both(module)[0][0] for case in cases]
    failures: list[int] = []

    def repeat(k: int) -> None:
        for _ in range(2 if emulated(module) else 10):
            if not np.array_equal(cases[k].both(module)[0][0], alone[k]):
                failures.append(k)

    threads = [threading.Thread(target=repeat, args=(k,)) for k in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("ragged", ["none", "unsorted"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("name", "variant"), SERVED_NAMES)
def test_gradients_against_central_differences(name, variant, ragged, reverse):
    """A step in a random direction of all inputs changes <d_results, results> as the gradient says."""
    module = load(name)
    seed = int(np.random.SeedSequence().entropy % 2**32)
    rng = np.random.default_rng(seed)
    case = problem(variant, "float64", 6, 4, 5, ragged=ragged, reverse=reverse, seed=seed)
    if case.lengths is not None:
        case.lengths[:2] = 6, 0  # a full and an empty sequence, whatever was drawn
        case.d_output[np.arange(6)[:, None] >= case.lengths[None, :]] = 0.0
    d_gates, *d_states = case.backward(module, case.forward(module)[-1])
    gradients = [d_gates, *d_states[: len(case.states)]]
    inputs = [case.gates, *case.states]
    if "weight_hr" in case.options:
        gradients.append(d_states[-1])
        inputs.append(case.options["weight_hr"])
    if case.cell == "gru" and "bias_hn" in case.options:
        gradients.append(d_states[-1].sum(axis=(0, 1)))
        inputs.append(case.options["bias_hn"])
    directions = [rng.standard_normal(array.shape) for array in inputs]

    def value(step: float) -> float:
        moved = [array + step * direction for array, direction in zip(inputs, directions, strict=True)]
        options = dict(case.options)
        for option in ("weight_hr", "bias_hn"):
            if option in options:
                options[option] = moved[-1]
        there = case._replace(gates=moved[0], states=moved[1 : 1 + len(case.states)], options=options)
        results = there.forward(module)[:-1]
        weights = [case.d_output, *case.d_states]
        return sum(float(np.sum(w * result)) for w, result in zip(weights, results, strict=True))

    expected = (value(1e-6) - value(-1e-6)) / 2e-6
    actual = sum(float(np.sum(g * direction)) for g, direction in zip(gradients, directions, strict=True))
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-8), f"seed {seed}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_module_claims(name, variant):
    cell, options = VARIANTS[variant]
    case = Case(cell, "float32", 8, proj_size=3 if "weight_hr" in options else 0)
    assert (load(name).why_not(f"{cell}_forward", case) is not None) == ((name, variant) in UNCLAIMED)


@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] not in HALVES])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", sorted(GATES))
def test_half_precision_is_refused_with_a_reason(name, dtype, cell):
    module = load(name)
    reason = module.why_not(f"{cell}_forward", Case(cell, dtype, 8))
    assert reason
    assert len(reason) < 80


@pytest.mark.parametrize("cell", sorted(GATES))
def test_the_seam_takes_the_fast_module(cell, monkeypatch):
    monkeypatch.delenv("RNNKIT_KERNELS", raising=False)
    assert kernels_for("numpy", Case(cell, "float32", 8)).modules[f"{cell}_forward"] != "reference"
    half = kernels_for("numpy", Case(cell, "float16", 8))
    assert half.modules[f"{cell}_forward"] == "reference"
    assert half.refused[f"{cell}_forward"]["numpy"]


@pytest.mark.parametrize("name", [marked(name) for name in ("numba", "numpy", "cuda", "cuda-gpu")])
@pytest.mark.parametrize(
    ("rows", "columns", "table"), [(0, 3, 5), (1, 1, 1), (40, 7, 5), (40, 7, 1000), (700, 401, 9)]
)
def test_embedding_backward(name, rows, columns, table, monkeypatch, rng):
    monkeypatch.setenv("RNNKIT_NUM_THREADS", "3")  # the last case is shared by threads
    d_rows, index = rng.standard_normal((rows, columns)), rng.integers(0, table, rows)
    ours = load(name).embedding_backward(d_rows, index, table)
    np.testing.assert_allclose(ours, reference.embedding_backward(d_rows, index, table), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------- around the scans


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 7), (5, 1, 3), (6, 0, 2), (300, 90, 210)], ids=str)
@pytest.mark.parametrize("name", ["numba", "numpy", "reference"])
def test_matmul_into_a_given_array(name, shape, rng):
    (M, K, N), matmul = shape, load(name).matmul
    a, b = rng.standard_normal((K, M)).T, rng.standard_normal((N, K)).T
    out = np.full((M + 1, N), np.nan)
    assert matmul(a, b, out[:M]).base is out
    np.testing.assert_allclose(out[:M], a @ b, atol=1e-12)
    assert np.isnan(out[M]).all()
    np.testing.assert_array_equal(matmul(a, b), out[:M])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("counted", ["all", "some", "none"])
@pytest.mark.parametrize(("M", "V"), [(1, 1), (7, 5), (1200, 65), (3, 70_000)])
def test_softmax_cross_entropy_block_by_block(M, V, counted, dtype, rng):
    logits, targets, counts = rng.standard_normal((M, V)).astype(dtype) * 3, rng.integers(0, V, M), None
    poisoned, wild = logits.copy(), targets.copy()
    if counted != "all":
        counts = (rng.random(M) < 0.6) & (counted == "some")
        poisoned[~counts], wild[~counts] = np.nan, V + 3
    loss, d_logits = load("numpy").softmax_cross_entropy(poisoned, wild, counts)
    expected, d_expected = reference.softmax_cross_entropy(logits.astype(np.float64), targets, counts)
    tolerance = TOLERANCE[dtype]
    assert loss.dtype == d_logits.dtype == dtype
    np.testing.assert_allclose(loss, expected, rtol=tolerance, atol=tolerance)
    n = M if counts is None else max(1, counts.sum())
    np.testing.assert_allclose(d_logits, d_expected, rtol=0, atol=tolerance / n)
    alone, nothing = load("numpy").softmax_cross_entropy(poisoned, wild, counts, False)
    assert nothing is None
    assert alone == loss
    assert reference.softmax_cross_entropy(logits, targets, counts, False)[1] is None


@pytest.mark.parametrize("size", [0, 1, 1 << 14, (1 << 14) + 5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_block_by_block(size, weight_decay, rng):
    start = [
        rng.standard_normal(size),
        rng.standard_normal(size),
        rng.standard_normal(size),
        rng.random(size),
    ]
    results = []
    for name in ("numpy", "reference"):
        arrays = [part.copy() for part in start]
        load(name).adam(*arrays, betas=(0.8, 0.95), steps=3, lr=0.1, eps=1e-3, weight_decay=weight_decay)
        np.testing.assert_array_equal(arrays[1], start[1])  # the gradient is left alone
        results.append(arrays)
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)
