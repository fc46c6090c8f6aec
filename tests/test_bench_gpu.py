"""The benchmark of a GPU, with NumPy and torch on the CPU in its place: plan, records, resuming, reports.

What only CUDA can do is in `bench.gpu.rig.Gpu` and `bench.gpu.limits.of_gpu`; `test_gpu.py` runs those on a
GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from host_device import on_host

from bench import cases, correct, ours, records, report, tables, timing
from bench.gpu import __main__ as program
from bench.gpu import clock, limits, measure, plan, rig, session, sides, soak
from bench.gpu import tables as gpu_tables
from rnnkit._array import BackendUnavailableError

ROOT = Path(__file__).parents[1]
QUICK = timing.Effort(0.0, 1)
CASE = cases.Case("forward", "lstm", 3, 2, 4, 5)


@pytest.fixture
def host(monkeypatch):
    """Return the stand-in for a GPU, with the two slowest kernel modules alone: nothing to compile.

    What is verified is small: the large shapes are for whole sequences in one launch.
    """
    monkeypatch.setattr(measure, "VERIFIED", tuple(one for one in measure.VERIFIED if one[0][3] < 100))
    monkeypatch.setattr(ours, "kernel_modules", lambda backend: ("numpy", "reference"))
    return rig.Host()


def session_in(directory, host):
    return session.Session(directory, host, "python -m bench.gpu --minutes 1", QUICK)


def tiny(count):
    """Return a plan of `count` different tiny cells."""
    return [("a question", plan.Cell(CASE._replace(T=2 + k))) for k in range(count)]


FOREVER = float("inf")


# ------------------------------------------------------------------------------------------- the plan


def test_the_plan_has_the_whole_grid_once_and_the_goals_first():
    cells = [cell for _, cell in plan.plan()]
    assert len(set(cells)) == len(cells)
    for axis, wanted in {
        "T": {128, 1024}, "B": {1, 16, 64, 256}, "cell": set(cases.CELLS), "operation": {"forward", "train"},
    }.items():  # fmt: skip
        assert {getattr(cell.case, axis) for cell in cells} == wanted
    assert {64, 160, 192, 768, 2048} <= {cell.case.H for cell in cells}
    assert {cell.precision for cell in cells} == set(plan.PRECISIONS)
    assert {cell.ragged for cell in cells} == {False, True}
    assert {(cell.layers, cell.directions) for cell in cells} == {(1, 1), (2, 1), (1, 2)}
    everything = itertools.product(plan.T, plan.B, plan.H, cases.CELLS, plan.OPERATIONS, plan.PRECISIONS)
    assert len(list(everything)) == sum(cell[2:] == (False, 1, 1) for cell in cells)
    first = cells[0].case
    assert (first.T, first.B, first.H, first.dtype) == (1024, 16, 768, "bfloat16")
    assert all(cell.case.T == 128 for cell in cells[2:60])


def test_float32_comes_with_and_without_tf32():
    by_precision = {cell.precision: cell for _, cell in plan.plan()}
    assert by_precision["tf32"].case.dtype == by_precision["float32"].case.dtype == "float32"
    assert not by_precision["float16"].tf32


def test_dry_run_needs_no_gpu_and_loads_none(tmp_path):
    code = (
        "import sys\n"
        "for name in ('cupy', 'torch', 'onnx', 'onnxruntime', 'numba', 'scipy', 'matplotlib', 'hypothesis',\n"
        "             'array_api_strict', 'threadpoolctl'): sys.modules[name] = None\n"
        "from bench.gpu.__main__ import main\n"
        "sys.exit(main(['--dry-run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(list(plan.plan()))} cells")
    assert f"\n  {sides.WHOLE} (RNNKIT_PERSISTENT=1)" in done.stdout
    assert "FlashRNN's published cell: 2\n  forward lstm (1024, 16, 768, 768) bfloat16" in done.stdout
    assert "... up to" in done.stdout


def test_gpu_tests_are_collected_without_optional_packages():
    """On the machine with the GPU there may be CuPy, torch and pytest, and little else."""
    code = (
        "import sys, pytest\n"
        "for name in ('onnx', 'onnxruntime', 'numba', 'scipy', 'matplotlib', 'hypothesis',\n"
        "             'array_api_strict'): sys.modules[name] = None\n"
        "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-q', 'tests']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for test in ("test_gpu.py::test_a_foreign_stream", "test_recurrent.py", "[cupy"):
        assert test in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]


# --------------------------------------------------------------------------------------- being right


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_rounded_to_what_the_dtype_holds(rng, dtype):
    values = np.concatenate([rng.standard_normal(1000), [1.0 + 2**-9, 1.0 + 3 * 2**-9, 0.0, -0.0]])
    values = values.astype(np.float32)
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        wanted = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    else:
        wanted = values.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(sides.rounded(values, dtype), wanted)


@pytest.mark.parametrize(("ragged", "layers", "directions"), [(False, 1, 1), (True, 1, 1), (True, 2, 2)])
@pytest.mark.parametrize("operation", plan.OPERATIONS)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_every_side_is_right(host, cell, operation, ragged, layers, directions):
    case = CASE._replace(cell=cell, operation=operation, T=6)
    one = plan.Cell(case, False, ragged, layers, directions)
    problem = sides.problem_of(one)
    assert (problem.lengths is not None) == ragged
    checked = measure.check(one, problem, host)
    assert not checked.faults
    assert set(checked.right) == {"rnnkit numpy", "rnnkit reference", *sides.peers_of(one, host)}


def test_half_precision_is_right_within_its_own_tolerance(host):
    pytest.importorskip("torch")
    found = measure.measure("q", plan.Cell(CASE._replace(operation="train", dtype="float16")), host, QUICK)
    by_kernel = {record["kernel"]: record for record in found}
    assert by_kernel["numpy"]["status"] == "unsupported"
    assert by_kernel["numpy"]["seconds"] is None
    assert by_kernel["numpy"]["peer_seconds"] > 0.0  # the peer's time is worth having all the same
    own = by_kernel["reference"]
    assert own["status"] == "ok"
    assert correct.TOLERANCE < own["max_error"] <= sides.TOLERANCE["float16"]
    assert correct.TOLERANCE < own["peer_error"] <= sides.TOLERANCE["float16"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_tolerances_of_half_precision_fit(monkeypatch, torch, cell, dtype):
    """Wide enough for what sums in half precision make of long sequences, and no wider than that by much."""
    monkeypatch.setattr(ours, "kernel_modules", lambda backend: ("reference",))
    host = rig.Host()
    host.backend = "torch"  # NumPy has no bfloat16
    one = plan.Cell(cases.Case("train", cell, 1024, 4, 64, 64, dtype))
    checked = measure.check(one, sides.problem_of(one), host)
    assert not checked.faults
    assert sides.TOLERANCE[dtype] / 10 < checked.errors["torch"] < sides.TOLERANCE[dtype]
    assert sides.HALF[dtype] / 10 < checked.errors["rnnkit reference"] < sides.HALF[dtype]


def test_a_dtype_that_the_backend_lacks_is_unsupported(host):
    found = measure.measure("q", plan.Cell(CASE._replace(dtype="bfloat16")), host, QUICK)
    assert {record["status"] for record in found} == {"unsupported"}
    assert any("'bfloat16' does not exist" in record["reason"] for record in found)


@pytest.fixture
def wrong_kernel(monkeypatch):
    """Make the numpy module's LSTM wrong in the third digit."""
    from rnnkit import kernels

    module = kernels._load("numpy")
    right = module.lstm_forward

    def wrong(*args, **kwargs):
        output, *rest = right(*args, **kwargs)
        return (output * 1.001, *rest)

    monkeypatch.setattr(module, "lstm_forward", wrong)
    kernels._choose.cache_clear()
    yield
    kernels._choose.cache_clear()


