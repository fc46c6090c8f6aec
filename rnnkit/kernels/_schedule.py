"""Which sequences of a batch take part in which time step, for kernels that work on the host.

Sequences of different lengths are sorted once, the longest first. Then those that have a step t are the
first rows of the batch, arrays can be cut with a plain slice, and a scan costs as much as there are tokens.

States are kept in arrays of T + 1 slots, where a forward scan starts from slot 0 and a reverse one from
slot T: the state before and the state after a step are neighbours, and no direction needs its own loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .._typing import Array

# Numbers that a block of time steps may hold: 128 KB of float32, which leave room in a second-level cache
# of 512 KB for what is computed from them.
_BLOCK = 1 << 15


class Run(NamedTuple):
    """Consecutive time steps with the same sequences, in the order of the scan.

    Attributes
    ----------
    size, live : int
        How many steps and how many sequences there are. The sequences are the first rows.
    steps : slice
        Of arrays (T, ...).
    before, after : slice
        Of arrays (T + 1, ...): the states that the steps begin and end with.
    entering : slice
        The rows that begin here, from the initial state, in the first slot of `before`.
    """

    size: int
    live: int
    steps: slice
    before: slice
    after: slice
    entering: slice


class Schedule(NamedTuple):
    """The order of a batch and of a scan.

    Attributes
    ----------
    T : int
        Time steps.
    order : int array (B,) or None
        The sequences, longest first; None if they are sorted already.
    lengths : int array (B,) or None
        In that order; None if all sequences have T steps.
    stretches : list of (start, stop, count)
        The time steps with the same number of sequences, in the order of the scan. Those without any
        sequence are left out.
    reverse : bool
        Whether the scan goes from the last step to the first.
    """

    T: int
    order: Array | None
    lengths: Array | None
    stretches: list[tuple[int, int, int]]
    reverse: bool

    @classmethod
    def of(cls, T: int, B: int, lengths: Array | None, reverse: bool) -> Schedule:
        """Return the schedule of B sequences in T time steps."""
        if lengths is None:
            return cls(T, None, None, [(0, T, B)], reverse)
        order = None
        if np.any(lengths[1:] > lengths[:-1]):
            order = np.argsort(-lengths, kind="stable")
            lengths = lengths[order]
        stretches, start = [], 0
        for stop in np.unique(lengths).tolist():
            if stop > 0:
                stretches.append((start, stop, int(np.count_nonzero(lengths >= stop))))
                start = stop
        return cls(T, order, lengths, stretches[::-1] if reverse else stretches, reverse)

    def runs(self, width: int = 0) -> list[Run]:
        """Return the runs of the scan; given a `width`, so short that width numbers a row fit a cache."""
        runs, previous = [], 0
        for start, stop, count in self.stretches:
            size = max(1, _BLOCK // max(1, count * width)) if width else stop - start
            pieces = [(at, min(at + size, stop)) for at in range(start, stop, size)]
            for first, end in reversed(pieces) if self.reverse else pieces:
                entering = slice(previous, count)
                if self.reverse:
                    steps = after = slice(end - 1, first - 1 if first else None, -1)
                    before = slice(end, first, -1)
                else:
                    steps = before = slice(first, end)
                    after = slice(first + 1, end + 1)
                runs.append(Run(end - first, count, steps, before, after, entering))
                previous = count
        return runs

    def rows(self, count: int) -> Any:
        """Return the index of the first `count` sorted sequences in the unsorted batch."""
        return slice(0, count) if self.order is None else self.order[:count]

    def sort(self, state: Array) -> Array:
        """Return the rows of a state (B, N) in sorted order; the array itself if nothing moves."""
        return state if self.order is None else state[self.order]

    def unsort(self, state: Array) -> Array:
        """Return the rows of a state (B, N) in the order of the batch; the array itself if nothing moves."""
        if self.order is None:
            return state
        result = np.empty_like(state)
        result[self.order] = state
        return result

    def sort_steps(self, sequence: Array, out: Array | None = None) -> Array:
        """Bring the rows of all time steps (T, B, N) in sorted order, into `out` or in place."""
        if self.order is None:
            return sequence
        out = sequence if out is None else out
        for run in self.runs(sequence.shape[2]):
            out[run.steps, : run.live] = sequence[run.steps, self.order[: run.live]]
        return out

    def unsort_steps(self, sequence: Array, out: Array | None = None) -> Array:
        """Bring the rows of all time steps back in the order of the batch, with zeros in the padding."""
        if self.lengths is None:
            return sequence
        if out is None:
            out = sequence
        if not self.stretches:
            out[...] = 0
            return out
        for run in self.runs(sequence.shape[2]):
            # NumPy sees where the two sides of an assignment overlap, and copies what it must.
            out[run.steps, self.rows(run.live)] = sequence[run.steps, : run.live]
            padding = slice(run.live, None)
            out[run.steps, padding if self.order is None else self.order[padding]] = 0
        out[int(self.lengths[0]) :] = 0
        return out

    def final(self, states: Array, initial: Array) -> Array:
        """Return the state after each sequence's last step: of states (T + 1, B, N), else of initial (B, N).

        `states` are in sorted order; `initial` and the result in that of the batch.
        """
        if self.lengths is None:
            return states[0 if self.reverse else self.T].copy()
        result = initial.copy()
        count = int(np.count_nonzero(self.lengths))
        last = 0 if self.reverse else self.lengths[:count]
        result[self.rows(count)] = states[last, np.arange(count)]
        return result


def enter(states: Array, initial: Array, run: Run) -> None:
    """Put the initial state of the sequences that begin with this run in front of it."""
    states[run.before.start, run.entering] = initial[run.entering]


def cut(run: Run, states: Array) -> tuple[Array, Array]:
    """Return the states (S, n, N) before and after each step of the run."""
    return states[run.before, : run.live], states[run.after, : run.live]


def after(states: Array, reverse: bool) -> Array:
    """Return the states (T, B, N) after each step."""
    return states[:-1] if reverse else states[1:]


def output(states: Array, schedule: Schedule) -> Array:
    """Return the states after each step as the layer's output."""
    return states if schedule.lengths is None else schedule.unsort_steps(states, np.empty_like(states))


def sorted_copy(d_output: Array, schedule: Schedule) -> Array:
    """Return d_output (T, B, N) in sorted order, a copy if anything moves."""
    return d_output if schedule.order is None else schedule.sort_steps(d_output, np.empty_like(d_output))


def scratch(parts: int, runs: list[Run], state: Array) -> Array:
    """Allocate `parts` buffers that hold one state a step for the largest run."""
    rows = max((run.size * run.live for run in runs), default=0)
    return np.empty((parts, rows, state.shape[1]), state.dtype)


def cut_scratch(work: Array, run: Run) -> Array:
    """Return the buffers as (parts, S, n, N)."""
    parts, _, N = work.shape
    return work[:, : run.size * run.live].reshape(parts, run.size, run.live, N)


def backwards(*sequences: Array) -> Iterable[tuple[Array, ...]]:
    """Iterate over the time steps of all sequences, the last one of the scan first."""
    return zip(*(sequence[::-1] for sequence in sequences), strict=True)
