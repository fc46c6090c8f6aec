"""Records as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .records import Record

BUSY = 0.25  # cores; a system's own services stay below
PEER_NAMES = {"torch": "torch", "onnxruntime": "ONNX Runtime"}


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean: the mean of ratios, indifferent to which side stands below."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are flush left, the others right."""
    rule = ["---" if k < left else "---:" for k in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Return the records by key, in the order in which the keys first appear."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def duration(seconds: float | None) -> str:
    """Return a time with three digits and its unit."""
    if seconds is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} µs"


def number(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return "-" if value is None else f"{value:.2f}"


def shape_of(record: Record) -> str:
    """Return (T, B, I, H)."""
    return f"({', '.join(str(record[axis]) for axis in 'TBIH')})"


def conditions(records: Sequence[Record]) -> str:
    """Return machine, versions and dtype of a run, and whether it had the machine for itself."""
    record = records[0]
    shown = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    dtype = f"; {record['dtype']}" if "dtype" in record else ""
    return f"{record['processor']}; {shown}{dtype}. {company(records)}".rstrip()


def company(records: Sequence[Record]) -> str:
    """Return a warning when other processes kept the machine busy during a run, else an empty string."""
    busy = [record["busy_cores"] for record in records if record.get("busy_cores") is not None]
    if not busy or max(busy) < BUSY:
        return ""
    return (
        f"**Other processes kept up to {max(busy):.1f} cores busy during this run: "
        "read its times, and most of all those of several threads, with care.**"
    )


def summary(records: Iterable[Record]) -> str:
    """Return one row for each operation, kernel and peer: the ratio's geometric mean and range by threads."""
    timed = [record for record in records if record["ratio"] is not None]
    if not timed:
        return "No case was timed against a peer."
    counts = sorted({record["threads"] for record in timed})
    head = ["operation", "kernel", "peer", "cases", *(threads_of(count) for count in counts)]
    rows = []
    for (operation, kernel, peer), group in grouped(timed, _contest).items():
        by_threads = grouped(group, lambda record: record["threads"])
        cells = [_mean_and_range(by_threads.get(count, [])) for count in counts]
        most = max(len(part) for part in by_threads.values())
        rows.append([operation, kernel, PEER_NAMES[peer], str(most), *cells])
    return table(head, rows, left=3)


def details(records: Iterable[Record]) -> str:
    """Return a table of all cases for each operation and number of threads."""
    parts = []
    groups = grouped(records, lambda r: (r["operation"], r["threads"]))
    for (operation, threads), group in groups.items():
        names = list(dict.fromkeys(record["peer"] for record in group if record["peer"]))
        head = ["cell", "(T, B, I, H)", "kernel", "time", "spread", "of ceiling", "max error"]
        head += [f"{part}{PEER_NAMES[name]}" for name in names for part in ("", "ratio to ")]
        rows = []
        served = [record for record in group if record["status"] != "unsupported"]
        for case in grouped(served, lambda r: (r["cell"], shape_of(r), r["kernel"])).values():
            rows.append(_detail(case, names))
        parts.append(f"### {operation}, {threads_of(threads)}\n\n{table(head, rows, left=3)}")
    return "\n\n".join(parts)


def problems(records: Iterable[Record]) -> str:
    """Return what was not timed and why, a line each, or an empty string."""
    lines = [
        f"- {record['status']}: {record['operation']} {record['cell']} {shape_of(record)}, "
        f"{record['kernel']}, {threads_of(record['threads'])}: {record['reason']}"
        for record in records
        if record["status"] in ("wrong", "peer wrong")
    ]
    refused = grouped(
        (record for record in records if record["status"] == "unsupported"),
        lambda record: (record["kernel"], record["reason"]),
    )
    lines += [f"- unsupported by {kernel}: {reason}" for kernel, reason in refused]
    return "\n".join(dict.fromkeys(lines))


def _contest(record: Record) -> tuple[str, str, str]:
    return record["operation"], record["kernel"], record["peer"]


def threads_of(count: int) -> str:
    """Return "1 thread" and so on."""
    return f"{count} thread{'s' if count > 1 else ''}"


def _mean_and_range(records: Sequence[Record]) -> str:
    ratios = [record["ratio"] for record in records]
    if not ratios:
        return "-"
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _detail(case: Sequence[Record], names: Sequence[str]) -> list[str]:
    first, by_peer = case[0], {record["peer"]: record for record in case}
    spread, fraction, error = first["spread"], first["fraction_of_ceiling"], first["max_error"]
    row = [
        first["cell"], shape_of(first), first["kernel"],
        duration(first["seconds"]) if first["seconds"] else first["status"],
        "-" if spread is None else f"{100 * spread:.0f} %",
        "-" if fraction is None else f"{100 * fraction:.0f} %",
        "-" if error is None else f"{error:.0e}",
    ]  # fmt: skip
    for name in names:
        record = by_peer.get(name)
        wrong = record is not None and record["status"] == "peer wrong"
        row += ["wrong" if wrong else duration(record["peer_seconds"] if record else None)]
        row += [number(record["ratio"] if record else None)]
    return row