def test_a_wrong_kernel_is_not_timed(host, wrong_kernel):
    found = measure.measure("q", plan.Cell(CASE), host, QUICK)
    for record in found:
        if record["kernel"] == "numpy":
            assert record["status"] == "wrong"
            assert record["seconds"] is None
            assert record["ratio"] is None
            assert record["max_error"] > sides.TOLERANCE["float32"]
        else:
            assert record["status"] == "ok"
            assert record["seconds"] > 0.0


def test_nothing_is_timed_where_small_problems_come_out_wrong(host, wrong_kernel, tmp_path, capsys):
    assert program.run(session_in(tmp_path, host), tiny(1), 60.0) == 1
    told = capsys.readouterr().out
    assert told.startswith("Wrong on small problems:")
    assert "\nforward lstm (9, 5, 17, 24), numpy, float64: error" in told
    assert "reference" not in told
    assert not list(tmp_path.iterdir())


def test_what_is_right_is_verified(host, monkeypatch, capsys):
    monkeypatch.setattr(program, "Gpu", lambda: host)
    assert program.main(["--verify"]) == 0
    assert capsys.readouterr().out == "All kernels are right.\n"


def test_one_fault_that_shows_everywhere_does_not_fill_the_screen(host, monkeypatch, capsys):
    monkeypatch.setattr(program, "Gpu", lambda: host)
    monkeypatch.setattr(measure, "verify", lambda where: [f"line {k}" for k in range(288)])
    assert program.main(["--verify"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[2] == "line 0"
    assert told[-1] == "- and 268 more"


def test_verifying_reaches_every_dtype_that_a_kernel_serves(host, monkeypatch):
    tried = set()

    def fault(problem, kernel, where, dtype, right):
        tried.add((problem.case.operation, problem.case.cell, kernel, dtype))

    monkeypatch.setattr(measure, "_fault", fault)
    assert measure.verify(host) == []
    assert len(tried) == 2 * 3 * 2 * 4


# ------------------------------------------------------------------------- whole sequences in one launch


@pytest.fixture
def with_cuda(host, monkeypatch):
    """Return the stand-in with kernel modules named as on a GPU: NumPy's takes the place of `cuda`."""
    from rnnkit import kernels

    monkeypatch.setattr(ours, "kernel_modules", lambda backend: ("cuda", "reference"))
    monkeypatch.setitem(kernels._MODULES, "numpy", ("cuda", "reference"))
    load = kernels._load
    monkeypatch.setattr(kernels, "_load", lambda name: load("numpy" if name == "cuda" else name))
    kernels._choose.cache_clear()
    layouts = {"lstm_forward": {"exchange": 2e-6, "memory": 0.0}, "lstm_backward": "no room"}
    asked = SimpleNamespace(
        whole_sequence=lambda name, case, B, directions: layouts.get(name, "no such kernel"),
        step_times=lambda name, case, B, directions: layouts[name] if name == "lstm_forward" else {},
    )
    monkeypatch.setattr(sides, "importlib", SimpleNamespace(import_module=lambda name: asked))
    yield host
    kernels._choose.cache_clear()


def test_whole_sequences_are_a_contestant_of_their_own(with_cuda, monkeypatch):
    """Each level runs with its own setting, whatever the environment says."""
    monkeypatch.setenv("RNNKIT_PERSISTENT", "1")
    assert sides.kernels_of(with_cuda) == (sides.WHOLE, "cuda", "reference")
    problem = sides.problem_of(plan.Cell(CASE))
    settings = {}
    for kernel in sides.kernels_of(with_cuda):
        side = sides.side_of(problem, kernel, with_cuda)
        assert side.name == f"rnnkit {kernel}"
        with side.scope():
            settings[kernel] = os.environ["RNNKIT_PERSISTENT"], os.environ["RNNKIT_KERNELS"]
    assert settings == {
        sides.WHOLE: ("1", "cuda,reference"),
        "cuda": ("0", "cuda,reference"),
        "reference": ("0", "reference"),
    }


def test_a_record_of_whole_sequences_has_its_model(with_cuda):
    found = measure.measure("q", plan.Cell(CASE._replace(operation="train")), with_cuda, QUICK)
    records.check({"schema": records.SCHEMA, "kind": "gpu", "records": found})
    by_kernel = {record["kernel"]: record for record in found}
    assert [by_kernel[name]["level"] for name in (sides.WHOLE, "cuda", "reference")] == [2, 1, 0]
    assert [by_kernel[name]["default"] for name in (sides.WHOLE, "cuda", "reference")] == [False, True, False]
    whole = by_kernel[sides.WHOLE]
    assert whole["status"] == "ok"
    assert whole["model"] == {"lstm_forward": {"exchange": 2e-6, "memory": 0.0}, "lstm_backward": {}}
    assert by_kernel["cuda"]["model"] == {}
    shown = gpu_tables.models(found)
    assert len(shown.splitlines()) == 3
    assert "| 2.00 | lstm_forward: exchange 2.00; lstm_backward: step by step |" in shown
    assert shown in gpu_tables.report(found)
    assert gpu_tables.models([by_kernel["cuda"]]) == ""


def test_whole_sequences_that_do_not_fit_are_unsupported(with_cuda):
    found = measure.measure("q", plan.Cell(CASE._replace(cell="gru")), with_cuda, QUICK)
    assert found[0]["kernel"] == sides.WHOLE
    assert (found[0]["status"], found[0]["reason"]) == ("unsupported", "gru_forward: no such kernel")
    assert {record["status"] for record in found if record["kernel"] != sides.WHOLE} == {"ok"}


@pytest.fixture
def small_draws(monkeypatch):
    draw = soak.draw
    monkeypatch.setattr(
        soak, "draw", lambda random: draw(random)._replace(precision="float32", T=3, B=2, H=4)
    )


def test_soaking(host, small_draws):
    assert soak.soak(host, 25, 7, "numpy", "reference") == []


def test_draws_reach_every_kind_and_repeat_themselves():
    draws = [soak.draw(np.random.default_rng(seed)) for seed in range(300)]
    assert draws == [soak.draw(np.random.default_rng(seed)) for seed in range(300)]
    for name, wanted in {
        "cell": set(cases.CELLS), "precision": set(plan.PRECISIONS), "ragged": {False, True},
        "bidirectional": {False, True},
    }.items():  # fmt: skip
        assert {getattr(one, name) for one in draws} == wanted
    for name, most in {"T": soak.MOST_T + 1, "B": soak.MOST_B, "H": soak.MOST_H}.items():
        sizes = [getattr(one, name) for one in draws]
        assert 1 <= min(sizes) <= 3
        assert 0.8 * most < max(sizes) <= most


def test_soaking_finds_what_is_wrong(host, small_draws, wrong_kernel):
    found = soak.soak(host, 40 * soak.REPEATS, 7, "numpy", "reference")
    assert 0 < len(found) < 40  # of an LSTM alone
    assert all("cell='lstm'" in line and "against reference" in line for line in found)


def test_soaking_finds_what_differs(host, small_draws, monkeypatch):
    """A difference far below any tolerance."""
    from rnnkit import kernels

    module, calls = kernels._load("numpy"), []
    right = module.gru_forward

    def unsteady(*args, **kwargs):
        output, *rest = right(*args, **kwargs)
        calls.append(None)
        return (np.nextafter(output, np.float32(2)) if len(calls) % 7 == 0 else output, *rest)

    monkeypatch.setattr(module, "gru_forward", unsteady)
    kernels._choose.cache_clear()
    found = soak.soak(host, 20 * soak.REPEATS, 7, "numpy", "reference")
    kernels._choose.cache_clear()
    assert found
    assert all("cell='gru'" in line and "differ in repetition" in line for line in found)


def test_soaking_by_command(host, monkeypatch, capsys):
    monkeypatch.setattr(program, "Gpu", lambda: host)
    monkeypatch.setenv("RNNKIT_TEST_SEED", "5")
    monkeypatch.setattr(soak, "soak", lambda where, count, seed: [f"- {count} {seed}"])
    assert program.main(["--soak", "30"]) == 1
    assert "RNNKIT_TEST_SEED=5 repeats this" in (told := capsys.readouterr().out)
    assert "- 30 5" in told
    monkeypatch.setattr(soak, "soak", lambda where, count, seed: [])
    assert program.main(["--soak", "30"]) == 0
    assert "30 times right" in capsys.readouterr().out
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            program.main(["--soak", wrong])


# --------------------------------------------------------------------------------- records and timing


def test_a_record_has_both_sides(host):
    torch = pytest.importorskip("torch")
    found = measure.measure("q", plan.Cell(CASE._replace(operation="train"), ragged=True), host, QUICK)
    records.check({"schema": records.SCHEMA, "kind": "gpu", "records": found})
    assert [(record["kernel"], record["level"]) for record in found] == [("numpy", 1), ("reference", 0)]
    for record in found:
        assert record["status"] == "ok"
        assert 0.0 < record["least"] <= record["seconds"]
        assert 0.0 < record["peer_least"] <= record["peer_seconds"]
        assert record["ratio"] == pytest.approx(record["peer_seconds"] / record["seconds"])
        assert record["max_error"] <= sides.TOLERANCE["float32"]
        assert record["density"] < 1.0
        assert record["ragged"]
        assert torch.__version__.startswith(record["versions"]["torch"].partition("+")[0])


class WithGraphs(rig.Host):
    """A processor that claims to have graphs."""

    graphs = True

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails

    def graphed(self, make):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return make()._replace(name=sides.GRAPHED)


def test_the_graph_is_a_peer_of_its_own(host):
    pytest.importorskip("torch")
    found = measure.measure("q", plan.Cell(CASE), WithGraphs(), QUICK)
    assert [(r["kernel"], r["graphed"]) for r in found] == [
        ("numpy", False), ("numpy", True), ("reference", False), ("reference", True),
    ]  # fmt: skip
    assert found[0]["peer_seconds"] != found[1]["peer_seconds"]
    ragged = measure.measure("q", plan.Cell(CASE, ragged=True), WithGraphs(), QUICK)
    assert {record["graphed"] for record in ragged} == {False}


def test_a_capture_that_fails_costs_only_itself(host):
    pytest.importorskip("torch")
    eager, graphed, *_ = measure.measure("q", plan.Cell(CASE), WithGraphs(fails=True), QUICK)
    assert eager["status"] == "ok"
    assert graphed["status"] == "peer wrong"
    assert "not permitted when stream is capturing" in graphed["reason"]
    assert graphed["seconds"] > 0.0
    assert graphed["peer_seconds"] is None


class FakeCuda:
    """torch.cuda as far as a capture needs it; writes down in which stream what happens."""

    def __init__(self, fails=False):
        self.fails, self.current, self.log, self.capturing = fails, "default", [], False

    def Stream(self):  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: self.log.append(f"side waits for {other}"))

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.log.append(f"replay in {self.current}"))

    def current_stream(self):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, "side"
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, stream):
        self.capturing = True
        yield
        self.capturing = False
        if self.fails:
            raise RuntimeError("capture failed")


