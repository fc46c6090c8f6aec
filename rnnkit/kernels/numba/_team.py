"""Several threads on one tile, for a batch that is smaller than the number of threads.

Each member computes its share of the hidden units, and all meet once a step. Who is a member is settled
when the scan begins: the leader waits a moment for helpers, then closes the door; who comes later goes
away again. So nobody ever waits for a thread that has not begun, and a busy pool costs speed, no more.

`team` is an array of counters, each on a cache line of its own; it is empty for a leader without helpers.
"""

from __future__ import annotations

import os
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._pieces import compiled

JOINED, MEMBERS, ARRIVED, WANTED, LINES = 0, 8, 16, 24, 32
POSSIBLE = os.name == "posix"  # elsewhere there is no sched_yield to link with
_CLOSED = 1 << 32  # added to JOINED: whoever joins now sees that it is too late
_SPINS = 4000  # looks at a counter before the processor is offered to other threads
_PATIENCE = 5  # such offers before the leader begins with the helpers that are there


def new_team(wanted: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the counters of a team with up to that many helpers."""
    team = np.zeros(LINES, np.int64)
    team[WANTED] = wanted
    return team


def dissolve(team: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Send helpers away whose leader will not come."""
    team[MEMBERS] = -1


def _counter(context: Any, builder: Any, kind: Any, team: Any, at: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, team).data, [at])


@intrinsic  # type: ignore[untyped-decorator]
def _add(typing: Any, team: Any, at: Any, value: Any) -> Any:
    """Add to a counter, as one indivisible act; return what it was before."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        counter = _counter(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", counter, args[2], "seq_cst")

    return types.int64(team, types.int64, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def _read(typing: Any, team: Any, at: Any) -> Any:
    """Return a counter, and with it see what its writers wrote before."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_counter(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(team, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def _yield_processor(typing: Any) -> Any:
    """Let other threads run: POSIX sched_yield."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), lower


@compiled  # type: ignore[untyped-decorator]
def _wait(team: Any, at: int, least: int, patience: int) -> None:
    """Wait until a counter is at least that high or negative, or until patience ends; 0 has no end."""
    offers = 0
    while True:
        for _ in range(_SPINS):
            value = _read(team, at)
            if value >= least or value < 0:
                return
        _yield_processor()
        offers += 1
        if offers == patience:
            return


@compiled  # type: ignore[untyped-decorator]
def join(team: Any, leader: bool) -> Any:
    """Return the own number and the number of members; both are negative if there is nothing to do."""
    if team.size == 0:
        return 0, 1
    if leader:
        _wait(team, JOINED, team[WANTED], _PATIENCE)
        members = _add(team, JOINED, _CLOSED) + 1
        _add(team, MEMBERS, members)
        return 0, members
    me = _add(team, JOINED, 1) + 1
    if me >= _CLOSED:
        return -1, -1
    _wait(team, MEMBERS, 1, 0)
    members = _read(team, MEMBERS)
    return (me, members) if members > 0 else (-1, -1)


@compiled  # type: ignore[untyped-decorator]
def meet(team: Any, members: int, step: int) -> None:
    """Wait until all members have finished this step."""
    if members > 1:
        _add(team, ARRIVED, 1)
        _wait(team, ARRIVED, members * (step + 1), 0)
