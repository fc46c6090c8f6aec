"""rnnkit's goals on the CPU, whether a run met them, and each case beside its goals.

Every goal is a bound on a number of each case, or on the geometric mean over the cases; a run that left
cases out is judged by those it has, and the table says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .cases import OPERATIONS
from .records import Record
from .tables import duration, geometric_mean, grouped, shape_of, table, threads_of


class Goal(NamedTuple):
    """A bound.

    Attributes
    ----------
    text : str
        What is bounded, in words.
    short : str
        The same in the table of an operation's cases, where goals of one kind share a column.
    applies : callable
        Says of a record whether it counts.
    value : callable
        Its number; None where that was not measured.
    bound : float
    at_most : bool
        Whether the bound is an upper one.
    mean : bool
        Whether the geometric mean is bounded rather than every case.
    show : callable
        Writes the number.
    """

    text: str
    short: str
    applies: Callable[[Record], bool]
    value: Callable[[Record], float | None]
    bound: float
    at_most: bool = False
    mean: bool = False
    show: Callable[[float], str] = "{:.2f}".format

    def reached(self, value: float) -> bool:
        """Whether a number is within the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


def _ratio(operation: str, peer: str, kernel: str | None = None) -> Callable[[Record], bool]:
    """Return the test for an operation against a peer; without a kernel, for rnnkit's own choice of it."""

    def applies(record: Record) -> bool:
        chosen = record["default"] if kernel is None else record["kernel"] == kernel
        return bool(chosen and record["operation"] == operation and record["peer"] == peer)

    return applies


def _where(applies: Callable[[Record], bool], more: Callable[[Record], bool]) -> Callable[[Record], bool]:
    return lambda record: applies(record) and more(record)


def _own(operation: str) -> Callable[[Record], bool]:
    return lambda record: bool(record["default"] and record["operation"] == operation)


def _small_step(record: Record) -> bool:
    return bool(record["B"] == 1 and record["H"] == 64)


def _raggedness(record: Record) -> float | None:
    padded, seconds = record["padded_seconds"], record["seconds"]
    return None if padded is None or seconds is None else seconds / (record["density"] * padded)


def _speed_up(record: Record) -> float | None:
    value: float | None = record["ratio"]
    return value


GOALS = (
    Goal("forward, without numba, B >= 8: ratio to torch", "torch",
         _where(_ratio("forward", "torch", "numpy"), lambda r: r["B"] >= 8), _speed_up, 0.8),
    Goal("forward, without numba, B = 1, H <= 64: ratio to torch", "torch",
         _where(_ratio("forward", "torch", "numpy"), lambda r: r["B"] == 1 and r["H"] <= 64), _speed_up, 1.0),
    Goal("forward, with numba: ratio to torch", "torch",
         _ratio("forward", "torch", "numba"), _speed_up, 1.0),
    Goal("forward, with numba: mean ratio to torch", "torch",
         _ratio("forward", "torch", "numba"), _speed_up, 1.3, mean=True),
    Goal("forward, with numba: mean ratio to ONNX Runtime", "ONNX Runtime",
         _ratio("forward", "onnxruntime", "numba"), _speed_up, 1.0, mean=True),
    Goal("forward, with numba, B >= 32: fraction of the ceiling", "of the ceiling",
         lambda r: r["operation"] == "forward" and r["kernel"] == "numba" and r["B"] >= 32,
         lambda r: r["fraction_of_ceiling"], 0.95),
    Goal("training step, with numba: ratio to torch", "torch",
         _ratio("train", "torch", "numba"), _speed_up, 1.1),
    Goal("training step, with numba: mean ratio to torch", "torch",
         _ratio("train", "torch", "numba"), _speed_up, 1.8, mean=True),
    # 1.15 times the share of real time steps times the padded time, plus 5 %.
    Goal("ragged batch: time over the real share of the padded time", "of the real share",
         _own("ragged"), _raggedness, 1.15 * 1.05, at_most=True),
    Goal("step, B = 1, H = 64: time", "time",
         _where(_own("step"), _small_step), lambda r: r["seconds"], 10e-6, at_most=True, show=duration),
    Goal("step, B = 1, H = 64: 99th percentile of the time", "99th percentile",
         _where(_own("step"), _small_step), lambda r: r["p99"], 30e-6, at_most=True, show=duration),
    Goal("step, LSTM, B = 1, H = 64: ratio to torch", "torch",
         _where(_ratio("step", "torch"), lambda r: _small_step(r) and r["cell"] == "lstm"), _speed_up, 10.0),
    Goal("language-model training step: ratio to torch", "torch", _ratio("lm", "torch"), _speed_up, 2.0),
)  # fmt: skip