def gpu_with(cuda):
    """Return a `Gpu` without a GPU, whose torch has this cuda."""
    gpu = rig.Gpu.__new__(rig.Gpu)
    gpu._torch = SimpleNamespace(cuda=cuda)
    return gpu


def test_a_graph_is_warmed_up_captured_and_replayed():
    cuda = FakeCuda()

    def make():
        cuda.log.append(f"made in {cuda.current}")
        return timing.Side("torch", call, lambda result: {"result": result})

    def call():
        cuda.log.append(f"{'captured' if cuda.capturing else 'called'} in {cuda.current}")
        return "the tensors of the capture"

    side = gpu_with(cuda).graphed(make)
    assert cuda.log == [
        "side waits for default", "made in side", *["called in side"] * rig.WARM_UPS, "captured in side",
    ]  # fmt: skip
    assert side.name == sides.GRAPHED
    del cuda.log[:]
    assert side.compute() == {"result": "the tensors of the capture"}
    assert cuda.log == ["replay in default"]


def test_a_capture_that_fails_leaves_the_current_stream_as_it_was():
    cuda = FakeCuda(fails=True)
    with pytest.raises(RuntimeError, match="capture failed"):
        gpu_with(cuda).graphed(lambda: timing.Side("torch", lambda: None, dict))
    assert cuda.current == "default"


