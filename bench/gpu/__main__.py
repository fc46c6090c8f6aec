"""Run ``python -m bench.gpu --help``.

Exit status: 0; 1 when a result was wrong, or there is no GPU; 2 for a wrong argument; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rnnkit._array import BackendUnavailableError

from .. import arguments
from . import measure, soak, tables
from .plan import Cell, plan
from .rig import Gpu, Rig
from .session import Session
from .sides import WHOLE


def main(argv: Sequence[str] | None = None) -> int:
    """Verify, measure, print short tables, and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="bench.gpu", allow_abbrev=False,
        description="Time rnnkit on a GPU beside torch.nn, eager and as a CUDA graph; what matters first.",
    )  # fmt: skip
    parser.add_argument("--minutes", type=_minutes, metavar="N", help="stop then; the same command goes on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where limits.json and gpu.json are written")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop; needs no GPU")
    parser.add_argument(
        "--verify", action="store_true", help="check small problems and stop; for compute-sanitizer"
    )
    parser.add_argument(
        "--soak", type=_count, metavar="N",
        help="compute random problems N times, whole sequences in one launch, beside other work, and stop",
    )  # fmt: skip
    given = parser.parse_args(argv)
    if given.dry_run:
        return dry_run()
    alone = given.verify or given.soak is not None
    if not alone and (given.minutes is None or given.out is None):
        parser.error("--minutes and --out are needed, but for --dry-run, --verify and --soak")
    if not alone and given.out.exists() and not given.out.is_dir():
        parser.error(f"--out {given.out} is no directory")
    try:
        rig = Gpu()
        if given.verify:
            return verify(rig)
        if given.soak is not None:
            return soaked(rig, given.soak)
        session = Session(given.out, rig, arguments.command_of("gpu", argv))
        return run(session, list(plan()), 60.0 * given.minutes)
    except ValueError as error:
        parser.error(str(error))
    except (BackendUnavailableError, RuntimeError) as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench.gpu: stopped; the same command goes on", file=sys.stderr)
        return 130


def dry_run() -> int:
    """Print the plan and return the exit status."""
    try:
        print(shown(list(plan())), flush=True)
    except BrokenPipeError:  # `--dry-run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def verify(rig: Rig) -> int:
    """Check the kernels on small problems, say what came out, and return the exit status."""
    with rig.without_pool():
        wrong = measure.verify(rig)
    print(f"Wrong on small problems:\n\n{_first(wrong)}" if wrong else "All kernels are right.")
    return int(bool(wrong))


def soaked(rig: Rig, count: int) -> int:
    """Compute random problems again and again, say what came out, and return the exit status."""
    seed = int(os.environ.get("RNNKIT_TEST_SEED") or np.random.default_rng().integers(1 << 30))
    print(f"RNNKIT_TEST_SEED={seed} repeats this.", flush=True)
    wrong = soak.soak(rig, count, seed)
    print(f"Wrong:\n\n{_first(wrong)}" if wrong else f"{count} times right, and always the same bits.")
    return int(bool(wrong))


def run(session: Session, cells: Sequence[tuple[str, Cell]], seconds: float) -> int:
    """Verify the kernels, measure what is not there yet, print, and return the exit status."""
    deadline = time.monotonic() + seconds
    if verify(session.rig):
        return 1
    session.measure_limits()
    left = session.measure_cells(cells, deadline)
    print(outcome(session, left))
    return int(any(record["status"] == "wrong" for record in session.cells))


def outcome(session: Session, left: int) -> str:
    """Return what a run ends with: short, since the end of an output is what is kept of it."""
    parts = [tables.conditions(session.limits), tables.limits(session.limits)]
    if session.cells:
        parts.append(tables.summary(session.cells))
        parts += [text for text in [tables.models(session.cells)] if text]
        trouble = tables.problems(session.cells).splitlines()
        parts += [f"Not timed:\n\n{_first(trouble)}"] if trouble else []
    parts.append(f"{left} cells of the plan are left. All times: python -m bench.report DIR/gpu.json")
    return "\n\n".join(parts)


def _first(lines: Sequence[str], most: int = 20) -> str:
    """Return the first lines and how many more there are: one fault may show in all that comes after it."""
    return "\n".join([*lines[:most], *([f"- and {len(lines) - most} more"] if len(lines) > most else [])])


def shown(cells: Sequence[tuple[str, Cell]]) -> str:
    """Return the plan, a line for each question; cells of all but the last in full."""
    lines = [
        f"{len(cells)} cells, in this order, as far as the minutes go; of rnnkit in each of them:",
        f"  {WHOLE} (RNNKIT_PERSISTENT=1), where a plan fits the device, beside its model of a step's time",
        "  cuda, step by step: two launches a step",
        "  reference",
    ]
    for title, group in itertools.groupby(cells, key=lambda pair: pair[0]):
        members = [str(cell) for _, cell in group]
        lines.append(f"\n{title}: {len(members)}")
        most = 40  # the grid as a whole has thousands
        lines += [f"  {name}" for name in (members if len(members) <= most else members[:3])]
        lines += [f"  ... up to {members[-1]}"] * (len(members) > most)
    return "\n".join(lines)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
