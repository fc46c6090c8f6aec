"""Pictures. The only module that imports matplotlib, and only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Curve(NamedTuple):
    """The losses of one training: one number an epoch each."""

    train: Sequence[float]
    validation: Sequence[float]


# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")


def plot_losses(
    curves: Mapping[str, Curve], path: str | Path | None = None, *, floor: float | None = None,
    title: str = "",
) -> Any:  # fmt: skip
    """Draw loss curves: validation as lines, training as thin dashed ones, the floor as a line.

    Parameters
    ----------
    curves : mapping of str to Curve
        By the name that the legend shows.
    path : path, optional
        Where to write the picture; its ending chooses the format.
    floor : float, optional
        The least loss that any model can reach.
    title : str

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    try:
        # Figure without pyplot: no global state, no window, no backend to choose.
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, ScalarFormatter
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "rnnkit[plot]"') from error

    figure = Figure(figsize=(8, 4.8), layout="constrained", dpi=150)
    axes = figure.subplots()
    for k, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        # The last curve may lie exactly on another one (torch's LSTM on ours): dots let both show.
        style = {"linestyle": (0, (1, 2)), "linewidth": 2.6} if "torch" in name else {"linewidth": 1.8}
        epochs = range(1, len(curve.train) + 1)
        if curve.validation:
            axes.plot(epochs, curve.validation, color=colour, label=name, zorder=3, **style)
            axes.plot(epochs, curve.train, color=colour, linewidth=0.8, alpha=0.55, linestyle="--")
        else:
            axes.plot(epochs, curve.train, color=colour, label=name, **style)
    if floor is not None:
        axes.axhline(floor, color="0.35", linewidth=1.0)
        # At the left, where no curve has come down to it yet.
        axes.annotate(
            f"entropy floor {floor:.4f}", (0.0, floor), xycoords=("axes fraction", "data"),
            xytext=(6, -4), textcoords="offset points", ha="left", va="top", color="0.35", fontsize=9,
        )  # fmt: skip
        axes.set_ylim(bottom=floor * 0.85)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter() if _narrow(curves) else NullFormatter())
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats a token)")
    axes.set_xlim(left=1)
    axes.grid(which="both", color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if any(curve.validation for curve in curves.values()):
        axes.plot([], [], color="0.4", linewidth=0.8, linestyle="--", label="on the training set")
    axes.legend(frameon=False)
    axes.set_title(title, loc="left", fontsize=11)
    if path is not None:
        figure.savefig(path)
    return figure


def _narrow(curves: Mapping[str, Curve]) -> bool:
    """Whether the losses span too little for a logarithmic axis to show a major tick of its own."""
    values = [value for curve in curves.values() for value in (*curve.train, *curve.validation)]
    return not values or max(values) < 20 * min(values)