class FakeModule:
    """cupy.RawModule: kernels that do on the host what they are for, and check how they are launched."""

    def __init__(self, *, code):
        self.code = code

    def get_function(self, name):
        assert f"{name}(" in self.code

        def kernel(grid, block, arguments, enable_cooperative_groups=False):
            assert len(grid) in (1, 2)
            assert block == (32,)
            if enable_cooperative_groups:
                assert grid[0] == 1, "CuPy shrinks a cooperative grid (n, 1) silently"
            if name == "grid_barriers":
                assert enable_cooperative_groups
                arrived, failed, count = arguments
                arrived += np.uint32(grid[1] * count)
                assert not failed
            if name == "cluster_barriers":
                assert not enable_cooperative_groups
                assert grid[0] % limits.CLUSTER == 0
            assert all(isinstance(value, (np.ndarray, np.int32)) for value in arguments)

        def launch(grid, block, arguments):
            kernel(grid, block, arguments)

        launch.kernel = kernel
        return launch


@pytest.fixture
def fake_cupy(monkeypatch):
    """Put a CuPy in place that is NumPy, with a device of four multiprocessors and TF32 switched off."""
    names = (
        "arange",
        "zeros",
        "ones",
        "zeros_like",
        "copyto",
        "tanh",
        "matmul",
        "float32",
        "uint32",
        "int32",
    )
    cupy = ModuleType("cupy")
    cupy.__version__, cupy.__spec__ = "14.2.0", ModuleSpec("cupy", None)
    for name in names:
        setattr(cupy, name, getattr(np, name))
    properties = {"name": b"A GPU", "multiProcessorCount": 4, "totalGlobalMem": 80 << 30}
    runtime = SimpleNamespace(
        getDeviceProperties=lambda number: properties,
        driverGetVersion=lambda: 13000,
        deviceSynchronize=lambda: None,
    )
    cupy.RawModule, cupy.cuda = FakeModule, SimpleNamespace(
        runtime=runtime,
        Device=lambda: SimpleNamespace(id=0),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
        get_local_runtime_version=lambda: 13010,
    )  # fmt: skip
    linalg = ModuleType("cupy._core._routines_linalg")
    linalg.COMPUTE_TYPE_DEFAULT, linalg.COMPUTE_TYPE_TF32, linalg.now = 1, 7, 1
    linalg.get_compute_type = lambda dtype: linalg.now
    linalg.set_compute_type = lambda dtype, value: setattr(linalg, "now", value)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, linalg.__name__, linalg)
    monkeypatch.setattr(rig, "resolve_backend", lambda name: None)
    monkeypatch.setattr(rig, "driver_version", lambda: "580.0")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    return cupy


