"""Tables and pictures of what was measured, also those in the README and in ``docs``.

Run ``python -m bench.report --help``. Without files it reads those in ``bench/results``. Exit status: 0;
1 when ``--check`` finds a difference; 2 for a wrong argument or file.

A page has a section between the markers ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, NAME being one
of `SECTIONS`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import goals, grid, growth, startup, tables
from .gpu import tables as gpu_tables
from .records import Record, load

RESULTS = Path(__file__).parent / "results"
MARKER = re.compile(r"<!-- (\w+):(begin|end) -->")
NOTHING = "No measurements have been recorded yet."

Document = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a report, or write or check pages, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench.report", description="Show what the benchmarks wrote with --json.", allow_abbrev=False
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: bench/results/*.json")
    parser.add_argument("--pictures", type=Path, metavar="DIRECTORY", help="draw pictures there, as PNG")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", nargs="+", type=Path, metavar="PAGE", help="write the sections of pages")
    pages.add_argument("--check", nargs="+", type=Path, metavar="PAGE", help="exit with 1 when one differs")
    given = parser.parse_args(argv)
    try:
        documents = [load(path) for path in given.files or sorted(RESULTS.glob("*.json"))]
        if given.write or given.check:
            written = [
                _update(page, documents, write=bool(given.write)) for page in given.write or given.check
            ]
            return max(written)
        if given.pictures:
            _draw(documents, given.pictures)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n\n".join(text(document) for document in documents) or NOTHING)
    return 0


def text(document: Document) -> str:
    """Return all of a file as Markdown."""
    head = f"## `{document['command']}`, {document['date']}"
    if not document["records"]:
        return f"{head}\n\n{NOTHING}"
    return f"{head}\n\n{_SHOWN[document['kind']](document['records'])}"


_SHOWN: dict[str, Callable[[Sequence[Record]], str]] = {
    "grid": grid.report, "growth": growth.report, "startup": startup.report, "gpu": gpu_tables.report,
    "gpu limits": gpu_tables.report_limits,
}  # fmt: skip


def performance(documents: Sequence[Document]) -> str:
    """Return of each file the conditions and one table."""
    parts = []
    for document in documents:
        records = document["records"]
        if document["kind"] == "growth" or not records:
            continue  # many cases, no ratio that they share
        on_gpu = document["kind"].startswith("gpu")
        conditions = (gpu_tables if on_gpu else tables).conditions(records)
        made = f"`{document['command']}`, {document['date']}: {conditions}"
        caption = "The peer's time over rnnkit's, geometric mean and range; above 1 rnnkit is faster."
        if document["kind"] == "startup":
            parts += [made, startup.table_of(records)]
        elif document["kind"] == "gpu limits":
            parts += [made, gpu_tables.limits(records)]
        elif document["kind"] == "gpu":
            parts += [made, caption, gpu_tables.summary(records)]
        else:
            parts += [made, caption, tables.summary(records)]
            wrong = tables.problems([r for r in records if r["status"] != "unsupported"])
            parts += [f"Not timed:\n\n{wrong}"] if wrong else []
    return "\n\n".join(parts) or NOTHING


def goals_of(documents: Sequence[Document]) -> str:
    """Return every goal with what all files together say to it."""
    parts = []
    measured, started = _records_of("grid", documents), _records_of("startup", documents)
    if measured:
        parts += [goals.table_of(measured)]
    if started:
        parts += [startup.goals_of(started)]
    return "\n\n".join(parts) or NOTHING


def cells(documents: Sequence[Document]) -> str:
    """Return every case that has a goal beside its goals."""
    return goals.cells_of(_records_of("grid", documents)) or NOTHING


def curves(documents: Sequence[Document]) -> str:
    """Return the conditions of each file, and how time grows along each axis."""
    parts = [
        f"`{document['command']}`, {document['date']}: {tables.conditions(document['records'])}"
        for document in documents
        if document["kind"] == "growth" and document["records"]
    ]
    return "\n\n".join([*parts, growth.table_of(_records_of("growth", documents))]) if parts else NOTHING


def many_cores(documents: Sequence[Document]) -> str:
    """Return the estimates for a machine with many cores."""
    return growth.many_cores(_records_of("growth", documents)) or NOTHING


SECTIONS = {
    "performance": performance, "goals": goals_of, "cells": cells, "growth": curves, "cores": many_cores,
}  # fmt: skip


def _records_of(kind: str, documents: Sequence[Document]) -> list[Record]:
    return [record for document in documents if document["kind"] == kind for record in document["records"]]


def replaced(page: str, documents: Sequence[Document]) -> str:
    """Return a page with what was measured between its markers.

    Raises
    ------
    ValueError
        There are no markers, one without the other, or of an unknown section.
    """
    found = list(MARKER.finditer(page))
    begins, ends = found[::2], found[1::2]
    names = [mark.group(1) for mark in begins]
    if (
        not found or {mark.group(2) for mark in begins} != {"begin"} or not set(names) <= set(SECTIONS)
        or [(mark.group(1), mark.group(2)) for mark in ends] != [(name, "end") for name in names]
    ):  # fmt: skip
        known = ", ".join(SECTIONS)
        raise ValueError(f"must have pairs of <!-- NAME:begin --> and <!-- NAME:end -->, NAME one of {known}")
    parts, at = [], 0
    for begin, end in zip(begins, ends, strict=True):
        parts += [page[at : begin.end()], SECTIONS[begin.group(1)](documents)]
        at = end.start()
    return "\n".join([*parts, page[at:]])


def _update(path: Path, documents: Sequence[Document], *, write: bool) -> int:
    """Write a page, or say that it differs; return 1 if it does and was not written."""
    old = path.read_text(encoding="utf-8")
    try:
        new = replaced(old, documents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if new == old:
        return 0
    if write:
        path.write_text(new, encoding="utf-8")
        return 0
    print(f"{path} differs from the results: run python -m bench.report --write {path}", file=sys.stderr)
    return 1


def _draw(documents: Sequence[Document], directory: Path) -> None:
    from . import pictures

    directory.mkdir(parents=True, exist_ok=True)
    for kind, draw in (("grid", pictures.heat_maps), ("growth", pictures.curves)):
        for name, figure in draw(_records_of(kind, documents)):
            path = directory / f"{kind}_{name}.png"
            pictures.save(figure, path)
            print(path, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
