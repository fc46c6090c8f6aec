"""From cells to records: check every side, then time those that are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import ours
from ..cases import CELLS, Case, Problem
from ..correct import is_right, max_error
from ..records import Record, finite
from ..timing import Effort, Side, Times, summarise
from .clock import alternate
from .plan import OPERATIONS, Cell, special
from .rig import Rig
from .sides import (
    EAGER,
    GRAPHED,
    TOLERANCE,
    WHOLE,
    expected,
    kernels_of,
    makers,
    model_of,
    peers_of,
    problem_of,
    side_of,
    why_not,
)

# (T, B, I, H), layers and directions of what is verified: a multiple of 8, sizes that fill no block, a single
# one of everything. The others are for whole sequences in one launch: several groups, each of several blocks;
# both directions at once, in one block and in several; streamed weights; several launches.
VERIFIED = (
    ((9, 5, 17, 24), 1, 1), ((4, 3, 2, 33), 1, 1), ((1, 1, 1, 1), 1, 1), ((5, 70, 3, 264), 1, 1),
    ((4, 9, 5, 40), 2, 2), ((3, 9, 5, 264), 1, 2), ((3, 9, 5, 1800), 1, 1), ((3, 600, 5, 200), 1, 2),
)  # fmt: skip
# The reference in float64 on another machine differs by rounding alone.
VERIFIED_TOLERANCE = {"float64": 1e-12} | {
    name: TOLERANCE[name] for name in ("float32", "float16", "bfloat16")
}


class Checked(NamedTuple):
    """What became of the sides of a cell, by name.

    Attributes
    ----------
    right : dict of str to Side
        Those that may be timed.
    errors : dict of str to float
        Of all that ran.
    faults : dict of str to (str, str)
        Status and reason of all others.
    """

    right: dict[str, Side]
    errors: dict[str, float]
    faults: dict[str, tuple[str, str]]


def verify(rig: Rig) -> list[str]:
    """Return what is wrong on this machine with small problems of every kind, a line each.

    The measure is NumPy's float64: `measure` trusts the rig's own reference, which is checked here.
    """
    wrong = []
    for kind, operation, ragged, verified in itertools.product(CELLS, OPERATIONS, (False, True), VERIFIED):
        shape, layers, directions = verified
        cell = Cell(Case(operation, kind, *shape), False, ragged, layers, directions)
        problem = problem_of(cell)
        right = ours.expected(problem)
        for kernel, dtype in itertools.product(kernels_of(rig), VERIFIED_TOLERANCE):
            if (fault := _fault(problem, kernel, rig, dtype, right)) is not None:
                more = special(ragged, layers, directions)
                wrong.append(f"{problem.case}{more}, {kernel}, {dtype}: {fault}")
    return wrong


def _fault(problem: Problem, kernel: str, rig: Rig, dtype: str, right: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a kernel; nothing where it does not serve the case."""
    if why_not(kernel, problem.case._replace(dtype=dtype), rig, problem.directions) is not None:
        return None
    try:
        side = side_of(problem, kernel, rig, dtype)
    except TypeError:  # the backend has no such dtype
        return None
    try:
        error = max_error(side.compute(), right)
    except Exception as exception:  # whatever it is, the others are still worth a look
        return _message(exception)
    tolerance = VERIFIED_TOLERANCE[dtype]
    return None if is_right(error, tolerance) else f"error {error:.1e}, allowed {tolerance:.0e}"


def measure(stage: str, cell: Cell, rig: Rig, effort: Effort) -> list[Record]:
    """Return the records of a cell: one for each kernel against each form of the peer.

    Raises
    ------
    Exception
        The reference could not be computed, or a side failed while it was timed.
    """
    with rig.precision(cell.tf32):
        problem = problem_of(cell)
        checked = check(cell, problem, rig)
        rig.free()
        samples = alternate(list(checked.right.values()), effort, rig.clock)
    return [
        _record(stage, cell, problem.density, kernel, peer, checked, samples, rig)
        for kernel in kernels_of(rig)
        for peer in peers_of(cell, rig) or (None,)
    ]


def failure(stage: str, cell: Cell, rig: Rig, error: Exception) -> list[Record]:
    """Return the records of a cell that could not be measured at all."""
    nothing = Checked({}, {}, {ours.name_of(name): ("failed", _message(error)) for name in kernels_of(rig)})
    return [_record(stage, cell, 1.0, kernel, None, nothing, {}, rig) for kernel in kernels_of(rig)]


def check(cell: Cell, problem: Problem, rig: Rig) -> Checked:
    """Make all sides of a cell and compare each with the reference in float64."""
    wanted, tolerance = expected(problem, rig), TOLERANCE[cell.precision]
    rig.free()  # of float64, more than any side will need
    checked = Checked({}, {}, {})
    refused = {ours.name_of(name): why_not(name, cell.case, rig, cell.directions) for name in kernels_of(rig)}
    for name, make in makers(cell, problem, rig).items():
        if (reason := refused.get(name)) is not None:
            checked.faults[name] = ("unsupported", reason)
            continue
        _check_one(name, make, wanted, tolerance, checked)
    return checked


def _check_one(
    name: str, make: Callable[[], Side], wanted: dict[str, Any], tolerance: float, checked: Checked
) -> None:
    try:
        side = make()
    except TypeError as error:  # rnnkit's word for a dtype that the backend does not have
        checked.faults[name] = ("unsupported", _message(error))
        return
    except Exception as error:  # a peer or its capture may fail in any way; the others go on
        checked.faults[name] = ("failed", _message(error))
        return
    try:
        checked.errors[name] = off = max_error(side.compute(), wanted)
    except Exception as error:
        checked.faults[name] = ("failed", _message(error))
        return
    if is_right(off, tolerance):
        checked.right[name] = side
    else:
        checked.faults[name] = ("wrong", f"error {off:.1e}, allowed {tolerance:.0e}")


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _record(
    stage: str, cell: Cell, density: float, kernel: str, peer: str | None, checked: Checked,
    samples: Mapping[str, Sequence[float]], rig: Rig,
) -> Record:  # fmt: skip
    name, kernels = ours.name_of(kernel), kernels_of(rig)
    own, other = _summary(samples.get(name)), _summary(samples.get(peer or ""))
    status, reason = checked.faults.get(name, ("ok", ""))
    if status == "ok" and peer in checked.faults:
        status, reason = "peer wrong", ": ".join(checked.faults[peer])
    case = cell.case
    return {
        "stage": stage, "backend": rig.backend, "kernel": kernel,
        "level": len(kernels) - 1 - kernels.index(kernel),
        "default": ours.default_kernel(case, rig.backend) == kernel,
        **case._asdict(), "tf32": cell.tf32, "ragged": cell.ragged, "layers": cell.layers,
        "directions": cell.directions, "density": density,
        "status": status, "reason": reason, "max_error": _known(checked.errors.get(name)),
        "seconds": own and own[0].median, "least": own and own[1], "spread": own and own[0].spread,
        "peer": peer and EAGER, "graphed": peer == GRAPHED,
        "peer_seconds": other and other[0].median, "peer_least": other and other[1],
        "peer_spread": other and other[0].spread, "peer_error": _known(checked.errors.get(peer or "")),
        "ratio": other[0].median / own[0].median if own and other else None,
        "model": model_of(case, rig, cell.directions) if kernel == WHOLE and own else {},
        **rig.facts,
    }  # fmt: skip


def _summary(samples: Sequence[float] | None) -> tuple[Times, float] | None:
    return None if samples is None else (summarise(samples), float(np.min(samples)))


def _known(error: float | None) -> float | None:
    return None if error is None else finite(error)