def test_what_a_gpu_says_of_itself(fake_cupy):
    facts = rig.Gpu().facts
    assert facts["device"] == "A GPU, 4 SMs, 80 GiB"
    assert (facts["driver"], facts["cuda"]) == ("580.0", "13.1")
    assert facts["versions"]["cupy"] == "14.2.0"


def test_the_limits_of_a_gpu(fake_cupy, monkeypatch):
    monkeypatch.setattr(limits, "COPIED", 1 << 12)
    kernels = on_host()
    monkeypatch.setitem(sys.modules, "rnnkit.kernels.cuda", kernels)
    monkeypatch.setitem(sys.modules, "rnnkit.kernels.cuda._step", kernels.parts[f"{kernels.__name__}._step"])
    found = limits.of_gpu(fake_cupy, None)
    assert len({(limit.measure, limit.detail) for limit in found}) == len(found)
    for limit in found:
        record = limits.measure(limit, QUICK, clock.HostClock(), rig.Gpu().facts)
        assert (record["status"], record["reason"]) == ("ok", "")
    assert {limit.measure for limit in found} == {"copy", "launch", "barrier"}
    products = [limit for limit in limits.of_gpu(fake_cupy, SimpleNamespace()) if limit.unit == "FLOP/s"]
    assert [limit.tf32 for limit in products] == [name == "tf32" for name in plan.PRECISIONS]


