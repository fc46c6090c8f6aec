"""Pictures of records: ratios as heat maps, times as curves. The only module here that needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .cases import CELLS, Case, flops_of
from .growth import AXES, along
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
    """Yield a name and a picture of time against T, B and H, side by side, for each operation and cell."""
    for (operation, cell), group in grouped(records, lambda r: (r["operation"], r["cell"])).items():
        axes = {axis: along(axis, group) for axis in AXES}
        axes = {axis: part for axis, part in axes.items() if part}
        figure = Figure(figsize=(4.0 * len(axes), 4.6), layout="constrained")
        for place, (axis, part) in zip(
            figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True
        ):
            _curves(place, part, axis)
        figure.axes[0].set_ylabel("seconds")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(f"{operation}, {cell}")
        yield f"{operation}_{cell}", figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=90)


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


def _curves(axes: Axes, records: Sequence[Record], axis: str) -> None:
    times: dict[tuple[str, int], dict[int, float]] = {}
    floors: dict[int, dict[int, float]] = {}
    for record in records:
        size, threads = record[axis], record["threads"]
        times.setdefault((f"rnnkit, {record['kernel']}", threads), {})[size] = record["seconds"]
        if record["peer_seconds"] is not None:
            times.setdefault((PEER_NAMES[record["peer"]], threads), {})[size] = record["peer_seconds"]
        floors.setdefault(threads, {})[size] = _flops(record) / record["ceiling"]
    colors = {name: f"C{k}" for k, name in enumerate(dict.fromkeys(name for name, _ in times))}
    styles = dict(zip(sorted(floors), ("-", "--", ":", "-."), strict=False))
    for (name, threads), points in times.items():
        line = axes.plot(
            *_line(points), color=colors[name], marker=".", label=f"{name}, {threads_of(threads)}"
        )
        line[0].set_linestyle(styles.get(threads, "-"))
    for threads, points in floors.items():
        label = f"at the ceiling of sgemm, {threads_of(threads)}"
        line = axes.plot(*_line(points), color="black", linewidth=0.8, label=label)
        line[0].set_linestyle(styles.get(threads, "-"))
    base, sizes = AXES[axis]
    fixed = ", ".join(f"{name}={value}" for name, value in zip("TBH", base, strict=True) if value)
    axes.set(xscale="log", yscale="log", xlabel=axis, title=fixed)
    shown = [size for size in sizes if any(record[axis] == size for record in records)]
    axes.set_xticks(shown, [str(size) for size in shown], rotation=45)
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)


def _line(points: dict[int, float]) -> tuple[Any, Any]:
    sizes = sorted(points)
    return sizes, [points[size] for size in sizes]


def _flops(record: Record) -> float:
    return flops_of(Case(**{name: record[name] for name in Case._fields}), record["density"])
