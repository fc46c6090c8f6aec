"""The benchmarks' machinery: records, verdicts, reports. No test here looks at how long anything took."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("threadpoolctl", reason="the benchmarks need threadpoolctl")

from bench import (
    arguments,
    cases,
    correct,
    goals,
    grid,
    growth,
    measure,
    ours,
    peers,
    records,
    report,
    startup,
    tables,
    timing,
)
from rnnkit import kernels

ROOT = Path(__file__).parents[1]
TINY = cases.Case("forward", "lstm", 3, 2, 4, 5)
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("speed.md")),
    *sorted((ROOT / "docs").glob("growth.md")),
]
PRESENT = [peer for peer in peers.PEERS if not peers.missing(peer)]


def needs(peer):
    """Return the mark of what a peer is needed for."""
    lacking = " and ".join(peers.missing(peer))
    return pytest.mark.skipif(bool(lacking), reason=f"{lacking} not installed")


@pytest.fixture
def tiny(monkeypatch):
    """Make every run one tiny shape and hardly any time."""
    monkeypatch.setattr(cases, "QUICK_SHAPES", ((3, 2, 4, 5),))
    monkeypatch.setattr(arguments, "QUICK", timing.Effort(0.0, 1))


def run(*command):
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


# ------------------------------------------------------------------------------------------- the grid


def test_grid_from_the_command_line(tmp_path):
    path = tmp_path / "grid.json"
    argv = ["--quick", "--threads", "1", "--cells", "lstm", "--operations", "step", "--kernels", "reference"]
    done = run("bench.grid", *argv, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "### step, 1 thread" in done.stdout
    assert "| verdict |" in done.stdout
    document = records.load(path)
    assert document["command"] == f"python -m bench.grid {' '.join(argv)}"  # and no path of this machine
    assert {record["kernel"] for record in document["records"]} == {"reference"}
    assert [record["peer"] for record in document["records"]] == (PRESENT or [None])
    for record in document["records"]:
        assert record["status"] == "ok"
        assert record["seconds"] > 0.0
        assert record["max_error"] <= correct.TOLERANCE
        assert (record["operation"], record["T"], record["H"], record["threads"]) == ("step", 1, 64, 1)
        if record["peer"]:
            assert record["ratio"] == pytest.approx(record["peer_seconds"] / record["seconds"])


def test_every_operation_of_the_quick_grid_has_cases():
    chosen = cases.grid(cases.OPERATIONS, cases.CELLS, quick=True)
    assert {case.operation for case in chosen} == set(cases.OPERATIONS)
    assert all(case.B >= 8 for case in cases.grid(["ragged"], cases.CELLS))
    assert len(set(chosen)) == len(chosen)


def test_growth_follows_one_axis_at_a_time():
    along = growth.cases_of(["T"], ["forward"], ["gru"])
    assert [case.T for case in along] == [10, 30, 100, 300, 1000, 3000, 10_000]
    assert len({(case.B, case.I, case.H) for case in along}) == 1


def test_the_file_is_written_after_every_record(tiny, tmp_path, monkeypatch):
    path = tmp_path / "grid.json"

    def interrupted(chosen, setting):
        yield from measure.measure(chosen[:1], setting)
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "measure", interrupted)
    argv = ["--quick", "--threads", "1", "--kernels", "reference", "--json", str(path)]
    with pytest.raises(KeyboardInterrupt):
        grid.main(argv)
    assert records.load(path)["records"]


# --------------------------------------------------------------------------------------- being right


@pytest.fixture
def wrong_kernel(monkeypatch):
    """Put an LSTM that is wrong in the third digit in place of the `numpy` module's; return its calls."""
    calls = []

    def wrong(*args, **kwargs):
        calls.append(args)
        output, *rest = kernels.reference.lstm_forward(*args, **kwargs)
        return (output * 1.001, *rest)

    module = kernels._load("numpy")
    kernels._load("reference")
    monkeypatch.setattr(module, "lstm_forward", wrong, raising=False)
    monkeypatch.setattr(module, "lstm_backward", kernels.reference.lstm_backward, raising=False)
    monkeypatch.setattr(module, "why_not", lambda name, case: None)
    kernels._choose.cache_clear()
    yield calls
    kernels._choose.cache_clear()