def test_tf32_is_pinned_on_both_sides_and_restored(fake_cupy, torch):
    linalg = sys.modules["cupy._core._routines_linalg"]
    gpu = rig.Gpu()
    gpu._torch = torch  # without CUDA it has the settings all the same

    def settings():
        return linalg.now, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def fail(tf32):
        with gpu.precision(tf32):
            assert settings() == (7 if tf32 else 1, tf32, tf32)
            raise ZeroDivisionError

    before = settings()
    for tf32 in (True, False):
        with pytest.raises(ZeroDivisionError):
            fail(tf32)
        assert settings() == before


def test_a_setting_from_outside_is_refused(fake_cupy, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(BackendUnavailableError, match="NVIDIA_TF32_OVERRIDE is set"):
        rig.Gpu()


def test_two_streams_are_refused(fake_cupy):
    gpu = rig.Gpu()
    gpu._torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda: SimpleNamespace(cuda_stream=0)))
    gpu._check_streams()
    fake_cupy.cuda.get_current_stream = lambda: SimpleNamespace(ptr=2)
    with pytest.raises(BackendUnavailableError, match="CuPy's current stream is 2 and torch's is 0"):
        gpu._check_streams()


def test_without_torch_rnnkit_is_measured_alone(host, monkeypatch):
    host.torch_device = None
    found = measure.measure("q", plan.Cell(CASE), host, QUICK)
    assert [(record["kernel"], record["peer"]) for record in found] == [("numpy", None), ("reference", None)]
    assert all(record["seconds"] > 0.0 and record["ratio"] is None for record in found)


class Ticks:
    """A device's clock: work is enqueued at once and done when somebody waits."""

    def __init__(self):
        self.queued, self.done, self.waits = 0, 0, 0

    def mark(self):
        return lambda at=self.queued: at

    def synchronize(self):
        self.done, self.waits = self.queued, self.waits + 1

    def seconds(self, start, stop):
        assert stop() <= self.done, "a mark was read before it was reached"
        return float(stop() - start())


def test_calls_are_timed_by_marks_and_nobody_waits_between_them():
    ticks = Ticks()

    def slow():
        ticks.queued += 3

    samples = clock.alternate([timing.Side("slow", slow, dict)], QUICK, ticks)
    assert samples == {"slow": [3.0]}

    quick = Ticks()

    def fast():
        quick.queued += 1e-4

    samples = clock.alternate([timing.Side("fast", fast, dict)], QUICK, quick)
    assert len(samples["fast"]) == clock.MOST_CALLS
    assert quick.waits == 4  # before and after the first call, before and after the block


