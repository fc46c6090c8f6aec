"""What is special to the numba kernels, and that they agree with the reference case by case."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

import rnnkit
from rnnkit import direction
from rnnkit.kernels import Case, kernels_for, reference
from rnnkit.kernels import numba as kernels

CELLS = ("lstm", "gru", "rnn", "relu")
# float32: sums of H products in another order, outputs below 1 but for relu's, which grow with H. Gradients
# gather T * B * H of them. float64: the same, scaled.
TOLERANCE = {"float32": 2e-6, "float64": 1e-12}


class Problem:
    """Random arguments of one cell's kernels; the padding of everything that has some is NaN."""

    def __init__(self, cell, dtype="float32", T=7, B=5, H=17, ragged=False, reverse=False, seed=0):
        rng = np.random.default_rng(seed)
        self.cell = "rnn" if cell == "relu" else cell
        self.options = {"reverse": reverse, "lengths": None}
        if self.cell == "rnn":
            self.options["nonlinearity"] = "relu" if cell == "relu" else "tanh"
        gates = {"rnn": 1, "lstm": 4, "gru": 3}[self.cell] * H

        def normal(*shape, scale=1.0):
            return (scale * rng.standard_normal(shape)).astype(dtype)

        self.gates, self.d_output = normal(T, B, gates), normal(T, B, H)
        self.states = [normal(B, H) for _ in range(1 + (cell == "lstm"))]
        self.d_states = [normal(B, H) for _ in self.states]
        self.weight = normal(gates, H, scale=H**-0.5)
        if cell == "gru":
            self.options["bias_hn"] = normal(H)
        if ragged:
            lengths = rng.integers(0, T + 1, B)
            self.options["lengths"] = lengths
            padding = np.arange(T)[:, None] >= lengths[None, :]
            self.gates[padding] = np.nan
            self.d_output[padding] = np.nan

    @property
    def inputs(self):
        given = [*self.states, self.weight, self.d_output, *self.d_states, self.options["lengths"]]
        return [array for array in (*given, self.options.get("bias_hn")) if array is not None]

    def forward(self, module=kernels, save=True):
        scan = getattr(module, f"{self.cell}_forward")
        *results, saved = scan(self.gates.copy(), *self.states, self.weight, **self.options, save=save)
        assert (saved is not None) == save
        return results, saved

    def backward(self, saved, module=kernels):
        d_output = self.d_output
        if module is reference and self.options["lengths"] is not None:
            d_output = np.where(np.isnan(d_output), 0, d_output)  # the reference multiplies before it selects
        return getattr(module, f"{self.cell}_backward")(saved, self.weight, d_output, *self.d_states)

    def run(self, module=kernels):
        results, saved = self.forward(module)
        return [array.copy() for array in results] + list(self.backward(saved, module))


class PoisonedNumPy:
    """NumPy, but new memory is full of NaN: what no tile has written must not pass for an old result."""

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, *args):
        array = np.empty(*args)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    def empty_like(self, array):
        return self.empty(array.shape, array.dtype)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    monkeypatch.setattr(kernels, "np", PoisonedNumPy())


def same_bits(first, second):
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def blas_threads():
    """Return the thread count of each BLAS library; numba may load SciPy's between two calls."""
    from threadpoolctl import threadpool_info

    return {lib["filepath"]: lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


def assert_close(ours, theirs, dtype, T=1):
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), k
        if a.size:
            scale = max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * scale, err_msg=str(k))


