"""The contestants of a cell: rnnkit's kernels by levels, and torch.nn eager and as a graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from rnnkit.kernels import Case as KernelCase

from .. import cases, ours, peers
from ..cases import Host, Problem
from ..correct import TOLERANCE as FLOAT32_TOLERANCE
from ..timing import Side, environment
from .plan import Cell
from .rig import Rig

# What a side's error may be before its time counts, measured like `correct.TOLERANCE`. For half precision a
# few times what torch's own layers reach on a CPU, where they keep sums in half precision too: a test
# compares. TF32 rounds operands to as many bits as float16.
TOLERANCE = {"float32": FLOAT32_TOLERANCE, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 1e-1}

# The same for rnnkit alone, which keeps sums in float32: about twice the reference's error.
HALF = {"float16": 1.2e-3, "bfloat16": 1.2e-2}

EAGER, GRAPHED = "torch", "torch, graphed"

# The module `cuda` with whole sequences in one launch; "cuda" alone goes step by step.
WHOLE = "cuda, whole sequences"


def problem_of(cell: Cell) -> Problem:
    """Return a cell's data as float32 on the host, with values that the cell's dtype has exactly."""
    problem = cases.problem_of(cell.case._replace(dtype="float32"), cell.layers, cell.directions)
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
    return side_of(problem, "reference", rig, "float64").compute()


def kernels_of(rig: Rig) -> tuple[str, ...]:
    """Return rnnkit's kernels on the rig, fastest first; the last, the reference, is level 0."""
    modules = ours.kernel_modules(rig.backend)
    return (WHOLE, *modules) if "cuda" in modules else modules


def module_of(kernel: str) -> str:
    """Return the kernel module that a kernel of `kernels_of` is in."""
    return "cuda" if kernel == WHOLE else kernel


def side_of(problem: Problem, kernel: str, rig: Rig, dtype: str | None = None) -> Side:
    """Return rnnkit's side with one of `kernels_of`; the dtype is by default the case's."""
    side = ours.side_of(problem, module_of(kernel), rig.backend, dtype)
    return side._replace(name=ours.name_of(kernel), scope=scope_of(kernel, side.scope))


def scope_of(
    kernel: str, scope: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], AbstractContextManager[Any]]:
    """Return the scope of a kernel's calls, within that of its module's."""

    @contextmanager
    def both() -> Iterator[None]:
        with scope(), environment(RNNKIT_PERSISTENT=str(int(kernel == WHOLE))):
            yield

    return both


def why_not(kernel: str, case: cases.Case, rig: Rig, directions: int = 1) -> str | None:
    """Say why a kernel cannot serve a case, or None; whole sequences serve it if they serve one way."""
    reason = ours.why_not(module_of(kernel), case, rig.backend)
    if reason is not None or kernel != WHOLE:
        return reason
    layouts = _of_scans("whole_sequence", case, rig, directions)
    if any(not isinstance(layout, str) for layout in layouts.values()):
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in layouts.items())


def model_of(case: cases.Case, rig: Rig, directions: int = 1) -> dict[str, dict[str, float]]:
    """Return the estimated seconds of the parts of a step, by the kernel's name; none of one step by step."""
    return _of_scans("step_times", case, rig, directions)


def _of_scans(what: str, case: cases.Case, rig: Rig, directions: int) -> dict[str, Any]:
    """Return what a function of the module `cuda` says of each scan of a case."""
    ask = getattr(importlib.import_module("rnnkit.kernels.cuda"), what)
    own = KernelCase(case.cell, case.dtype, case.H, device=rig.backend)
    ways = ("forward", "backward") if case.operation == "train" else ("forward",)
    names = [f"{case.cell}_{way}" for way in ways]
    return {name: ask(name, own, case.B, directions) for name in names}


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
        return lambda: side_of(problem, kernel, rig)

    made = {ours.name_of(kernel): own(kernel) for kernel in kernels_of(rig)}
    theirs = {EAGER: eager, GRAPHED: lambda: rig.graphed(eager)}
    return made | {name: theirs[name] for name in peers_of(cell, rig)}
