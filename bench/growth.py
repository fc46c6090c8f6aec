"""How time grows with T, B, H and the number of threads, one at a time.

Run ``python -m bench.growth --help``. Exit status as of `bench.grid`. ``bench.report --pictures`` draws
the result.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

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
CORES = 64  # of the machine that `many_cores` is about


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
    parts = [tables.conditions(records), tables.details(records), table_of(records), tables.problems(records)]
    return "\n\n".join(part for part in parts if part)


def along(axis: str, records: Iterable[Record]) -> list[Record]:
    """Return the records that were timed and lie on an axis, by size."""
    base, sizes = AXES[axis]
    fixed = [(name, value) for name, value in zip("TBH", base, strict=True) if value]
    chosen = [
        record
        for record in records
        if record["seconds"] is not None and record[axis] in sizes and all(record[n] == v for n, v in fixed)
    ]
    return sorted(chosen, key=lambda record: record[axis]) if len({r[axis] for r in chosen}) > 1 else []


def table_of(records: Sequence[Record]) -> str:
    """Return, for each operation, cell and axis, the times, and how rnnkit's grow from one size to the next.

    The growth is the exponent: 1 where time is in proportion to the size, 0 where it does not depend on it.
    """
    parts = []
    for (operation, cell), group in tables.grouped(records, lambda r: (r["operation"], r["cell"])).items():
        for axis in AXES:
            columns = _columns(axis, along(axis, group))
            if not columns:
                continue
            own = {f"{r['kernel']}, {tables.threads_of(r['threads'])}" for r in group}
            head = [axis]
            for name in columns:
                head += [name, "exponent"] if name in own else [name]
            sizes = sorted({size for points in columns.values() for size in points})
            rows = []
            for before, size in zip([None, *sizes], sizes, strict=False):
                row = [str(size)]
                for name, points in columns.items():
                    row += [tables.duration(points.get(size))]
                    row += [_exponent(points, before, size)] if name in own else []
                rows.append(row)
            base = ", ".join(f"{n}={v}" for n, v in zip("TBH", AXES[axis][0], strict=True) if v)
            parts.append(f"### {operation}, {cell}, {base}\n\n{tables.table(head, rows, left=0)}")
    return "\n\n".join(parts)


def many_cores(records: Sequence[Record]) -> str:
    """Return two estimates of the time on `CORES` cores, from what was measured on one and two.

    *Tiles*: each core takes its share of the batch through all time steps and waits for nobody, so that it
    needs what one thread needs for a batch of that size. That is the least time: memory is shared.

    *Serial part*: if s is the share of one thread's time that a second thread does not shorten, then N cores
    need s + (1 - s) / N of it (Amdahl). Two threads that were kept waiting by memory, or by other processes,
    count as serial: this is the most.
    """
    head = ["operation", "cell", "B", "1 thread", "2 threads", f"by tiles: 1 thread, B / {CORES}", "speed-up"]
    head += ["serial part", f"{CORES} cores by it", "speed-up"]
    rows = []
    for (operation, cell), group in tables.grouped(records, lambda r: (r["operation"], r["cell"])).items():
        seconds = {(r["B"], r["threads"]): r["seconds"] for r in along("B", group)}
        for B in AXES["B"][1]:
            if not {(B, 1), (B, 2), (B // CORES, 1)} <= seconds.keys() or B % CORES:
                continue
            one, two, tile = seconds[B, 1], seconds[B, 2], seconds[B // CORES, 1]
            serial = min(1.0, max(0.0, 2.0 * two / one - 1.0))
            most = one * (serial + (1.0 - serial) / CORES)
            row = [operation, cell, str(B), *(tables.duration(t) for t in (one, two, tile))]
            row += [f"{one / tile:.0f}", f"{100 * serial:.0f} %", tables.duration(most), f"{one / most:.0f}"]
            rows.append(row)
    return tables.table(head, rows, left=2) if rows else ""


def _columns(axis: str, records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Return the seconds by size of each kernel and peer, and number of threads."""
    columns: dict[str, dict[int, float]] = {}
    for record in records:
        threads = tables.threads_of(record["threads"])
        columns.setdefault(f"{record['kernel']}, {threads}", {})[record[axis]] = record["seconds"]
        if record["peer_seconds"] is not None:
            peer = f"{tables.PEER_NAMES[record['peer']]}, {threads}"
            columns.setdefault(peer, {})[record[axis]] = record["peer_seconds"]
    return columns


def _exponent(points: dict[int, float], before: int | None, size: int) -> str:
    if before not in points or size not in points:
        return ""
    return f"{math.log(points[size] / points[before]) / math.log(size / before):.2f}"


if __name__ == "__main__":
    sys.exit(main())
