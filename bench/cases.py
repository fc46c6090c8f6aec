"""What is measured: the grid of shapes, the operations, and the data of each case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Host = np.ndarray[Any, Any]
Shape = tuple[int, int, int, int]  # T, B, I, H

CELLS = ("lstm", "gru", "rnn")
OPERATIONS = ("forward", "train", "step", "ragged", "lm")
GATES = {"lstm": 4, "gru": 3, "rnn": 1}

# (T, B, I, H): from one small sequence to where the matrix products are all that counts.
SHAPES = (
    (20, 1, 4, 50),
    (100, 1, 64, 64),
    (100, 1, 256, 256),
    (100, 1, 1024, 1024),
    (100, 8, 128, 128),
    (100, 32, 128, 128),
    (100, 64, 256, 256),
    (50, 64, 512, 512),
    (50, 256, 256, 256),
    (20, 64, 1024, 1024),
)
STEP_SHAPES = ((1, 1, 64, 64), (1, 1, 256, 256), (1, 32, 128, 128))
LM_SHAPES = ((100, 32, 256, 256), (64, 32, 512, 512))
VOCABULARY = 65  # of a language model: the characters of a plain text

QUICK_SHAPES = ((20, 1, 4, 50), (100, 1, 64, 64), (100, 32, 128, 128))
QUICK_STEP_SHAPES = STEP_SHAPES[:1]
QUICK_LM_SHAPES = LM_SHAPES[:1]


class Case(NamedTuple):
    """One thing to measure.

    Attributes
    ----------
    operation : str
        "forward": inference over a whole sequence; "train": forward and backward, down to x and all
        parameters; "step": one time step, streaming; "ragged": "forward" with lengths; "lm": one
        training step of embedding, layer, linear, cross-entropy and Adam.
    cell : str
        "lstm", "gru" or "rnn".
    T, B, I, H : int
        Time steps, batch, input size (of "lm" the embedding's) and hidden size.
    dtype : str
        Of x and the parameters.
    """

    operation: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.operation} {self.cell} ({self.T}, {self.B}, {self.I}, {self.H})"


class Problem(NamedTuple):
    """The data of a case, on the host; both sides get the same.

    Attributes
    ----------
    params : dict of str to array
        With torch's names; of "lm" below ``embedding.``, ``rnn.`` and ``linear.``.
    x : array (T, B, I), or tokens (T, B)
    state : tuple of arrays (L*D, B, H)
        h_0, and c_0 of an LSTM. Not zero: zeros would hide a side that ignores them.
    lengths : array (B,) of integers, or None
    d_output : array (T, B, D*H), or None
        What the backward pass starts from.
    targets : tokens (T, B), or None
    layers, directions : int
        L and D: 1 but on a GPU.
    """

    case: Case
    params: dict[str, Host]
    x: Host
    state: tuple[Host, ...]
    lengths: Host | None = None
    d_output: Host | None = None
    targets: Host | None = None
    layers: int = 1
    directions: int = 1

    @property
    def density(self) -> float:
        """The share of the T*B time steps that count."""
        if self.lengths is None:
            return 1.0
        return float(self.lengths.sum()) / (self.case.T * self.case.B)


def grid(operations: Sequence[str], cells: Sequence[str], *, quick: bool = False) -> list[Case]:
    """Return the cases of these operations and cells, in the order given."""
    usual: tuple[Shape, ...] = QUICK_SHAPES if quick else SHAPES
    shapes = dict.fromkeys(OPERATIONS, usual)
    shapes["step"] = QUICK_STEP_SHAPES if quick else STEP_SHAPES
    shapes["lm"] = QUICK_LM_SHAPES if quick else LM_SHAPES
    shapes["ragged"] = tuple(shape for shape in shapes["ragged"] if shape[1] >= 8)
    return [
        Case(operation, cell, *shape)
        for operation in operations
        for cell in cells
        for shape in shapes[operation]
        if operation != "lm" or cell == "lstm"
    ]


def problem_of(case: Case, layers: int = 1, directions: int = 1) -> Problem:
    """Return the data of a case: always the same, whatever else is measured."""
    random = np.random.default_rng(2024)
    T, B, I, H = case.T, case.B, case.I, case.H

    def normal(*shape: int) -> Host:
        return random.standard_normal(shape).astype(case.dtype)

    def uniform(bound: float, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Host]:
        return {name: random.uniform(-bound, bound, shape).astype(case.dtype) for name, shape in shapes}

    G, D = GATES[case.cell], directions
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for k in range(layers):
        for suffix in (f"_l{k}", f"_l{k}_reverse")[:D]:
            shapes += [
                (f"weight_ih{suffix}", (G * H, D * H if k else I)), (f"weight_hh{suffix}", (G * H, H)),
                (f"bias_ih{suffix}", (G * H,)), (f"bias_hh{suffix}", (G * H,)),
            ]  # fmt: skip
    layer = uniform(1.0 / math.sqrt(H), shapes)
    state = tuple(0.5 * normal(layers * D, B, H) for _ in range(2 if case.cell == "lstm" else 1))
    if case.operation == "lm":
        params = {"embedding.weight": normal(VOCABULARY, I)}
        params |= {f"rnn.{name}": value for name, value in layer.items()}
        params |= uniform(
            1.0 / math.sqrt(H), [("linear.weight", (VOCABULARY, H)), ("linear.bias", (VOCABULARY,))]
        )
        tokens = random.integers(0, VOCABULARY, (T + 1, B))
        return Problem(case, params, tokens[:-1], state, targets=tokens[1:])
    lengths = random.integers(1, T + 1, B) if case.operation == "ragged" else None
    d_output = normal(T, B, D * H) if case.operation == "train" else None
    return Problem(case, layer, normal(T, B, I), state, lengths, d_output, None, layers, D)


def flops_of(case: Case, density: float = 1.0) -> float:
    """Return the floating-point operations of the case's matrix products, a multiply-add counting two.

    Training is three times the forward pass: each product has two in the backward pass. This is the work
    of the formulas; a side that finds a way around some of it is faster than "the ceiling" allows.
    """
    flops = 2.0 * case.T * case.B * density * GATES[case.cell] * case.H * (case.I + case.H)
    if case.operation == "lm":
        flops += 2.0 * case.T * case.B * case.H * VOCABULARY
    return flops * (3.0 if case.operation in ("train", "lm") else 1.0)
