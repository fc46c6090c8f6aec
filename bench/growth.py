"""How time grows with T, B, H and the number of threads, one at a time.

Run ``python -m bench.growth --help``. Exit status as of `bench.grid`. ``bench.report --pictures`` draws
the result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import arguments, grid, tables
from .cases import Case
from .records import Record

# Along each axis the others stay where neither they nor a call's overhead decide: (T, B, H), and I = H.
AXES: dict[str, tuple[tuple[int, int, int], tuple[int, ...]]] = {
    "T": ((0, 8, 64), (10, 30, 100, 300, 1000, 3000, 10_000)),
    "B": ((50, 0, 128), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)),
    "H": ((20, 16, 0), (16, 32, 64, 128, 256, 512, 1024, 2048)),
}
OPERATIONS = ("forward", "train")


def cases_of(
    axes: Sequence[str], operations: Sequence[str], cells: Sequence[str], *, quick: bool = False
) -> list[Case]:
    """Return the cases along the axes; `quick` keeps the first three of each."""
    result = []
    for operation in operations:
        for cell in cells:
            for axis in axes:
                base, sizes = AXES[axis]
                for size in sizes[:3] if quick else sizes:
                    T, B, H = (value or size for value in base)
                    result.append(Case(operation, cell, T, B, H, H))
    return list(dict.fromkeys(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the curves, print the tables, and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = arguments.parser("bench.growth", "Time rnnkit against T, B and H.", OPERATIONS)
    parser.add_argument(
        "--axes", type=arguments.some_of("axis", tuple(AXES)), default=tuple(AXES), metavar=",".join(AXES)
    )
    given = parser.parse_args(argv)
    setting = arguments.setting_of(parser, given)
    chosen = cases_of(given.axes, given.operations, given.cells, quick=given.quick)
    records = grid.run("growth", argv, chosen, setting, given.json)
    print(report(records))
    return int(any(record["status"] == "wrong" for record in records))


def report(records: Sequence[Record]) -> str:
    """Return all that a run has to say, as Markdown."""
    parts = [tables.conditions(records), tables.details(records), tables.problems(records)]
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
