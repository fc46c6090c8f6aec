"""From the start of a process to the first prediction, and the memory of a training step.

Run ``python -m bench.startup --help``. Everything happens in fresh processes, the sides alternately. Exit
status as of `bench.grid`.

Three measures:

"import"
    Time until NumPy, and rnnkit on top of it, are imported; resident memory then.
"first prediction"
    Time from the start of the process until an LSTM with loaded parameters has run one sequence;
    resident memory then. rnnkit with each of its kernel modules, torch, ONNX Runtime.
"training memory"
    The peak of a training step's resident memory, its inputs included, above what was resident before;
    and what is needed: (G + 2) * T * B * H numbers for the backward pass, with G gates, the inputs x and
    d_output, the outputs output and d_x, and one gradient of each parameter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import rnnkit

from . import arguments, ours, peers, tables
from .cases import GATES, Case, Problem, problem_of
from .correct import TOLERANCE, is_right, max_error
from .records import Record, finite, processor, save, versions
from .timing import Effort, summarise

PREDICTION = Case("forward", "lstm", 100, 1, 64, 64)
TRAINING = Case("train", "lstm", 100, 64, 256, 256)
REPEATS, QUICK_REPEATS = 9, 3
MEASURES = {"import": "import", "predict": "first prediction", "train": "training memory"}

# rnnkit's goals: import above NumPy's; against torch with NumPy alone; peak over what is needed.
IMPORT_SECONDS, SPEED_UP, MEMORY_SHARE, MEMORY_FACTOR = 0.060, 6.0, 0.25, 1.1


class Process(NamedTuple):
    """A side as a process: its name in the tables, the child's side, and RNNKIT_KERNELS for it."""

    name: str
    side: str
    kernels: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="bench.startup", description="Time and memory from a process's start.", allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=arguments.result_file, metavar="FILE", help="write the records there")
    given = parser.parse_args(argv)
    arguments.need_threadpoolctl(parser)
    repeats = QUICK_REPEATS if given.quick else REPEATS
    records = list(measure(repeats))
    if given.json is not None:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        command = arguments.command_of("startup", argv)
        save(given.json, "startup", command, date, Effort(0.0, repeats), records)
    print(report(records))
    return int(any(record["status"] == "wrong" for record in records))


