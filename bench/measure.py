"""From cases to records: check every side, then time those that are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import ours, peers, timing
from .arguments import Setting, progress
from .cases import Case, Problem, flops_of, problem_of
from .correct import TOLERANCE, is_right, max_error
from .records import Record, finite, processor, versions
from .timing import Side, Times


def measure(cases: Sequence[Case], setting: Setting) -> Iterator[Record]:
    """Yield the records of the cases, one after the other.

    Parameters
    ----------
    cases : sequence of Case
    setting : Setting

    Yields
    ------
    dict
        See `bench.records`.
    """
    peers.load(setting.peers)
    machine = {"versions": versions(), "processor": processor()}
    bar = progress(cases)
    for case in bar:
        bar.set_description(str(case))
        problem = problem_of(case)
        expected = ours.expected(problem)
        for threads in setting.threads:
            with timing.threads(threads):
                for record in _measure(problem, expected, threads, setting):
                    yield {**record, **machine}


def _measure(problem: Problem, expected: dict[str, Any], threads: int, setting: Setting) -> Iterator[Record]:
    case, backend = problem.case, setting.backend
    refused = {kernel: ours.why_not(kernel, case, backend) for kernel in setting.kernels}
    serving = [kernel for kernel, reason in refused.items() if reason is None]
    kernels = [ours.side_of(problem, kernel, backend) for kernel in serving]
    others = [peers.side_of(peer, problem, threads) for peer in setting.peers if peers.takes_part(peer, case)]
    errors, failed = check([*kernels, *others], expected)
    busy = timing.busy_cores()
    right = [side for side in [*kernels, *others] if side.name not in failed]
    timed = [kernel for kernel in serving if ours.name_of(kernel) not in failed]
    times = _time(problem, timed, right, threads, setting)
    for kernel, reason in refused.items():
        own = ours.name_of(kernel)
        opponents: list[str | None] = [side.name for side in others]
        for peer in opponents or [None]:
            record = _record(problem, kernel, peer, threads, times, backend)
            record.update(max_error=finite(errors.get(own, float("inf"))), busy_cores=busy)
            if reason is not None:
                record.update(status="unsupported", reason=reason)
            elif own in failed:
                record.update(status="wrong", reason=failed[own])
            elif peer in failed:
                record.update(status="peer wrong", reason=failed[peer])
            yield record


def check(sides: Sequence[Side], expected: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return each side's error, and for those that are wrong in which way."""
    errors, failed = {}, {}
    for side in sides:
        try:
            errors[side.name] = max_error(side.compute(), expected)
        except Exception as error:  # a kernel or a peer may fail in any way; the other cases go on
            errors[side.name] = float("inf")
            failed[side.name] = f"{type(error).__name__}: {error}"
            continue
        if not is_right(errors[side.name]):
            failed[side.name] = f"{side.name}: error {errors[side.name]:.1e}, allowed {TOLERANCE:.0e}"
    return errors, failed


def _time(
    problem: Problem, kernels: Sequence[str], right: Sequence[Side], threads: int, setting: Setting
) -> dict[str, Times]:
    """Time all sides that are right, in the same turns as the ceiling; nothing where no kernel is."""
    if not kernels:
        return {}
    sides = [*right, timing.ceiling_side(problem.case.dtype)]
    if problem.case.operation == "ragged":
        sides += _padded(problem._replace(lengths=None), kernels, setting.backend)
    return timing.alternate(sides, setting.effort, settle=threads > 1)


def _padded(problem: Problem, kernels: Sequence[str], backend: str) -> list[Side]:
    """Return the sides of a ragged batch without its lengths, those that are right."""
    sides = [ours.side_of(problem, kernel, backend) for kernel in kernels]
    _, failed = check(sides, ours.expected(problem))
    return [side._replace(name=_padded_name(side.name)) for side in sides if side.name not in failed]


def _padded_name(side: str) -> str:
    return f"{side}, padded"


def _record(
    problem: Problem, kernel: str, peer: str | None, threads: int, times: dict[str, Times], backend: str
) -> Record:
    case, name = problem.case, ours.name_of(kernel)
    own, other, padded = times.get(name), times.get(peer or ""), times.get(_padded_name(name))
    rate = timing.ceiling_rate(times["ceiling"]) if times else None
    return {
        "backend": backend, "kernel": kernel, "default": ours.default_kernel(case, backend) == kernel,
        **case._asdict(), "density": problem.density, "threads": threads,
        "status": "ok", "reason": "", "max_error": None,
        "seconds": own and own.median, "spread": own and own.spread, "p99": own and own.p99,
        "padded_seconds": padded and padded.median,
        "peer": peer, "peer_seconds": other and other.median, "peer_spread": other and other.spread,
        "ratio": other.median / own.median if own and other else None,
        "ceiling": rate,
        "fraction_of_ceiling": flops_of(case, problem.density) / own.median / rate if own and rate else None,
    }  # fmt: skip
