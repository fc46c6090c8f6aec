"""The contestants of a cell: rnnkit's kernel modules, and torch.nn eager and as a graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import cases, ours, peers
from ..cases import Host, Problem
from ..correct import TOLERANCE as FLOAT32_TOLERANCE
from ..timing import Side
from .plan import Cell
from .rig import Rig

# What a side's error may be before its time counts, measured like `correct.TOLERANCE`. For half precision a
# few times what torch's own layers reach on a CPU, where they keep sums in half precision too: a test
# compares. TF32 rounds operands to as many bits as float16.
TOLERANCE = {"float32": FLOAT32_TOLERANCE, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 1e-1}

# The same for rnnkit alone, which keeps sums in float32: about twice the reference's error.
HALF = {"float16": 1.2e-3, "bfloat16": 1.2e-2}

EAGER, GRAPHED = "torch", "torch, graphed"


def problem_of(cell: Cell) -> Problem:
    """Return a cell's data as float32 on the host, with values that the cell's dtype has exactly."""
    problem = cases.problem_of(cell.case._replace(dtype="float32"))
    lengths = None
    if cell.ragged:
        lengths = np.random.default_rng(2024).integers(1, cell.case.T + 1, cell.case.B)

    def fit(array: Host) -> Host:
        return rounded(array, cell.case.dtype)

    return problem._replace(
        case=cell.case,
        params={name: fit(value) for name, value in problem.params.items()},
        x=fit(problem.x),
        state=tuple(fit(part) for part in problem.state),
        lengths=lengths,
        d_output=None if problem.d_output is None else fit(problem.d_output),
    )


def rounded(array: Host, dtype: str) -> Host:
    """Return float32 values rounded to what `dtype` can hold, halves to even."""
    if dtype == "float16":
        return array.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":  # the upper 16 bits of float32
        bits = array.view(np.uint32)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)
    return array


def expected(problem: Problem, rig: Rig) -> dict[str, Host]:
    """Return the right results: the reference's in float64, computed on the rig.

    `verify` has compared that with NumPy; on the host the large cells would take minutes each.
    """
    return ours.side_of(problem, "reference", rig.backend, "float64").compute()


def kernels_of(rig: Rig) -> tuple[str, ...]:
    """Return rnnkit's kernel modules on the rig, fastest first; the last, the reference, is level 0."""
    return ours.kernel_modules(rig.backend)


def peers_of(cell: Cell, rig: Rig) -> tuple[str, ...]:
    """Return the names of the peers that take part in a cell."""
    if rig.torch_device is None:
        return ()
    # Packing copies indices from the host, which no graph can repeat.
    return (EAGER, GRAPHED) if rig.graphs and not cell.ragged else (EAGER,)


def makers(cell: Cell, problem: Problem, rig: Rig) -> dict[str, Callable[[], Side]]:
    """Return what makes each side of a cell, by the side's name."""

    def eager() -> Side:
        where = peers.Where(rig.torch_device or "cpu", cell.case.dtype)
        return peers.side_of("torch", problem, 1, where)

    def own(kernel: str) -> Callable[[], Side]:
        return lambda: ours.side_of(problem, kernel, rig.backend)

    made = {ours.name_of(kernel): own(kernel) for kernel in kernels_of(rig)}
    theirs = {EAGER: eager, GRAPHED: lambda: rig.graphed(eager)}
    return made | {name: theirs[name] for name in peers_of(cell, rig)}