def verdict(goal: Goal, records: Iterable[Record]) -> tuple[str, str, str]:
    """Return the verdict, the number it rests on (the mean, or the worst case), and how many cases meet it.

    A case whose results are wrong is not met, whatever the others.
    """
    counted = [record for record in records if goal.applies(record) and record["status"] != "unsupported"]
    wrong = any(record["status"] == "wrong" for record in counted)
    cases = grouped(counted, lambda record: tuple(record[name] for name in _CASE))
    by_case = [[v for record in group if (v := goal.value(record)) is not None] for group in cases.values()]
    values = [value for case in by_case for value in case]
    meeting = sum(bool(case) and all(map(goal.reached, case)) for case in by_case)
    count = str(len(cases)) if goal.mean else f"{meeting} of {len(cases)}"
    if wrong:
        return "not met", "wrong results", count
    if not values:
        return "not measured", "-", "-"
    reached = geometric_mean(values) if goal.mean else (max if goal.at_most else min)(values)
    return ("met" if goal.reached(reached) else "not met"), goal.show(reached), count


_CASE = ("kernel", "cell", "T", "B", "I", "H", "threads")


def table_of(records: Sequence[Record]) -> str:
    """Return the goals as a Markdown table."""
    rows = []
    for goal in GOALS:
        outcome, reached, count = verdict(goal, records)
        sign = "<=" if goal.at_most else ">="
        rows.append([goal.text, f"{sign} {goal.show(goal.bound)}", reached, count, outcome])
    return table(["goal", "bound", "mean or worst", "cases", "verdict"], rows)


def cells_of(records: Sequence[Record]) -> str:
    """Return, for each operation, a Markdown table of all cases that have goals; what misses one is bold."""
    parts = []
    for operation in OPERATIONS:
        own = [record for record in records if record["operation"] == operation]
        goals = [goal for goal in GOALS if any(goal.applies(record) for record in own)]
        if not goals:
            continue
        counts = sorted({record["threads"] for record in own})
        columns = [
            (short, count) for short in dict.fromkeys(goal.short for goal in goals) for count in counts
        ]
        head = [
            "cell",
            "(T, B, I, H)",
            "kernel",
            *(f"{short}, {threads_of(count)}" for short, count in columns),
        ]
        rows = []
        for (cell, shape, kernel), group in grouped(own, _row_of).items():
            values = [
                _value([goal for goal in goals if goal.short == short], group, count)
                for short, count in columns
            ]
            if any(values):
                rows.append([cell, shape, kernel, *values])
        parts.append(f"### {operation}\n\n{table(head, rows, left=3)}")
    return "\n\n".join(parts)


def _row_of(record: Record) -> tuple[str, str, str]:
    return record["cell"], shape_of(record), record["kernel"]


def _value(goals: Sequence[Goal], records: Sequence[Record], threads: int) -> str:
    """Return the number that these goals are about, bold where it misses one; empty where none applies."""
    shown = ""
    for goal in goals:
        for record in records:
            value = goal.value(record)
            if record["threads"] != threads or not goal.applies(record) or value is None:
                continue
            if not goal.mean and not goal.reached(value):
                return f"**{goal.show(value)}**"
            shown = goal.show(value)
    return shown
