"""rnnkit's goals on the CPU, and whether a run met them.

Every goal is a bound on a number of each case, or on the geometric mean over the cases; a run that left
cases out is judged by those it has, and the table says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .records import Record
from .tables import geometric_mean, table


class Goal(NamedTuple):
    """A bound.

    Attributes
    ----------
    text : str
        What is bounded, in words.
    applies : callable
        Says of a record whether it counts.
    value : callable
        Its number; None where that was not measured.
    bound : float
    at_most : bool
        Whether the bound is an upper one.
    mean : bool
        Whether the geometric mean is bounded rather than every case.
    """

    text: str
    applies: Callable[[Record], bool]
    value: Callable[[Record], float | None]
    bound: float
    at_most: bool = False
    mean: bool = False


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
    Goal("forward, without numba, B >= 8: ratio to torch",
         _where(_ratio("forward", "torch", "numpy"), lambda r: r["B"] >= 8), _speed_up, 0.8),
    Goal("forward, without numba, B = 1, H <= 64: ratio to torch",
         _where(_ratio("forward", "torch", "numpy"), lambda r: r["B"] == 1 and r["H"] <= 64), _speed_up, 1.0),
    Goal("forward, with numba: ratio to torch", _ratio("forward", "torch", "numba"), _speed_up, 1.0),
    Goal("forward, with numba: mean ratio to torch",
         _ratio("forward", "torch", "numba"), _speed_up, 1.3, mean=True),
    Goal("forward, with numba: mean ratio to ONNX Runtime",
         _ratio("forward", "onnxruntime", "numba"), _speed_up, 1.0, mean=True),
    Goal("forward, with numba, B >= 32: fraction of the ceiling",
         lambda r: r["operation"] == "forward" and r["kernel"] == "numba" and r["B"] >= 32,
         lambda r: r["fraction_of_ceiling"], 0.95),
    Goal("training step, with numba: ratio to torch", _ratio("train", "torch", "numba"), _speed_up, 1.1),
    Goal("training step, with numba: mean ratio to torch",
         _ratio("train", "torch", "numba"), _speed_up, 1.8, mean=True),
    # 1.15 times the share of real time steps times the padded time, plus 5 %.
    Goal("ragged batch: time over the real share of the padded time",
         _own("ragged"), _raggedness, 1.15 * 1.05, at_most=True),
    Goal("step, B = 1, H = 64: seconds",
         _where(_own("step"), _small_step), lambda r: r["seconds"], 10e-6, at_most=True),
    Goal("step, B = 1, H = 64: 99th percentile in seconds",
         _where(_own("step"), _small_step), lambda r: r["p99"], 30e-6, at_most=True),
    Goal("step, LSTM, B = 1, H = 64: ratio to torch",
         _where(_ratio("step", "torch"), lambda r: _small_step(r) and r["cell"] == "lstm"), _speed_up, 10.0),
    Goal("language-model training step: ratio to torch", _ratio("lm", "torch"), _speed_up, 2.0),
)  # fmt: skip


def verdict(goal: Goal, records: Iterable[Record]) -> tuple[str, str, int]:
    """Return the verdict, the number it rests on (the mean, or the worst case) and the number of cases.

    A case whose results are wrong is not met, whatever the others.
    """
    counted = [record for record in records if goal.applies(record) and record["status"] != "unsupported"]
    wrong = any(record["status"] == "wrong" for record in counted)
    values = [value for record in counted if (value := goal.value(record)) is not None]
    key = ("cell", "T", "B", "I", "H", "threads")
    cases = len({tuple(record[name] for name in key) for record in counted})
    if wrong:
        return "not met", "wrong results", cases
    if not values:
        return "not measured", "-", 0
    reached = geometric_mean(values) if goal.mean else (max if goal.at_most else min)(values)
    met = reached <= goal.bound if goal.at_most else reached >= goal.bound
    return ("met" if met else "not met"), f"{reached:.3g}", cases


def table_of(records: Sequence[Record]) -> str:
    """Return the goals as a Markdown table."""
    rows = []
    for goal in GOALS:
        outcome, reached, cases = verdict(goal, records)
        sign = "<=" if goal.at_most else ">="
        rows.append([goal.text, f"{sign} {goal.bound:.4g}", reached, str(cases), outcome])
    return table(["goal", "bound", "mean or worst", "cases", "verdict"], rows)