def measure(repeats: int) -> Iterator[Record]:
    """Yield the records of all three measures."""
    machine = {"versions": versions(), "processor": processor()}
    present = [peer for peer in peers.PEERS if not peers.missing(peer)]
    kernels = [
        Process(f"rnnkit, {kernel}", "rnnkit", ours.allowed(kernel, "numpy"))
        for kernel in ours.kernel_modules("numpy")
        if ours.why_not(kernel, PREDICTION, "numpy") is None
    ]
    others = [Process(peer, peer) for peer in present]
    plan = {
        "import": [Process("numpy", "numpy"), Process("rnnkit", "rnnkit")],
        "predict": [*kernels, *others],
        "train": [*kernels, *(other for other in others if other.side == "torch")],
    }
    bar = arguments.progress([(task, turn) for task in plan for turn in range(repeats)])
    runs: dict[tuple[str, str], list[tuple[float, float | None, float | None]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {task: Path(name) / task for task in plan}
        wanted = {task: _write(folders[task], task, present) for task in plan}
        for task, _ in bar:
            bar.set_description(MEASURES[task])
            for process in plan[task]:
                outcome = _run(task, process, folders[task], wanted[task])
                runs.setdefault((task, process.name), []).append(outcome)
    for (task, side), values in runs.items():
        yield {**_record(task, side, values), **machine}


def _write(folder: Path, task: str, present: Sequence[str]) -> Any:
    """Write the case's files for the child; return the output that it must produce, or None."""
    folder.mkdir()
    if task == "import":
        return None
    problem = _without_state(problem_of(PREDICTION if task == "predict" else TRAINING))
    np.save(folder / "x.npy", problem.x)
    np.savez(folder / "params.npz", **problem.params)  # type: ignore[arg-type]
    (folder / "hidden_size").write_text(str(problem.case.H))
    if task == "train":
        return None
    if "onnxruntime" in present:
        (folder / "model.onnx").write_bytes(peers.onnx_model(problem))
    return ours.expected(problem)["output"]


def _without_state(problem: Problem) -> Problem:
    return problem._replace(state=tuple(np.zeros_like(part) for part in problem.state))


def _run(task: str, process: Process, folder: Path, wanted: Any) -> tuple[float, float | None, float | None]:
    """Return the seconds, the bytes, and the error of the output or None."""
    source = str(Path(rnnkit.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "RNNKIT_KERNELS": process.kernels}
    # -P: the child's folder, which is this package, is none of its business.
    script = Path(__file__).with_name("child.py")
    command = [sys.executable, "-P", str(script), task, process.side, str(folder)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
        rest = child.stdout.read()
    if child.returncode or line != "done\n":
        raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}")
    resident = json.loads(rest)["resident"]
    if wanted is None:
        return seconds, resident, None
    return seconds, resident, max_error({"output": np.load(folder / "output.npy")}, {"output": wanted})


def _record(task: str, side: str, runs: Sequence[tuple[float, float | None, float | None]]) -> Record:
    errors = [error for *_, error in runs if error is not None]
    worst = max(errors, default=0.0)
    right = is_right(worst)
    times = summarise([seconds for seconds, *_ in runs]) if right and task != "train" else None
    sizes = [size for _, size, _ in runs if size is not None]
    return {
        "measure": MEASURES[task], "side": side, "status": "ok" if right else "wrong",
        "reason": "" if right else f"error {worst:.1e}, allowed {TOLERANCE:.0e}",
        "seconds": times and times.median, "spread": times and times.spread,
        "resident": int(statistics.median(sizes)) if right and sizes else None,
        "needed": needed(TRAINING) if task == "train" else None,
        "max_error": finite(worst) if errors else None,
    }  # fmt: skip


def needed(case: Case) -> int:
    """Return the bytes of the arrays that a training step cannot do without."""
    T, B, I, H, G = case.T, case.B, case.I, case.H, GATES[case.cell]
    for_backward = (G + 2) * T * B * H
    inputs_and_outputs = 2 * T * B * I + 2 * T * B * H
    gradients = G * H * (I + H + 2)
    return (for_backward + inputs_and_outputs + gradients) * np.dtype(case.dtype).itemsize


def report(records: Sequence[Record]) -> str:
    """Return all that a run has to say, as Markdown."""
    return "\n\n".join([tables.conditions(records), table_of(records), "### Goals", goals_of(records)])


def table_of(records: Sequence[Record]) -> str:
    """Return the measurements as a Markdown table."""
    rows = [
        [
            record["measure"], record["side"],
            tables.duration(record["seconds"]) if record["status"] == "ok" else record["status"],
            "-" if record["spread"] is None else f"{100 * record['spread']:.0f} %",
            _megabytes(record["resident"]), _megabytes(record["needed"]),
        ]
        for record in records
    ]  # fmt: skip
    head = ["measure", "side", "time", "spread", "resident memory", "needed"]
    return tables.table(head, rows, left=2)


def goals_of(records: Sequence[Record]) -> str:
    """Return the goals and whether they were met, as a Markdown table."""
    by_name = {(record["measure"], record["side"]): record for record in records}

    def get(measure: str, side: str, field: str) -> float | None:
        value: float | None = by_name.get((measure, side), {}).get(field)
        return value

    plain, on_top = get("import", "numpy", "seconds"), get("import", "rnnkit", "seconds")
    ours_s, torch_s = (get("first prediction", side, "seconds") for side in ("rnnkit, numpy", "torch"))
    ours_m, torch_m = (get("first prediction", side, "resident") for side in ("rnnkit, numpy", "torch"))
    above = None if plain is None or on_top is None else on_top - plain
    speed_up, share = _over(torch_s, ours_s), _over(ours_m, torch_m)
    rows = [
        _row("import rnnkit above import numpy, seconds", above, IMPORT_SECONDS, True),
        _row("first prediction, NumPy alone: torch's time over rnnkit's", speed_up, SPEED_UP, False),
        _row("first prediction, NumPy alone: memory over torch's", share, MEMORY_SHARE, True),
    ]
    for record in records:
        if record["measure"] == "training memory" and record["side"] != "torch":
            reached = _over(record["resident"], record["needed"])
            text = f"training memory, {record['side']}: peak over needed"
            rows.append(_row(text, reached, MEMORY_FACTOR, True))
    return tables.table(["goal", "bound", "reached", "verdict"], rows)


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _row(text: str, reached: float | None, bound: float, at_most: bool) -> list[str]:
    if reached is None:
        outcome, shown = "not measured", "-"
    else:
        outcome = "met" if (reached <= bound if at_most else reached >= bound) else "not met"
        shown = f"{reached:.3g}"
    return [text, f"{'<=' if at_most else '>='} {bound:g}", shown, outcome]


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