# ------------------------------------------------------------------------------ the same as the reference


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("H", [1, 3, 17, 64, 200])
@pytest.mark.parametrize("reverse", [False, True], ids=["onward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_the_reference(cell, dtype, ragged, reverse, H, T):
    for B in (0, 1, 2, 5, 33):
        problem = Problem(cell, dtype, T, B, H, ragged, reverse, seed=B)
        before = [array.copy() for array in problem.inputs]
        ours, theirs = problem.run(), problem.run(reference)
        assert_close(ours, theirs, dtype)
        assert_close(problem.forward(save=False)[0], problem.forward(reference)[0], dtype)
        assert same_bits(before, problem.inputs)


@pytest.mark.parametrize("given", ["x", "packed", "table", "table of shares", "large", "large table"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_layer_is_projection_and_scan(cell, ragged, given, rng, monkeypatch):
    monkeypatch.setattr(kernels._tiles, "_CHUNK_ROWS", int(rng.integers(1, 40)))
    if given.startswith("large"):
        monkeypatch.setattr(kernels._tiles, "_LARGE_INPUT", 0)
    for T, B, I, H in ((23, 5, 9, 17), (1, 1, 40, 16), (6, 33, 1, 3)):
        problem = Problem(
            cell, T=T, B=B, H=H, ragged=ragged, reverse=bool(rng.integers(2)), seed=rng.integers(99)
        )
        columns, bias = problem.gates.shape[2], rng.standard_normal(problem.gates.shape[2]).astype("float32")
        weight, index = (rng.standard_normal((columns, I)) * I**-0.5).astype("float32"), None
        live = ~np.isnan(problem.gates[:, :, 0])
        if given in ("x", "large"):
            x = rng.standard_normal((T, B, I)).astype("float32")
            rows = x.copy()
            x[~live] = np.nan
        else:
            x = rng.standard_normal((T * B if given == "packed" else 4, I)).astype("float32")
            index = np.zeros((T, B), np.int64)
            index[live] = (
                rng.permutation(T * B)[: live.sum()] if given == "packed" else rng.integers(0, 4, live.sum())
            )
            rows = x[index]
        problem.gates = rows @ weight.T + bias
        shares = given == "table of shares"
        layer = getattr(kernels, f"{problem.cell}_layer")
        for save in (True, False):
            *results, saved = layer(
                x @ weight.T if shares else x, *problem.states, problem.weight, **problem.options,
                weight_ih=None if shares else weight, bias=bias, index=index, save=save,
            )  # fmt: skip
            assert_close(results, problem.forward(reference)[0], "float32")
            if save:
                ours = problem.backward(saved)
                assert_close(ours, problem.backward(problem.forward(reference)[1], reference), "float32")


def layer_of(cell, I, H, dtype, **options):
    """Return a layer of NumPy arrays."""
    if cell == "relu":
        options["nonlinearity"] = "relu"
    kind = {"lstm": rnnkit.LSTM, "gru": rnnkit.GRU}.get(cell, rnnkit.RNN)
    return kind(I, H, dtype=dtype, backend="numpy", seed=0, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 64, 64), (3, 5, 17), (1, 33, 50), (2, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_short_sequence_agrees_with_the_reference(cell, dtype, B, I, H, T, bias, monkeypatch, rng):
    layer = layer_of(cell, I, H, "float64", bias=bias)
    for name, array in layer.params.items():
        array[...] = rng.standard_normal(array.shape) / (1.0 if "bias" in name else array.shape[1] ** 0.5)
    x, *states = rng.standard_normal((T, B, I)), *rng.standard_normal((1 + (cell == "lstm"), 1, B, H))
    biases = [] if bias else [np.empty(0, dtype)] * 2
    arguments = [array.astype(dtype) for array in (x, *states, *layer.params.values(), *biases)]
    before = [array.copy() for array in arguments]
    name, options = ("rnn", {"nonlinearity": "relu"}) if cell == "relu" else (cell, {})
    ours = getattr(kernels, f"{name}_short")(*arguments, **options)
    assert same_bits(before, arguments)

    monkeypatch.setenv("RNNKIT_KERNELS", "reference")
    output, final = layer(x, tuple(states) if cell == "lstm" else states[0])
    theirs = [output, *(final if cell == "lstm" else (final,))]
    assert_close(ours, [array.astype(dtype) for array in theirs], dtype)


@pytest.mark.parametrize("K", [1, 7, 16, 45])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_in_four_streams_stay_within_their_arrays(dtype, K, rng):
    for N in range(1, 10):
        weight, z = np.full((N + 4, K), np.nan, dtype), np.full(N + 4, 7.0, dtype)
        weight[:N] = rng.standard_normal((N, K))
        x = np.full(K + 3, np.nan, dtype)
        x[1 : K + 1] = rng.standard_normal(K)
        kernels._steps.multiply(weight[:N], x, 1, z[:N])
        np.testing.assert_allclose(z[:N], weight[:N] @ x[1 : K + 1], rtol=0, atol=10 * TOLERANCE[dtype])
        assert (z[N:] == 7.0).all()


@pytest.fixture
def short_calls(monkeypatch):
    """A list of the calls of kernels for short sequences."""
    calls = []
    for cell, nonlinearity in (("rnn", "tanh"), ("rnn", "relu"), ("lstm", "tanh"), ("gru", "tanh")):
        case = Case(cell, "float32", 8, nonlinearity=nonlinearity)
        functions = kernels_for("numpy", case).functions

        def counted(*args, short=functions[f"{cell}_short"], **options):
            calls.append(short)
            return short(*args, **options)

        monkeypatch.setitem(functions, f"{cell}_short", counted)
    return calls


@pytest.mark.parametrize("cell", CELLS)
def test_short_sequences_and_steps_take_their_kernel(cell, short_calls, rng):
    layer = layer_of(cell, 5, 8, "float32", num_layers=2)
    x = rng.standard_normal((3, 2, 5), dtype=np.float32)
    output, state = layer(x)[0], None
    assert len(short_calls) == 2
    for t in range(3):
        y_t, state = layer.step(x[t], state)
        np.testing.assert_allclose(y_t, output[t], rtol=0, atol=2e-6)
    assert len(short_calls) == 8


@pytest.mark.parametrize("cell", CELLS)
def test_what_the_kernel_for_short_sequences_cannot_do_is_done_without_it(
    cell, short_calls, monkeypatch, rng
):
    layer = layer_of(cell, 5, 8, "float32")
    x = rng.standard_normal((3, 2, 5), dtype=np.float32)
    output, state = layer(x)
    y_t, _ = layer.step(x[0], state)
    assert len(short_calls) == 2
    read_only = x.copy()
    read_only.flags.writeable = False
    for same in (read_only, np.asfortranarray(x)):
        np.testing.assert_allclose(layer(same)[0], output, rtol=0, atol=2e-6)
        np.testing.assert_allclose(layer.step(same[0], state)[0], y_t, rtol=0, atol=2e-6)
    layer(x, lengths=[3, 3])
    layer.vjp(x)
    layer_of(cell, 8, 8, "float32")(np.zeros((3, 2), np.int64))
    layer_of(cell, 5, 8, "float32", bidirectional=True)(x)
    monkeypatch.setattr(direction, "_SHORT", 0)
    layer_of(cell, 5, 8, "float32")(np.zeros((direction._FEW_STEPS + 1, 1, 5), np.float32))
    assert len(short_calls) == 3  # of two directions, the one onward


@pytest.mark.parametrize("cell", CELLS[:3])
def test_stays_close_over_a_thousand_steps(cell):
    problem = Problem(cell, T=1000, B=3, H=64)
    for ours, theirs in zip(problem.forward()[0], problem.forward(reference)[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_central_differences(cell, reverse):
    problem = Problem(cell, "float64", T=6, B=4, H=19, ragged=True, reverse=reverse)
    rng = np.random.default_rng(1)
    d_states = problem.d_states
    valid = ~np.isnan(problem.d_output)

    def objective():
        (output, *states), _ = problem.forward()
        total = np.sum(output[valid] * problem.d_output[valid])
        return total + sum(np.sum(s * d) for s, d in zip(states, d_states, strict=True))

    d_gates, *rest = problem.backward(problem.forward()[1])
    for array, gradient in zip([problem.gates, *problem.states], [d_gates, *rest], strict=False):
        direction = np.where(np.isnan(array), 0.0, rng.standard_normal(array.shape))
        start, values = array.copy(), []
        for step in (1e-5, -1e-5):
            array[...] = start + step * direction
            values.append(objective())
        array[...] = start
        numeric, exact = (values[0] - values[1]) / 2e-5, np.sum(gradient * direction)
        assert exact == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_goes_where_the_reference_sends_it(cell, value):
    problem = Problem(cell, T=4, B=7, H=20)
    problem.gates[1, 2, 3::5] = value
    problem.states[0][5, 4] = value
    with np.errstate(invalid="ignore", over="ignore"):
        for ours, theirs in zip(problem.run(), problem.run(reference), strict=True):
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
            finite = np.isfinite(theirs)
            np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-5, atol=2e-6)


def test_extreme_values_saturate():
    z = np.array([-1e30, -700.0, -40.0, -8.0, -1e-30, 0.0, 1e-30, 1e-5, 8.0, 40.0, 700.0, 1e30])
    for dtype in (np.float32, np.float64):
        gates, h_0 = z.astype(dtype).reshape(1, 1, -1), np.zeros((1, z.size), dtype)
        output, _, _ = kernels.rnn_forward(gates, h_0, np.zeros((z.size, z.size), dtype))
        np.testing.assert_allclose(output.ravel(), np.tanh(z.astype(dtype)), rtol=4 * np.finfo(dtype).eps)


def test_read_only_inputs_are_taken():
    problem = Problem("lstm", ragged=True)
    writable = problem.run()
    compiled = len(kernels._forward.lstm_forward.signatures)
    for array in problem.inputs:
        array.flags.writeable = False
    assert same_bits(writable, problem.run())
    assert (
        len(kernels._forward.lstm_forward.signatures) == compiled
    )  # seconds, for every mixture of such arrays


# ------------------------------------------------------------------------------------------ threads

LARGE = {"T": 60, "B": 13, "H": 80}  # enough work for several threads, in every cell
# Fewer sequences than threads: the threads share the hidden units and meet once a step.
WIDE = {"T": 30, "B": 1, "H": 400}


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(
    "sizes", [LARGE, WIDE, {**WIDE, "B": 2}, {**WIDE, "B": 5}], ids=["large", "wide", "wide-2", "heavy"]
)
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_again_and_with_any_number_of_threads(cell, sizes, ragged, monkeypatch):
    problem = Problem(cell, **sizes, ragged=ragged, reverse=ragged)
    results = []
    for limit in ("_SMALL", "_SMALL_WEIGHT"):
        monkeypatch.setattr(kernels._tiles, limit, 0)
    if sizes["B"] == 5:
        monkeypatch.setattr(kernels._tiles, "_LARGE_WEIGHT", 0)
    for threads in ("1", "1", "2", "3", "5"):
        monkeypatch.setenv("RNNKIT_NUM_THREADS", threads)
        results.append(problem.run())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("cell", CELLS)
def test_helpers_may_come_at_any_time(cell, when, monkeypatch):
    problem = Problem(cell, T=300, B=1, H=400, reverse=True)
    monkeypatch.setenv("RNNKIT_NUM_THREADS", "1")
    expected = problem.run()
    teams, new_team = [], kernels._tiles._team.new_team

    def recorded():
        teams.append(new_team())
        return teams[-1]

    @contextmanager
    def helped(count, work, abandon):
        team, threads = teams[-1], [threading.Thread(target=work) for _ in range(count)]

        def start():
            for thread in threads:
                thread.start()

        timer = threading.Timer(0.0005, start)  # a scan takes at least 1 ms
        if when == "before":
            start()
            while team[kernels._tiles._team.JOINED] < count:
                time.sleep(0)
        elif when == "during":
            timer.start()
        yield
        abandon()
        if when == "during":
            timer.join()
        elif when == "after":
            start()
        for thread in threads:
            thread.join(timeout=10)
            assert not thread.is_alive()

    monkeypatch.setattr(kernels._tiles._team, "new_team", recorded)
    monkeypatch.setattr(kernels._tiles, "helped", helped)
    monkeypatch.setenv("RNNKIT_NUM_THREADS", "3")
    assert same_bits(expected, problem.run())
    shared_phases = [int(team[kernels._tiles._team.EXPECTED]) for team in teams]
    assert len(teams) == 2
    if when != "during":  # of the way back the last product is a phase of its own
        assert shared_phases == ([638, 602] if when == "before" else [0, 0])


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_alone_gives_the_same_bits_as_in_a_batch(cell):
    problem = Problem(cell, **LARGE)
    output = problem.forward()[0][0]
    for B in (1, 2, 4):
        part = Problem(cell, **LARGE)
        part.gates = np.ascontiguousarray(problem.gates[:, :B])
        part.states = [state[:B].copy() for state in problem.states]
        assert part.forward()[0][0].tobytes() == np.ascontiguousarray(output[:, :B]).tobytes()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RNNKIT_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"RNNKIT_NUM_THREADS": "zero", "OMP_NUM_THREADS": "0"}, len(os.sched_getaffinity(0))),
    ],
)
def test_thread_limit(variables, expected, monkeypatch):
    for name in ("RNNKIT_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert kernels.thread_limit() == expected


def test_threads_are_used(monkeypatch):
    monkeypatch.setenv("RNNKIT_NUM_THREADS", "3")
    seen, start = set(), threading.Barrier(3, timeout=10)

    def work(tile):
        start.wait()
        seen.add(threading.get_ident())

    kernels.run_tiles(work, 3, 3)
    assert len(seen) == 3


def test_an_error_in_a_tile_is_raised():
    def work(tile):
        if tile == 2:
            raise MemoryError("no room for tile 2")

    with pytest.raises(MemoryError, match="tile 2"):
        kernels.run_tiles(work, 4, 2)


@pytest.mark.parametrize("sizes", [LARGE, WIDE], ids=["large", "wide"])
def test_many_python_threads_at_once(sizes, monkeypatch):
    monkeypatch.setenv("RNNKIT_NUM_THREADS", "2")
    problem = Problem("lstm", **sizes)
    expected = problem.run()
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: problem.run(), range(20)))
    assert all(same_bits(expected, result) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_after_fork():
    # In a process of its own: a deadlocked child must not take the tests with it.
    code = """
import os, sys, threading
sys.path.insert(0, "tests")
from test_numba import LARGE, Problem, kernels, same_bits
problem = Problem("gru", **LARGE)
before, meeting = problem.run(), threading.Barrier(2, timeout=10)
child = os.fork()
if child == 0:
    kernels.run_tiles(lambda tile: meeting.wait(), 2, 2)  # an exception unless two threads are there
    os._exit(0 if same_bits(before, problem.run()) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _python(code, RNNKIT_NUM_THREADS="2").strip() == "0"


def test_nobody_elses_thread_counts_change(monkeypatch):
    import numba
    from threadpoolctl import threadpool_info

    def counts():
        pools = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        return {"numba": numba.get_num_threads(), **pools}

    monkeypatch.setenv("RNNKIT_NUM_THREADS", "3")
    before = counts()
    Problem("lstm", **LARGE).run()
    assert before.items() <= counts().items()


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot keep a thread off a processor"
)
def test_threads_keep_off_the_callers_processor_while_there_are_others_enough(monkeypatch):
    threads, allowed = kernels._threads, os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one processor only")
    assert threads._processor() in allowed
    pool = threads._Pool()

    def places(caller, helpers):
        """Where each thread of the pool may run, when called from that processor."""
        monkeypatch.setattr(threads, "_processor", lambda: caller)
        found, meeting = [], threading.Barrier(helpers)

        def work(tile):
            meeting.wait(10)
            found.append(os.sched_getaffinity(0))

        job = threads._Job(work, helpers)
        pool.offer(job, helpers)
        job.wait(0)
        return found

    few, enough = min(2, len(allowed) - 1), len(allowed)
    for caller in sorted(allowed)[:2]:
        assert places(caller, few) == [allowed - {caller}] * few
    assert places(caller, enough) == [allowed] * enough
    assert places(None, enough) == [allowed] * enough
    assert os.sched_getaffinity(0) == allowed


def test_blas_gets_its_threads_back_from_the_last_of_overlapping_products():
    from threadpoolctl import threadpool_limits

    with threadpool_limits(3, user_api="blas"):
        before, first_left, entered = blas_threads(), threading.Event(), threading.Event()

        def second():
            with kernels._blas._alone():
                entered.set()
                assert first_left.wait(10)

        thread = threading.Thread(target=second)
        with kernels._blas._alone():
            thread.start()
            assert entered.wait(10)
        first_left.set()
        thread.join()
        assert blas_threads() == before


# ------------------------------------------------------------------------------------------ the seam


def test_numba_comes_first_and_only_where_it_can(monkeypatch):
    monkeypatch.delenv("RNNKIT_KERNELS", raising=False)
    for cell in ("rnn", "lstm", "gru"):
        for dtype in ("float32", "float64"):
            assert kernels_for("numpy", Case(cell, dtype, 8)).modules[f"{cell}_forward"] == "numba"
    assert kernels.why_not("lstm_forward", Case("lstm", "float16", 8)) == "has no float16"
    assert kernels.why_not("lstm_forward", Case("lstm", "float32", 8, 4)) == "has no projection"


def _python(code, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_rnnkit_loads_no_numba():
    assert _python("import sys, rnnkit; rnnkit.LSTM(2, 3); print('numba' in sys.modules)").strip() == "False"


def test_without_numba_the_next_module_serves_and_the_remedy_is_named():
    code = """
import sys
sys.modules["numba"] = None
import numpy as np, rnnkit
from rnnkit.kernels import Case, kernels_for
lstm = rnnkit.LSTM(2, 3)
lstm(np.zeros((4, 1, 2), np.float32))
chosen = kernels_for("numpy", Case("lstm", "float32", 3))
print(chosen.modules["lstm_forward"], chosen.refused["lstm_forward"]["numba"])
"""
    printed = _python(code, RNNKIT_KERNELS="")
    assert printed.startswith("numpy ")
    assert 'pip install "rnnkit[cpu]"' in printed


def test_compiling_is_announced_once_and_then_cached_until_any_source_changes(tmp_path):
    code = """
import logging, numpy as np, rnnkit
logging.basicConfig(level=logging.INFO, format="%(message)s")
rnn = rnnkit.RNN(2, 3, dtype="float64")
rnn.vjp(np.zeros((4, 1, 2)))[1](None)
"""
    package = shutil.copytree(
        Path(rnnkit.__file__).parent, tmp_path / "rnnkit", ignore=shutil.ignore_patterns("__pycache__")
    )
    outputs = []
    for turn in range(3):
        if turn == 2:  # numba alone would look at the scans' own file, not at what was compiled into them
            with open(package / "kernels/numba/_team.py", "a") as file:
                file.write("# changed\n")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300,
            cwd=tmp_path,  # which Python searches first
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stderr.count("compiles its CPU kernels"))
    assert outputs == [1, 0, 1]


def test_layers_use_it():
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    lstm = rnnkit.LSTM(4, 6, num_layers=2, bidirectional=True, seed=0)
    output, _ = lstm(x, lengths=[5, 0, 2])
    (trained, _), pullback = lstm.vjp(x, lengths=[5, 0, 2])
    np.testing.assert_array_equal(output, trained)
    assert all(np.isfinite(g).all() for g in pullback(np.ones_like(output)).params.values())


@pytest.mark.parametrize("threads", ["1", "2", "3"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("M", "K", "N"),
    [(1, 1, 1), (0, 3, 4), (5, 0, 4), (300, 1, 70), (9, 8, 7), (300, 200, 100), (100, 200, 301)],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matmul_equals_numpys_and_gives_blas_its_threads_back(
    threads, M, K, N, given, dtype, monkeypatch, rng
):
    monkeypatch.setenv("RNNKIT_NUM_THREADS", threads)
    a = rng.standard_normal((K, M)).astype(dtype).T  # transposed, as many are
    b = rng.standard_normal((K, N)).astype(dtype)
    before = blas_threads()
    out = np.full((M, N), np.nan, dtype) if given else None
    got = kernels.matmul(a, b, out)
    assert before.items() <= blas_threads().items()
    assert got.flags.c_contiguous
    assert got is out or not given
    tolerance = 1e-12 if dtype == "float64" else 1e-4  # sums of 200 products of order one
    np.testing.assert_allclose(got, a.astype(np.float64) @ b.astype(np.float64), rtol=0, atol=tolerance)


def test_matmul_from_several_threads_at_once(monkeypatch, rng):
    monkeypatch.setenv("RNNKIT_NUM_THREADS", "2")
    a, b = rng.standard_normal((2, 200, 200))
    before = blas_threads()
    wrong = []

    def work():
        for _ in range(20):
            if not np.allclose(kernels.matmul(a, b), a @ b):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert before.items() <= blas_threads().items()
