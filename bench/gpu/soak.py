"""Whole sequences in one launch, many times over: no hang, no difference, and other work beside them.

Their blocks wait for each other, which one run in a thousand may get wrong: an order of stores that a chip
seldom takes, a competing kernel that delays a block. So problems of random shapes are computed step by step
once, then in one launch again and again, while another stream is kept busy; every result must have the same
bits as the first one, and that must agree with the one of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import rnnkit

from .. import ours
from ..arguments import progress
from ..cases import Case, Host
from ..correct import max_error
from ..timing import environment
from .plan import PRECISIONS
from .rig import Rig
from .sides import TOLERANCE, WHOLE, module_of, why_not

REPEATS = 10  # of each problem; there and back that are twenty launches, of two directions forty
MOST_T, MOST_B, MOST_H = 48, 700, 2200  # what goes step by step is passed over


class Draw(NamedTuple):
    """A random problem: a layer's cell and sizes, whether it has two directions, and its batch."""

    cell: str
    precision: str
    T: int
    B: int
    H: int
    bidirectional: bool
    ragged: bool
    seed: int

    @property
    def dtype(self) -> str:
        """Of the parameters."""
        return "float32" if self.precision == "tf32" else self.precision


def draw(random: np.random.Generator) -> Draw:
    """Return a random problem; small sizes as likely as large ones."""

    def size(most: int) -> int:
        return int(np.exp(random.uniform(0.0, np.log(most + 0.9))))

    return Draw(
        str(random.choice(list(ours.LAYERS))), str(random.choice(PRECISIONS)), 1 + size(MOST_T), size(MOST_B),
        size(MOST_H), bool(random.integers(2)), bool(random.integers(2)), int(random.integers(1 << 30)),
    )  # fmt: skip


def computation(problem: Draw, rig: Rig) -> Callable[[str], dict[str, Host]]:
    """Return what computes a problem there and back with a kernel and returns all results on the host."""
    random = np.random.default_rng(problem.seed)
    T, B, H = problem.T, problem.B, problem.H
    layer: Any = ours.LAYERS[problem.cell](
        5, H, bidirectional=problem.bidirectional, backend=rig.backend, dtype=problem.dtype, seed=problem.seed
    )
    width = 2 * H if problem.bidirectional else H
    x, d_output = (layer.asarray(random.standard_normal((T, B, size))) for size in (5, width))
    lengths = layer.asarray(random.integers(0, T + 1, B)) if problem.ragged else None

    def compute(kernel: str) -> dict[str, Host]:
        names = ours.allowed(module_of(kernel), rig.backend)
        with environment(RNNKIT_KERNELS=names, RNNKIT_PERSISTENT=str(int(kernel == WHOLE))):
            (output, state), pullback = layer.vjp(x, lengths=lengths)
            grads = pullback(d_output)
        states = state if isinstance(state, tuple) else (state,)
        found = {"output": output, **{f"state {k}": part for k, part in enumerate(states)}}
        found |= {"d_x": grads.x, "d_params": grads.params.flat}
        return {name: rnnkit.to_numpy(value) for name, value in found.items()}

    return compute


def fault_of(problem: Draw, rig: Rig, kernel: str, against: str, repeats: int) -> str | None:
    """Return what is wrong with a kernel on a problem that it computes several times."""
    compute = computation(problem, rig)
    expected = compute(against)
    first: dict[str, Host] = {}
    for k in range(repeats):
        with rig.busy():
            found = compute(kernel)
        if k == 0:
            first, error = found, max_error(found, expected)
            if not error <= TOLERANCE[problem.precision]:
                return f"error {error:.1e} against {against}"
        different = [name for name in first if not np.array_equal(first[name], found[name], equal_nan=True)]
        if different:
            return f"{', '.join(different)} differ in repetition {k}"
    return None


def soak(rig: Rig, count: int, seed: int, kernel: str = WHOLE, against: str = "cuda") -> list[str]:
    """Return what was wrong, a line each, after at least `count` computations there and back.

    Raises
    ------
    RuntimeError
        A kernel gave up waiting, or the device does not answer any more.
    """
    random, wrong = np.random.default_rng(seed), []
    for _ in progress(range(-(-count // REPEATS))):
        problem = draw(random)
        while not _serves(problem, rig, kernel):
            problem = draw(random)
        with rig.precision(problem.precision == "tf32"):
            fault = fault_of(problem, rig, kernel, against, REPEATS)
        if fault is not None:
            wrong.append(f"- {problem}: {fault}")
    return wrong


def _serves(problem: Draw, rig: Rig, kernel: str) -> bool:
    """Whether at least one way of a problem is one launch."""
    if kernel != WHOLE:
        return True
    case = Case("train", problem.cell, problem.T, problem.B, 5, problem.H, problem.dtype)
    with rig.precision(problem.precision == "tf32"):
        return why_not(kernel, case, rig, 2 if problem.bidirectional else 1) is None
