"""Pictures of records: ratios as heat maps, times as curves. The only module here that needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .cases import CELLS, Case, flops_of
from .growth import AXES
from .records import Record
from .tables import PEER_NAMES, grouped, shape_of, threads_of


def heat_maps(records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """Yield a name and a picture of the ratios for each operation, kernel, peer and number of threads."""
    timed = [record for record in records if record["ratio"] is not None]
    key = ("operation", "kernel", "peer", "threads")
    for (operation, kernel, peer, threads), group in grouped(
        timed, lambda record: tuple(record[name] for name in key)
    ).items():
        title = f"{operation}, {kernel}, {threads_of(threads)}: {PEER_NAMES[peer]}'s time over rnnkit's"
        yield f"{operation}_{kernel}_{peer}_{threads}", _heat_map(group, title)


def curves(records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """Yield a name and a picture of time against T, B or H for each operation, cell and threads."""
    timed = [record for record in records if record["seconds"] is not None]
    key = ("operation", "cell", "threads")
    for (operation, cell, threads), group in grouped(
        timed, lambda record: tuple(record[name] for name in key)
    ).items():
        for axis, (base, _) in AXES.items():
            fixed = {name: value for name, value in zip("TBH", base, strict=True) if value}
            along = [r for r in group if all(r[name] == value for name, value in fixed.items())]
            if len({record[axis] for record in along}) > 1:
                rest = ", ".join(f"{name}={value}" for name, value in fixed.items())
                title = f"{operation} {cell}, {threads_of(threads)}, {rest}"
                yield f"{operation}_{cell}_{threads}_{axis}", _curve(along, axis, title)


def save(figure: Figure, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=120)


def _heat_map(records: Sequence[Record], title: str) -> Figure:
    shapes = list(dict.fromkeys(shape_of(record) for record in records))
    cells = [cell for cell in CELLS if any(record["cell"] == cell for record in records)]
    ratios = np.full((len(cells), len(shapes)), np.nan)
    for record in records:
        ratios[cells.index(record["cell"]), shapes.index(shape_of(record))] = record["ratio"]
    figure = Figure(figsize=(2.5 + 1.1 * len(shapes), 2.2 + 0.5 * len(cells)), layout="constrained")
    axes = figure.subplots()
    # A log scale around 1, so that half and twice as fast are equally far from white.
    image = axes.imshow(ratios, cmap="RdBu", norm=LogNorm(0.25, 4.0), aspect="auto")
    axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    axes.set_yticks(range(len(cells)), cells)
    axes.set_xlabel("(T, B, I, H)")
    axes.set_title(title)
    for (row, column), ratio in np.ndenumerate(ratios):
        if np.isfinite(ratio):
            axes.text(column, row, f"{ratio:.2f}", ha="center", va="center")
    figure.colorbar(image, ax=axes, label="ratio")
    return figure


def _curve(records: Sequence[Record], axis: str, title: str) -> Figure:
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    times: dict[str, dict[int, float]] = {}
    floor: dict[int, float] = {}
    for record in records:
        size = record[axis]
        times.setdefault(f"rnnkit, {record['kernel']}", {})[size] = record["seconds"]
        if record["peer_seconds"] is not None:
            times.setdefault(PEER_NAMES[record["peer"]], {})[size] = record["peer_seconds"]
        floor[size] = _flops(record) / record["ceiling"]
    for name, points in times.items():
        axes.plot(*_line(points), marker="o", label=name)
    axes.plot(*_line(floor), color="black", linestyle="--", label="at the ceiling of sgemm")
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds", title=title)
    axes.set_xticks(sorted(floor), [str(size) for size in sorted(floor)])
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    return figure


def _line(points: dict[int, float]) -> tuple[Any, Any]:
    sizes = sorted(points)
    return sizes, [points[size] for size in sizes]


def _flops(record: Record) -> float:
    return flops_of(Case(**{name: record[name] for name in Case._fields}), record["density"])
