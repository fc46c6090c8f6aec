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
    """Yield a name and a picture of the ratios for each operation and peer, with a row for each kernel."""
    timed = [record for record in records if record["ratio"] is not None]
    for (operation, peer), group in grouped(timed, lambda r: (r["operation"], r["peer"])).items():
        yield f"{operation}_{peer}", _heat_map(group, f"{operation}: {PEER_NAMES[peer]}'s time over rnnkit's")


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
    rows = grouped(records, lambda record: (record["kernel"], record["cell"], record["threads"]))
    order = sorted(rows, key=lambda row: (row[0], CELLS.index(row[1]), row[2]))
    shapes = list(dict.fromkeys(shape_of(record) for record in records))
    ratios = np.full((len(rows), len(shapes)), np.nan)
    for k, row in enumerate(order):
        for record in rows[row]:
            ratios[k, shapes.index(shape_of(record))] = record["ratio"]
    figure = Figure(figsize=(4.0 + 0.85 * len(shapes), 2.0 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    # A log scale around 1, so that half and twice as fast are equally far from white.
    image = axes.imshow(ratios, cmap="RdBu", norm=LogNorm(0.25, 4.0), aspect="auto")
    axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [f"{cell}, {kernel}, {threads_of(n)}" for kernel, cell, n in order])
    axes.set_xlabel("(T, B, I, H)")
    axes.set_title(title)
    for (row, column), ratio in np.ndenumerate(ratios):
        if np.isfinite(ratio):
            color = "white" if max(ratio, 1 / ratio) > 2.5 else "black"
            axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", color=color)
    bar = figure.colorbar(image, ax=axes, label="ratio", ticks=(0.25, 0.5, 1, 2, 4), format="%g")
    bar.ax.minorticks_off()
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
