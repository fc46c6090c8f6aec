"""The grid: every operation and cell over all shapes, against the peers.

Run ``python -m bench.grid --help``. Exit status: 0; 1 when a result was wrong; 2 for a wrong argument.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from . import arguments, cases, goals, tables
from .arguments import Setting
from .measure import measure
from .records import Record, save


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the grid, print the tables, and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = arguments.parser("bench.grid", "Time rnnkit against its peers.", cases.OPERATIONS)
    given = parser.parse_args(argv)
    setting = arguments.setting_of(parser, given)
    chosen = cases.grid(given.operations, given.cells, quick=given.quick)
    if not chosen:
        parser.error("no case is left: the language model is an LSTM's")
    records = run("grid", argv, chosen, setting, given.json)
    print(report(records))
    return int(any(record["status"] == "wrong" for record in records))


def run(
    kind: str, argv: Sequence[str], chosen: Sequence[cases.Case], setting: Setting, path: Path | None
) -> list[Record]:
    """Measure cases; write what there is after each, so that an interrupted run is not lost."""
    records: list[Record] = []
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    for record in measure(chosen, setting):
        records.append(record)
        if path is not None:
            save(path, kind, arguments.command_of(kind, argv), date, setting.effort, records)
    return records


def report(records: Sequence[Record]) -> str:
    """Return all that a run has to say, as Markdown."""
    parts = [
        tables.conditions(records),
        tables.details(records),
        "### Ratio to the peer: geometric mean and range; above 1 rnnkit is faster",
        tables.summary(records),
        "### Goals",
        goals.table_of(records),
    ]
    parts += [warning] if (warning := tables.company(records)) else []
    problems = tables.problems(records)
    if problems:
        parts += ["### Not timed", problems]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