def test_a_wrong_kernel_is_reported_and_not_timed(tiny, wrong_kernel, tmp_path, capsys):
    path = tmp_path / "grid.json"
    argv = ["--quick", "--threads", "1", "--cells", "lstm", "--operations", "forward"]
    assert grid.main([*argv, "--kernels", "numpy,reference", "--json", str(path)]) == 1
    assert len(wrong_kernel) == 1  # the check alone
    found = tables.grouped(records.load(path)["records"], lambda record: record["kernel"])
    for record in found["numpy"]:
        assert record["status"] == "wrong"
        assert record["seconds"] is None
        assert record["ratio"] is None
        assert record["max_error"] > correct.TOLERANCE
        assert "allowed 1e-05" in record["reason"]
    assert all(record["status"] == "ok" for record in found["reference"])
    assert "- wrong: forward lstm (3, 2, 4, 5), numpy" in capsys.readouterr().out


def test_a_kernel_that_raises_is_wrong():
    def broken():
        raise ZeroDivisionError("no")

    side = timing.Side("broken", broken, dict)
    errors, failed = measure.check([side], {})
    assert errors == {"broken": float("inf")}
    assert failed == {"broken": "ZeroDivisionError: no"}


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"output": [1.0, 2.0], "more": [0.0]},
        {"output": [1.0]},
        {"output": [1.0, np.nan]},
        {"output": [1.0, np.inf]},
    ],
)
def test_results_that_are_not_comparable_are_infinitely_wrong(results):
    assert correct.max_error(results, {"output": [1.0, 2.0]}) == float("inf")


def test_the_error_is_absolute_for_outputs_and_relative_for_gradients():
    wanted = {"output": np.array([100.0, 1.0]), "d_x": np.array([300.0, 400.0])}
    assert correct.max_error({**wanted, "output": np.array([100.0, 1.5])}, wanted) == 0.5
    assert correct.max_error({**wanted, "d_x": np.array([300.0, 405.0])}, wanted) == pytest.approx(0.01)


@pytest.mark.parametrize("operation", cases.OPERATIONS)
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("peer", [pytest.param(peer, marks=needs(peer)) for peer in peers.PEERS])
def test_peers_compute_the_same(peer, cell, operation):
    case = TINY._replace(operation=operation, cell=cell, T=1 if operation == "step" else TINY.T)
    if not peers.takes_part(peer, case):
        pytest.skip(f"{peer} does no {operation}")
    problem = cases.problem_of(case)
    error = correct.max_error(peers.side_of(peer, problem, 1).compute(), ours.expected(problem))
    assert correct.is_right(error)


@pytest.mark.parametrize("operation", cases.OPERATIONS)
@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=needs("torch"))])
def test_own_sides_compute_the_same(backend, operation):
    problem = cases.problem_of(TINY._replace(operation=operation, T=1 if operation == "step" else TINY.T))
    side = ours.side_of(problem, "reference", backend)
    assert correct.is_right(correct.max_error(side.compute(), ours.expected(problem)))


def test_a_language_model_that_does_not_learn_is_wrong(monkeypatch):
    problem = cases.problem_of(TINY._replace(operation="lm"))
    expected = ours.expected(problem)
    monkeypatch.setattr(ours, "LM_LEARNING_RATE", 0.0)
    assert not correct.is_right(correct.max_error(ours.side_of(problem, "reference").compute(), expected))


# -------------------------------------------------------------------------------------------- timing


def test_sides_take_turns():
    turns = []
    sides = [timing.Side(name, lambda name=name: turns.append(name), dict) for name in "ab"]
    times = timing.alternate(sides, timing.Effort(0.0, 2), settle=False)
    switches = [name for k, name in enumerate(turns) if k == 0 or turns[k - 1] != name]
    assert switches == ["a", "b", "a", "b"]
    # Each block begins with an untimed call.
    assert times["a"].calls == turns.count("a") - 2


