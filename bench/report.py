"""Tables and pictures of what was measured, and the README's table.

Run ``python -m bench.report --help``. Without files it reads those in ``bench/results``. Exit status: 0;
1 when ``--check`` finds a difference; 2 for a wrong argument or file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import grid, growth, startup, tables
from .gpu import tables as gpu_tables
from .records import Record, load

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
NOTHING = "No measurements have been recorded yet."

Document = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a report, or write or check the README's section, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench.report", description="Show what the benchmarks wrote with --json.", allow_abbrev=False
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: bench/results/*.json")
    parser.add_argument("--pictures", type=Path, metavar="DIRECTORY", help="draw pictures there, as PNG")
    readme = parser.add_mutually_exclusive_group()
    readme.add_argument("--readme", type=Path, metavar="README", help="write the section between its markers")
    readme.add_argument("--check", type=Path, metavar="README", help="exit with 1 when the section differs")
    given = parser.parse_args(argv)
    try:
        documents = [load(path) for path in given.files or sorted(RESULTS.glob("*.json"))]
        if given.readme or given.check:
            return _readme(given.readme or given.check, section(documents), write=bool(given.readme))
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


def section(documents: Sequence[Document]) -> str:
    """Return the README's section: of each file the conditions and one table."""
    parts = []
    for document in documents:
        records = document["records"]
        if document["kind"] == "growth" or not records:
            continue  # curves are pictures
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


def replaced(readme: str, content: str) -> str:
    """Return a README with `content` between its markers.

    Raises
    ------
    ValueError
        The markers are missing, more than one pair, or in the wrong order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"must have {BEGIN} and, after it, {END}, each once")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def _readme(path: Path, content: str, *, write: bool) -> int:
    old = path.read_text(encoding="utf-8")
    try:
        new = replaced(old, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if new == old:
        return 0
    if write:
        path.write_text(new, encoding="utf-8")
        return 0
    print(f"{path} differs from the results: run python -m bench.report --readme {path}", file=sys.stderr)
    return 1


def _draw(documents: Sequence[Document], directory: Path) -> None:
    from . import pictures

    directory.mkdir(parents=True, exist_ok=True)
    draw = {"grid": pictures.heat_maps, "growth": pictures.curves}
    for k, document in enumerate(documents):
        if document["kind"] in draw:
            for name, figure in draw[document["kind"]](document["records"]):
                path = directory / f"{document['kind']}{k}_{name}.png"
                pictures.save(figure, path)
                print(path, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