def test_sides_take_turns():
    turns = []
    both = [timing.Side(name, lambda name=name: turns.append(name), dict) for name in "ab"]
    clock.alternate(both, timing.Effort(0.0, 2), clock.HostClock())
    assert [name for name, _ in itertools.groupby(turns)] == ["a", "b", "a", "b"]


# ------------------------------------------------------------------------------------------- limits


def test_limits_of_the_stand_in(host, tmp_path):
    one = session_in(tmp_path, host)
    one.measure_limits()
    document = records.load(tmp_path / session.LIMITS)
    assert document["kind"] == "gpu limits"
    for record in document["records"]:
        assert record["status"] == "ok"
        assert 0.0 < record["least"] <= record["seconds"]
        assert record["rate"] > 0.0


def test_a_limit_is_a_part_of_a_call():
    ticks = Ticks()

    def call():
        ticks.queued += 1

    limit = limits.Limit("barrier", "of ten", lambda: (call, lambda: True), parts=10, work=4.0, unit="B/s")
    record = limits.measure(limit, QUICK, ticks, rig.Host().facts)
    assert record["seconds"] == pytest.approx(0.1)
    assert record["rate"] == pytest.approx(4.0)


@pytest.mark.parametrize("good_checks", [0, 1])
def test_a_limit_that_does_not_what_it_should_is_not_timed(good_checks):
    calls, checks = [], []

    def holds():
        checks.append(len(calls))
        return len(checks) <= good_checks

    limit = limits.Limit("x", "y", lambda: (lambda: calls.append(None), holds))
    record = limits.measure(limit, QUICK, clock.HostClock(), rig.Host().facts)
    assert (record["status"], record["seconds"]) == ("wrong", None)
    assert "did not do what it should" in record["reason"]
    assert (len(calls) == 1) == (good_checks == 0)  # a barrier that fails takes long: no second try


