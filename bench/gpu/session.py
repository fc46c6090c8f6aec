"""A run: what is written where, when it stops, and how it goes on after it was killed."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import records
from ..arguments import progress
from ..records import Record
from ..timing import Effort
from . import limits, measure
from .plan import Cell
from .rig import Rig

# Median of some dozens of calls: a cell is over in a second or two, and the plan has thousands.
EFFORT = Effort(0.6, 3)
LIMITS, CELLS = "limits.json", "gpu.json"


class Session:
    """The two files of a run in one directory, written after each thing measured.

    Parameters
    ----------
    directory : Path
        Where they are; made if it is not there.
    rig : Rig
    command : str
        What repeats the run, for the files.
    effort : Effort
        How long each thing is timed.

    Raises
    ------
    ValueError
        The directory has results of another machine or of other versions.
    """

    def __init__(self, directory: Path, rig: Rig, command: str, effort: Effort = EFFORT):
        self.directory, self.rig, self.command, self.effort = directory, rig, command, effort
        self.limits = self._load(LIMITS)
        self.cells = self._load(CELLS)
        directory.mkdir(parents=True, exist_ok=True)

    def _load(self, name: str) -> list[Record]:
        path = self.directory / name
        if not path.exists():
            return []
        found: list[Record] = records.load(path)["records"]
        for record in found:
            changed = [key for key, value in self.rig.facts.items() if record[key] != value]
            if changed:
                key = changed[0]
                raise ValueError(
                    f"{path} has results with {key} {record[key]!r}, and now it is {self.rig.facts[key]!r}: "
                    "give another --out"
                )
        return found

    def _save(self, name: str, kind: str, found: list[Record]) -> None:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        records.save(self.directory / name, kind, self.command, today, self.effort, found)

    def measure_limits(self) -> None:
        """Measure those of the machine's limits that are not there yet."""
        known = {(record["measure"], record["detail"]) for record in self.limits}
        for limit in self.rig.limits():
            if (limit.measure, limit.detail) in known:
                continue
            with self.rig.precision(limit.tf32):
                self.limits.append(limits.measure(limit, self.effort, self.rig.clock, self.rig.facts))
            self._save(LIMITS, "gpu limits", self.limits)
            self.rig.free()

    def measure_cells(self, plan: Iterable[tuple[str, Cell]], deadline: float) -> int:
        """Measure what is not there yet of a plan; return how many cells are left.

        The deadline is one of `time.monotonic`. A cell is not begun when less time is left than the one
        before it took.

        Raises
        ------
        RuntimeError
            The device does not answer any more, as after an illegal memory access.
        """
        took = 0.0
        known = {_key(record) for record in self.cells}
        left = [(stage, cell) for stage, cell in plan if _key_of(cell) not in known]
        bar = progress(left)
        for done, (stage, cell) in enumerate(bar):
            bar.set_description(str(cell))
            began = time.monotonic()
            if began + took > deadline:
                return len(left) - done
            self.cells += self._measure(stage, cell)
            self._save(CELLS, "gpu", self.cells)
            self._answer(cell)
            took = time.monotonic() - began
        return 0

    def _measure(self, stage: str, cell: Cell) -> list[Record]:
        try:
            return measure.measure(stage, cell, self.rig, self.effort)
        except Exception as error:  # for want of memory, say; smaller cells can still be measured
            return measure.failure(stage, cell, self.rig, error)

    def _answer(self, cell: Cell) -> None:
        """Make sure that the device still answers."""
        try:
            self.rig.clock.synchronize()
            self.rig.free()
        except Exception as error:
            raise RuntimeError(
                f"after {cell} the device does not answer any more ({error}); "
                "what was measured is written, and the same command goes on behind this cell"
            ) from error


def _key_of(cell: Cell) -> tuple[Any, ...]:
    return *cell.case, *cell[1:]


def _key(record: Record) -> tuple[Any, ...]:
    case = (record[name] for name in ("operation", "cell", "T", "B", "I", "H", "dtype"))
    return *case, *(record[name] for name in Cell._fields[1:])
