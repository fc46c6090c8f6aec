"""Records of a GPU as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records import Record
from ..tables import duration, geometric_mean, grouped, number, shape_of, table
from .plan import special

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def conditions(records: Sequence[Record]) -> str:
    """Return device and versions of a run."""
    record = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['device']}, driver {record['driver']}, CUDA {record['cuda']}; {versions}."


def limits(records: Sequence[Record]) -> str:
    """Return what the machine does at best."""
    rows = [
        [record["measure"], record["detail"], duration(record["seconds"]), _spread(record["spread"]),
         _rate(record), record["reason"] or "-"]
        for record in records
    ]  # fmt: skip
    return table(["measure", "of", "time", "spread", "rate", "not measured because"], rows, left=2)


def report_limits(records: Sequence[Record]) -> str:
    """Return all of a file of limits."""
    return f"{conditions(records)}\n\n{limits(records)}"


def summary(records: Sequence[Record]) -> str:
    """Return one row for each question of the plan, kernel and operation: ratios to torch."""
    head = ["question", "kernel", "operation", "cells", "ratio to torch, eager", "ratio to torch, graphed"]
    rows = []
    for (stage, kernel, operation), group in grouped(
        records, lambda r: (r["stage"], r["kernel"], r["operation"])
    ).items():
        timed = [record for record in group if record["ratio"] is not None]
        count = len({_cell(record) for record in timed})
        if timed:
            rows.append([stage, kernel, operation, str(count), *(_ratios(timed, g) for g in (False, True))])
    return table(head, rows, left=3) if rows else "No cell was timed against torch."


def models(records: Sequence[Record]) -> str:
    """Return what a step of whole sequences took beside what its model says; empty where none was timed.

    Both are of one layer. The measured time has the large products before and after the scan in it, which the
    model has not.
    """
    rows = []
    for record in records:
        if not record["model"] or record["seconds"] is None or record["graphed"]:
            continue
        steps = {name: sum(parts.values()) for name, parts in record["model"].items()}
        parts = "; ".join(
            f"{name}: " + (_parts(parts) or "step by step") for name, parts in record["model"].items()
        )
        rows.append([
            record["operation"] + _special(record), record["cell"], shape_of(record),
            "tf32" if record["tf32"] else record["dtype"],
            f"{1e6 * record['seconds'] / record['T'] / record['layers']:.2f}",
            f"{1e6 * sum(steps.values()):.2f}", parts,
        ])  # fmt: skip
    head = ["operation", "cell", "(T, B, I, H)", "precision", "us a step", "model", "of which, in us"]
    return table(head, rows, left=4) if rows else ""


def _parts(seconds: dict[str, float]) -> str:
    return ", ".join(f"{part} {1e6 * each:.2f}" for part, each in seconds.items() if each)


def details(records: Sequence[Record]) -> str:
    """Return every cell with the times of all sides."""
    head = ["operation", "cell", "(T, B, I, H)", "precision", "torch", "graphed", "kernel", "time", "spread",
            "max error", "ratio", "to graphed"]  # fmt: skip
    rows = []
    for group in grouped(records, lambda r: (_cell(r), r["kernel"])).values():
        own = group[0]
        by_form: dict[bool, Record] = {record["graphed"]: record for record in group}
        forms = [by_form.get(graphed, {}) for graphed in (False, True)]
        precision = "tf32" if own["tf32"] else own["dtype"]
        rows.append([
            own["operation"] + _special(own), own["cell"], shape_of(own), precision,
            *(duration(form.get("peer_seconds")) for form in forms),
            own["kernel"], duration(own["seconds"]) if own["seconds"] else own["status"],
            _spread(own["spread"]), "-" if own["max_error"] is None else f"{own['max_error']:.0e}",
            *(number(form.get("ratio")) for form in forms),
        ])  # fmt: skip
    return table(head, rows, left=4)


def problems(records: Sequence[Record]) -> str:
    """Return what was not timed and why, a line each, or an empty string."""
    lines = []
    for record in records:
        if record["status"] in ("wrong", "peer wrong", "failed"):
            form = ", graphed" if record["graphed"] and record["status"] == "peer wrong" else ""
            precision = "tf32" if record["tf32"] else record["dtype"]
            lines.append(
                f"- {record['status']}{form}: {record['operation']} {record['cell']} {shape_of(record)} "
                f"{precision}{_special(record)}, {record['kernel']}: {record['reason']}"
            )
    refused = grouped(
        (r for r in records if r["status"] == "unsupported"), lambda r: (r["kernel"], r["reason"])
    )
    lines += [f"- unsupported by {kernel}: {reason}" for kernel, reason in refused]
    return "\n".join(dict.fromkeys(lines))


def report(records: Sequence[Record]) -> str:
    """Return all of a file of cells."""
    parts = [conditions(records), details(records), summary(records)]
    if model := models(records):
        parts += ["### Whole sequences in one launch: a step and its model", model]
    if trouble := problems(records):
        parts += ["### Not timed", trouble]
    return "\n\n".join(parts)


def _cell(record: Record) -> tuple[Any, ...]:
    names = ("operation", "cell", "T", "B", "I", "H", "dtype", "tf32", "ragged", "layers", "directions")
    return tuple(record[name] for name in names)


def _special(record: Record) -> str:
    return special(record["ragged"], record["layers"], record["directions"])


def _ratios(records: Sequence[Record], graphed: bool) -> str:
    ratios = [record["ratio"] for record in records if record["graphed"] == graphed]
    if not ratios:
        return "-"
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _spread(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _rate(record: Record) -> str:
    if record["rate"] is None:
        return "-"
    size, prefix = next(((size, name) for size, name in PREFIXES if record["rate"] >= size), (1.0, ""))
    return f"{record['rate'] / size:.3g} {prefix}{record['unit']}"
