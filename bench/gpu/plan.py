"""Which cells are measured, and in which order: what matters most comes first, since time may run out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ..cases import CELLS, Case, flops_of

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
OPERATIONS = ("forward", "train")
T = (128, 1024)
B = (1, 16, 64, 256)
# 160 and 192 lie where cuDNN still takes its kernels for small H, and slows down with the batch.
H = (64, 128, 160, 192, 256, 512, 768, 1024, 1536, 2048)


class Cell(NamedTuple):
    """One thing to measure.

    Attributes
    ----------
    case : Case
        Operation, cell, sizes and dtype.
    tf32 : bool
        Whether matrix products of float32 may round their operands to 10 bits.
    ragged : bool
        Whether the sequences have lengths, uniform in 1..T.
    layers, directions : int
        Of the layer, which may be a stack.
    """

    case: Case
    tf32: bool = False
    ragged: bool = False
    layers: int = 1
    directions: int = 1

    @property
    def precision(self) -> str:
        """One of `PRECISIONS`."""
        return "tf32" if self.tf32 else self.case.dtype

    def __str__(self) -> str:
        return f"{self.case} {self.precision}{special(self.ragged, self.layers, self.directions)}"


def special(ragged: bool, layers: int, directions: int) -> str:
    """Say what is not as usual about a cell, after a comma."""
    words = [f"{layers} layers"] * (layers > 1) + ["two directions"] * (directions == 2)
    return "".join(f", {word}" for word in ["ragged"] * ragged + words)


class Stage(NamedTuple):
    """Cells that answer one question: every combination of these, the last field changing fastest."""

    title: str
    cells: tuple[str, ...] = ("lstm",)
    T: tuple[int, ...] = (128,)
    ragged: tuple[bool, ...] = (False,)
    layers: tuple[int, ...] = (1,)
    directions: tuple[int, ...] = (1,)
    precisions: tuple[str, ...] = ("bfloat16", "tf32")
    H: tuple[int, ...] = (256, 512)
    B: tuple[int, ...] = (16, 64, 1)
    operations: tuple[str, ...] = OPERATIONS


# In the order of rnnkit's goals on a GPU; the last stage is the whole grid.
STAGES = (
    Stage("FlashRNN's published cell", T=(1024,), precisions=("bfloat16",), H=(768,), B=(16,)),
    Stage("an LSTM whose weights fit one cluster"),
    Stage("H = 1024 in bfloat16", precisions=("bfloat16",), H=(1024,)),
    Stage("cuDNN's kernels for small H", precisions=("float32", "tf32"), H=(160, 192), B=(64, 256)),
    Stage("float16, where cuDNN is persistent", precisions=("float16",), H=(512, 1024), B=(16, 64)),
    Stage("bound by the matrix product", H=(1024, 2048), B=(256,)),
    Stage("ragged", ragged=(True,), B=(64, 16)),
    Stage("GRU and RNN", cells=("gru", "rnn"), B=(64, 16)),
    Stage("two directions", directions=(2,), B=(64, 16)),
    Stage("two layers", layers=(2,), B=(64, 16)),
    Stage("long sequences", T=(1024,), B=(16, 64)),
    Stage("the rest of the grid", CELLS, T, (False, True), (1,), (1,), PRECISIONS, H, B),
)


def plan() -> Iterator[tuple[str, Cell]]:
    """Yield each cell once, with the title of its stage; those of the last stage from small to large."""
    seen: set[Cell] = set()
    for stage in STAGES:
        cells = list(cells_of(stage))
        if stage is STAGES[-1]:
            cells.sort(key=lambda cell: flops_of(cell.case))
        for cell in cells:
            if cell not in seen:
                seen.add(cell)
                yield stage.title, cell


def cells_of(stage: Stage) -> Iterator[Cell]:
    """Yield a stage's cells; I is H throughout."""
    for kind, steps, ragged, layers, directions, precision, size, batch, operation in itertools.product(
        *stage[1:]
    ):
        if ragged and batch == 1:
            continue  # a single sequence with a length is a shorter sequence
        dtype = "float32" if precision == "tf32" else precision
        case = Case(operation, kind, steps, batch, size, size, dtype)
        yield Cell(case, precision == "tf32", ragged, layers, directions)