def test_a_limit_that_fails_says_how():
    limit = limits.Limit("x", "y", lambda: 1 / 0)
    record = limits.measure(limit, QUICK, clock.HostClock(), rig.Host().facts)
    assert (record["status"], record["seconds"]) == ("failed", None)
    assert "ZeroDivisionError" in record["reason"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
def test_the_barriers_compile(tmp_path):
    command = ["nvcc", "-arch=sm_90", "-cubin", "-o", str(tmp_path / "barriers.cubin"), str(limits.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    code = (tmp_path / "barriers.cubin").read_bytes()
    assert all(name in code for name in (b"empty", b"grid_barriers", b"cluster_barriers"))


# --------------------------------------------------------------------------- being killed, and going on


def test_a_killed_run_goes_on_where_it_was(host, tmp_path, monkeypatch):
    cells = tiny(3)
    real, measured = measure.measure, []

    def killed(stage, cell, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell)
        return real(stage, cell, *rest)

    monkeypatch.setattr(measure, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        session_in(tmp_path, host).measure_cells(cells, FOREVER)
    before = records.load(tmp_path / session.CELLS)["records"]
    assert {record["T"] for record in before} == {2, 3}
    monkeypatch.setattr(measure, "measure", real)
    again = session_in(tmp_path, host)
    assert again.measure_cells(cells, FOREVER) == 0
    after = records.load(tmp_path / session.CELLS)["records"]
    assert after[: len(before)] == before
    assert [record["T"] for record in after[len(before) :]] == [4] * (len(before) // 2)


def test_time_that_is_over_leaves_the_rest(host, tmp_path):
    cells = tiny(3)
    one = session_in(tmp_path, host)
    assert one.measure_cells(cells, 0.0) == 3
    assert one.measure_cells(cells[:1], FOREVER) == 0
    assert session_in(tmp_path, host).measure_cells(cells, 0.0) == 2


def test_a_cell_for_which_there_is_no_memory_stops_nobody(host, tmp_path, monkeypatch):
    real = measure.expected

    def expected(problem, where):
        if problem.case.T == 2:
            raise MemoryError("out of memory allocating 80 GB")
        return real(problem, where)

    monkeypatch.setattr(measure, "expected", expected)
    one = session_in(tmp_path, host)
    assert one.measure_cells(tiny(2), FOREVER) == 0
    by_steps = tables.grouped(records.load(tmp_path / session.CELLS)["records"], lambda record: record["T"])
    for record in by_steps[2]:
        assert record["status"] == "failed"
        assert "out of memory" in record["reason"]
        assert record["seconds"] is None
    assert all(record["status"] == "ok" for record in by_steps[3])


def test_a_device_that_is_lost_ends_the_run_with_everything_written(host, tmp_path, monkeypatch):
    one = session_in(tmp_path, host)

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(host.clock, "synchronize", lost, raising=False)
    with pytest.raises(RuntimeError, match=r"after forward lstm \(2, .*does not answer any more"):
        one.measure_cells(tiny(2), FOREVER)
    written = records.load(tmp_path / session.CELLS)["records"]
    assert {(record["T"], record["status"]) for record in written} == {(2, "failed")}
    monkeypatch.undo()
    assert session_in(tmp_path, rig.Host()).measure_cells(tiny(2), 0.0) == 1  # the cell is not tried again


def test_results_of_another_machine_are_refused(host, tmp_path):
    session_in(tmp_path, host).measure_cells(tiny(1), FOREVER)
    other = rig.Host()
    other.facts = other.facts | {"device": "another GPU"}
    with pytest.raises(ValueError, match="now it is 'another GPU': give another --out"):
        session_in(tmp_path, other)


def test_a_file_that_is_being_written_is_never_half_there(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    records.save(path, "gpu", "python", "2025-01-31", QUICK, [])
    before = path.read_bytes()

    def killed(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        records.save(path, "gpu", "python", "2025-02-01", QUICK, [])
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------- reports


def test_a_whole_run_and_its_report(host, tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "out"
    assert program.run(session_in(out, host), tiny(1), 60.0) == 0
    printed = capsys.readouterr().out
    assert "| a question | numpy | forward | 1 |" in printed
    assert "0 cells of the plan are left" in printed
    assert "| copy | 1 MiB |" in printed
    files = [str(out / name) for name in (session.LIMITS, session.CELLS)]
    assert report.main(files) == 0
    shown = capsys.readouterr().out
    assert "| forward | lstm | (2, 2, 4, 5) | float32 |" in shown
    assert "| matrix product | 256, float32 |" in shown
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    assert report.main([*files, "--write", str(readme)]) == 0
    section = readme.read_text().split("<!-- performance:begin -->")[1].split("<!-- performance:end -->")[0]
    assert "| a question | numpy | forward | 1 |" in section
    assert "no GPU, driver" in section


def test_without_gpu_records_the_report_has_no_trace_of_them(tmp_path, capsys):
    empty = tmp_path / "gpu.json"
    records.save(empty, "gpu", "python -m bench.gpu", "2025-01-31", QUICK, [])
    assert report.performance([records.load(empty)]) == report.NOTHING
    assert report.main([str(empty)]) == 0
    assert report.NOTHING in capsys.readouterr().out


def test_what_went_wrong_is_told(host):
    pytest.importorskip("torch")
    found = measure.measure("q", plan.Cell(CASE), WithGraphs(fails=True), QUICK)
    found += measure.failure("q", plan.Cell(CASE._replace(T=9)), host, MemoryError("too large"))
    told = gpu_tables.problems(found)
    assert "- peer wrong, graphed: forward lstm (3, 2, 4, 5) float32, numpy: failed: RuntimeError" in told
    assert "- failed: forward lstm (9, 2, 4, 5) float32, reference: MemoryError: too large" in told
    assert "| failed |" in gpu_tables.details(found)


# ----------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--minutes and --out are needed"),
        (["--minutes", "8"], "--minutes and --out are needed"),
        (["--minutes", "0", "--out", "x"], "must be a number above 0, got '0'"),
        (["--minutes", "nan", "--out", "x"], "must be a number above 0"),
        (["--minutes", "inf", "--out", "x"], "must be a number above 0"),
        (["--minutes", "8", "--out", "{file}"], "is no directory"),
        (["--dry"], "unrecognized"),
    ],
)
def test_arguments_that_are_refused(argv, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        program.main([word.format(file=tmp_path / "file") for word in argv])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert program.main(["--minutes", "1", "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith('bench.gpu: error: backend "cupy" needs CuPy')
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_in_a_file_names_no_directory_of_this_machine(host, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "Gpu", lambda: host)
    monkeypatch.setattr(program, "plan", lambda: iter(tiny(1)))
    assert program.main(["--minutes", "1", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / session.CELLS).read_text())["command"] == "python -m bench.gpu --minutes 1"
