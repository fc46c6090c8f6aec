"""Several threads on one tile, for a batch that is smaller than the number of threads.

A scan is cut into phases, one for each time step. Each member computes its share of the hidden units, and
all meet between two phases. Nobody waits for a thread that has not come yet: the leader, which is the
calling thread, begins alone, and when it opens a phase it counts in the helpers that have joined by then. A
thread of the pool needs 30 microseconds to wake up, 100 and more if its processor slept; a time step of
H=256 takes 20. A busy pool costs speed, no more.

`team` is an array of counters, each on a cache line of its own; it is empty for a leader without helpers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._atomic import FOREVER, add, read, wait, write
from ._pieces import compiled

# How many helpers have joined; the phase that is open and who shares it, in one word, or -1 at the end; how
# often helpers have finished a phase, and how often they should have.
JOINED, OPEN, ARRIVED, EXPECTED, _SIZE = 0, 8, 16, 24, 32
_MEMBERS = 1 << 16  # a word of OPEN is phase * _MEMBERS + members


def new_team() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the counters of a team."""
    return np.zeros(_SIZE, np.int64)


def dissolve(team: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Send the helpers away."""
    team[OPEN] = -1


@compiled
def enter(team: Any, leader: bool) -> int:
    """Join, and return the own number: 0 for the leader."""
    return 0 if leader else add(team, JOINED, 1) + 1


@compiled
def next_phase(team: Any, me: int, phase: int, last: int) -> Any:
    """Finish a phase, 0 at first; return the next one and how many members share it.

    A phase above `last` means that all is done, for the leader that all members are.
    """
    if team.size == 0:
        return phase + 1, 1
    if me == 0:
        wait(team, ARRIVED, team[EXPECTED], FOREVER)
        phase += 1
        members = read(team, JOINED) + 1 if phase <= last else 1
        if members > 1:
            team[EXPECTED] += members - 1
            write(team, OPEN, phase * _MEMBERS + members)
        return phase, members
    if phase > 0:
        add(team, ARRIVED, 1)
    while True:
        word = wait(team, OPEN, (phase + 1) * _MEMBERS, FOREVER)
        if word < 0:
            return last + 1, 1
        phase = word // _MEMBERS
        if me < word % _MEMBERS:
            return phase, word % _MEMBERS
