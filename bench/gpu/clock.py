"""Clocks, and how sides are timed with one: alternately, in blocks that the device is never idle in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Protocol

from ..timing import Effort, Side

BLOCK_SECONDS = 0.02  # long against the start of an idle device
MOST_CALLS = 200  # of a block: the queue of a device takes about a thousand launches before it blocks


class Clock(Protocol):
    """What timing needs of a machine: marks in its stream of work, and the time between two of them."""

    def mark(self) -> Any:
        """Put a mark behind all work enqueued so far."""

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Return the time between two marks, both of which have been reached."""


class HostClock:
    """The clock of a machine that works at once: the processor's."""

    def mark(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


def alternate(sides: Sequence[Side], effort: Effort, clock: Clock) -> dict[str, list[float]]:
    """Return the seconds of each call of each side; the sides take turns.

    A mark stands between any two calls of a block, and nobody waits for them before the block's end: a side
    that keeps the device busy is timed by the device, one that cannot launch fast enough by its launches.

    Parameters
    ----------
    sides : sequence of Side
        With different names. They must have run before: this function warms caches, not compilers.
    effort : Effort
        When to stop.
    clock : Clock
    """
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    assert len(samples) == len(sides), f"sides must have different names, got {[s.name for s in sides]}"
    start, turns = time.perf_counter(), 0
    while turns < effort.rounds or time.perf_counter() - start < effort.seconds:
        for side in sides:
            samples[side.name] += _block(side, clock)
        turns += 1
    return samples


def _block(side: Side, clock: Clock) -> list[float]:
    with side.scope():
        (first,) = _times(side, clock, 1)
        if first > BLOCK_SECONDS:
            return [first]  # of a long call a cold start is a small part
        calls = min(MOST_CALLS, 1 + int(BLOCK_SECONDS / max(first, BLOCK_SECONDS / MOST_CALLS)))
        return _times(side, clock, calls)


def _times(side: Side, clock: Clock, calls: int) -> list[float]:
    clock.synchronize()
    marks = [clock.mark()]
    for _ in range(calls):
        side.call()
        marks.append(clock.mark())
    clock.synchronize()
    return [clock.seconds(start, stop) for start, stop in itertools.pairwise(marks)]