def test_sides_of_the_same_name_are_refused():
    sides = [timing.Side("a", list, dict)] * 2
    with pytest.raises(ValueError, match="different names"):
        timing.alternate(sides, timing.Effort(0.0, 1), settle=False)


def test_a_kernel_and_a_peer_may_share_a_name(tiny, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "grid.json"
    argv = ["--quick", "--threads", "1", "--cells", "gru", "--operations", "forward", "--backend", "torch"]
    assert grid.main([*argv, "--peers", "torch", "--json", str(path)]) == 0
    for record in records.load(path)["records"]:
        if record["status"] == "unsupported":
            assert record["seconds"] is None
        else:
            assert record["seconds"] != record["peer_seconds"]


def test_summary_of_samples():
    times = timing.summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert times == timing.Times(3.0, pytest.approx(2.0 / 3.0), None, 5)
    assert timing.summarise([1.0] * 1000).p99 == 1.0


def test_threads_are_restored(monkeypatch):
    from threadpoolctl import threadpool_info

    def blas():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    monkeypatch.setenv("RNNKIT_NUM_THREADS", "7")
    with timing.threads(1):  # loads what it has to
        pass
    before = blas()
    torch = sys.modules.get("torch")
    torch_before = torch and torch.get_num_threads()
    with timing.threads(1):
        assert os.environ["RNNKIT_NUM_THREADS"] == "1"
        assert set(blas()) == {1}
        assert torch is None or torch.get_num_threads() == 1
    assert os.environ["RNNKIT_NUM_THREADS"] == "7"
    assert blas() == before
    assert torch is None or torch.get_num_threads() == torch_before


def test_kernels_slower_than_the_chosen_one_fill_its_gaps():
    modules = ours.kernel_modules("numpy")
    assert modules[-1] == "reference"
    assert ours.allowed(modules[0], "numpy") == ",".join(modules)
    assert ours.allowed("reference", "numpy") == "reference"


# ------------------------------------------------------------------------------------ records, goals


def record_of(**changes):
    """Return a record of the tiny case, as if it had been measured."""
    record = {
        "backend": "numpy", "kernel": "reference", "default": True, **TINY._asdict(), "density": 1.0,
        "threads": 1, "status": "ok", "reason": "", "max_error": 1e-7, "seconds": 2.0, "spread": 0.1,
        "p99": None,
        "padded_seconds": None, "peer": "torch", "peer_seconds": 4.0, "peer_spread": 0.1, "ratio": 2.0,
        "ceiling": 1e9, "fraction_of_ceiling": 0.5, "busy_cores": 0.0, "versions": {"numpy": "1"},
        "processor": "a processor, 2 cores",
    }  # fmt: skip
    return record | changes


def document_of(path, *found, kind="grid"):
    records.save(path, kind, "python -m bench.grid", "2025-01-31", timing.Effort(), found)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "status"),
        ({"seconds": "2"}, "seconds"),
        ({"T": 1.5}, "T is"),
        ({"extra": 1}, "extra"),
    ],
)
def test_records_of_another_form_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        document_of(tmp_path / "x.json", record_of(**changes))


def test_files_of_another_form_are_refused(tmp_path):
    path = tmp_path / "x.json"
    for text in ("", "[]", '{"schema": 99}', '{"schema": 1, "kind": "grid"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json"):
            records.load(path)


def test_goals():
    (worst, mean) = (goal for goal in goals.GOALS if goal.text.startswith("training step"))
    numba = record_of(operation="train", kernel="numba")
    found = [numba | {"T": 3, "ratio": 1.0}, numba | {"T": 4, "ratio": 4.0}]
    assert goals.verdict(worst, found) == ("not met", "1.00", "1 of 2")
    assert goals.verdict(mean, found) == ("met", "2.00", "2")
    assert goals.verdict(mean, []) == ("not measured", "-", "-")
    found.append(numba | {"ratio": None, "seconds": None, "status": "wrong"})
    assert goals.verdict(mean, found)[:2] == ("not met", "wrong results")


def test_raggedness_is_judged_against_the_padded_time():
    (goal,) = (goal for goal in goals.GOALS if goal.text.startswith("ragged"))
    good = record_of(operation="ragged", density=0.5, seconds=0.6, padded_seconds=1.0)
    assert goals.verdict(goal, [good])[0] == "met"
    assert goals.verdict(goal, [good | {"seconds": 0.61}])[0] == "not met"


def test_cases_beside_their_goals():
    forward = record_of(kernel="numba", B=32, ratio=1.2, fraction_of_ceiling=0.7)
    found = [
        forward,
        forward | {"threads": 2, "ratio": 0.9, "fraction_of_ceiling": 0.96},
        forward | {"peer": "onnxruntime", "ratio": 0.5},
        record_of(kernel="numpy", B=4, ratio=0.1),  # has no goal
        record_of(operation="step", B=1, H=64, seconds=9e-6, p99=31e-6, ratio=11.0),
    ]
    printed = goals.cells_of(found)
    assert "| lstm | (3, 32, 4, 5) | numba | 1.20 | **0.90** | 0.50 |  | **0.70** | 0.96 |" in printed
    assert "| lstm | (3, 1, 4, 64) | reference | 9 µs | **31 µs** | 11.00 |" in printed
    assert "numpy" not in printed


def test_growth_is_an_exponent():
    sizes = [case._asdict() for case in growth.cases_of(["T"], ["forward"], ["lstm"])[:3]]
    found = [record_of(**case, seconds=case["T"] ** 2 * 1e-6, peer_seconds=1e-3) for case in sizes]
    printed = growth.table_of(found)
    assert "### forward, lstm, B=8, H=64" in printed
    assert "| T | reference, 1 thread | exponent | torch, 1 thread |" in printed
    assert "| 10 | 100 µs |  | 1 ms |" in printed
    assert "| 100 | 10 ms | 2.00 | 1 ms |" in printed


def test_estimates_for_many_cores():
    cases_ = {case.B: case._asdict() for case in growth.cases_of(["B"], ["train"], ["lstm"])}
    found = [
        record_of(**cases_[1024], seconds=1.0),
        record_of(**cases_[1024], seconds=0.6, threads=2),
        record_of(**cases_[16], seconds=0.02),
    ]
    # A fifth of the time is not shortened: 0.2 + 0.8 / 64.
    row = "| train | lstm | 1024 | 1 s | 600 ms | 20 ms | 50 | 20 % | 212 ms | 5 |"
    assert row in growth.many_cores(found)
    assert growth.many_cores([*found[:2], record_of(**cases_[1])]) == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_startup_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(startup, "TRAINING", cases.Case("train", "lstm", 64, 64, 64, 64))
    # One of each kind: torch alone takes as long to start as all other tests together.
    monkeypatch.setattr(ours, "kernel_modules", lambda backend: ("reference",))
    monkeypatch.setattr(peers, "PEERS", ("onnxruntime",))
    found = list(startup.measure(1))
    records.check({"schema": records.SCHEMA, "kind": "startup", "records": found})
    by_side = {(record["measure"], record["side"]): record for record in found}
    assert by_side["first prediction", "rnnkit, reference"]["max_error"] <= correct.TOLERANCE
    if "onnxruntime" in PRESENT:
        assert by_side["first prediction", "onnxruntime"]["status"] == "ok"
    memory = by_side["training memory", "rnnkit, reference"]
    assert memory["resident"] > 0.5 * memory["needed"]
    assert "| training memory, rnnkit, reference: peak over needed |" in startup.report(found)


def test_memory_that_training_needs():
    case = cases.Case("train", "lstm", 2, 3, 5, 7)
    numbers = (4 + 2) * 2 * 3 * 7 + 2 * (2 * 3 * 5) + 2 * (2 * 3 * 7) + 4 * 7 * (5 + 7 + 2)
    assert startup.needed(case) == 4 * numbers


# ------------------------------------------------------------------------------------------- reports


def test_pages_show_the_results():
    assert report.main(["--check", *map(str, PAGES)]) == 0


def test_report_round_trip(tmp_path, capsys):
    result = document_of(tmp_path / "x.json", record_of(), record_of(kernel="numpy", ratio=3.0))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert report.main([str(result), "--check", str(readme)]) == 1
    assert "differs" in capsys.readouterr().err
    assert report.main([str(result), "--write", str(readme)]) == 0
    assert report.main([str(result), "--check", str(readme)]) == 0
    written = readme.read_text()
    assert written.startswith(f"before\n{BEGIN}\n")
    assert written.endswith(f"{END}\nafter\n")
    assert "| forward | numpy | torch | 1 | 3.00 (3.00 to 3.00) |" in written
    readme.write_text(written.replace("3.00 to 3.00", "3.00 to 9.00"))
    assert report.main([str(result), "--check", str(readme)]) == 1


def test_without_results_the_readme_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    assert report.main(["--write", str(readme)]) == 0
    assert report.NOTHING in readme.read_text()
    assert report.main(["--check", str(readme)]) == 0


def test_a_busy_machine_is_mentioned():
    assert "cores busy" not in tables.conditions([record_of(busy_cores=None)])
    assert "up to 1.5 cores busy" in tables.conditions([record_of(), record_of(busy_cores=1.5)])


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    measured = [case._asdict() for case in growth.cases_of(["T"], ["forward"], ["lstm"])[:2]]
    curve = document_of(tmp_path / "g.json", *(record_of(**case) for case in measured), kind="growth")
    heat = document_of(tmp_path / "x.json", record_of())
    assert report.main([str(curve), str(heat), "--pictures", str(tmp_path / "pictures")]) == 0
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["grid_forward_torch.png", "growth_forward_lstm.png"]


# ----------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threads", "0"], "numbers from 1"),
        (["--threads", "two"], "numbers from 1"),
        (["--threads", "100000"], "numbers from 1"),
        (["--cells", "lstm,cell"], "a cell must be one of lstm, gru, rnn, got cell"),
        (["--operations", ""], "got nothing"),
        (["--kernels", "fastest"], "a kernel must be one of"),
        (["--peers", "keras"], "a peer must be one of"),
        (["--backend", "cupy"], "invalid choice"),
        (["--json", "no/such/directory/x.json"], "there is no directory"),
        (["--cells", "gru", "--operations", "lm"], "no case is left"),
        (["--qui"], "unrecognized"),
    ],
)
def test_arguments_that_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        grid.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_asked_for_must_be_installed(monkeypatch, capsys):
    monkeypatch.setattr(peers, "missing", lambda peer: [peer])
    with pytest.raises(SystemExit) as exit_:
        grid.main(["--peers", "torch"])
    assert exit_.value.code == 2
    assert "pip install 'rnnkit[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no markers", "must have pairs"),
        (f"{END}{BEGIN}", "must have pairs"),
        (f"{BEGIN}{END}{BEGIN}", "must have pairs"),
        (f"{BEGIN}<!-- goals:end -->", "must have pairs"),
        (
            "<!-- nothing:begin --><!-- nothing:end -->",
            "NAME one of performance, goals, cells, growth, cores",
        ),
    ],
)
def test_a_readme_without_its_markers_is_refused(tmp_path, capsys, content, message):
    readme = tmp_path / "README.md"
    readme.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        report.main(["--write", str(readme)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert readme.read_text() == content


def test_a_file_that_is_no_result_is_refused(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": 0}))
    for name in (path, tmp_path / "none.json"):
        with pytest.raises(SystemExit) as exit_:
            report.main([str(name)])
        assert exit_.value.code == 2
        assert name.name in capsys.readouterr().err
