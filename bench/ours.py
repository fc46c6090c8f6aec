"""rnnkit's side of each case, one kernel module at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

import rnnkit
from rnnkit.kernels import Case as KernelCase
from rnnkit.kernels import kernels_for

from .cases import VOCABULARY, Case, Host, Problem
from .timing import Side, environment

BACKENDS = ("numpy", "torch")
LAYERS = {"lstm": rnnkit.LSTM, "gru": rnnkit.GRU, "rnn": rnnkit.RNN}
LM_LEARNING_RATE = 1e-3
CHECKED_LM_STEPS = 3  # the first tells nothing about the optimiser


def kernel_modules(backend: str) -> tuple[str, ...]:
    """Return the kernel modules of a backend, fastest first, installed or not."""
    with environment(RNNKIT_KERNELS="reference"):
        chosen = kernels_for(backend, KernelCase("lstm", "float32", 1, device=backend))
    return (*chosen.refused["lstm_forward"], "reference")


def allowed(kernel: str, backend: str) -> str:
    """Return the RNNKIT_KERNELS that rules out what is faster; what is slower fills a kernel's gaps."""
    modules = kernel_modules(backend)
    return ",".join(modules[modules.index(kernel) :])


def scope_of(kernel: str, backend: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes a context in which nothing faster than `kernel` is used."""
    names = allowed(kernel, backend)
    return lambda: environment(RNNKIT_KERNELS=names)


def why_not(kernel: str, case: Case, backend: str) -> str | None:
    """Say why a module cannot serve a case, or None."""
    with scope_of(kernel, backend)():
        name = f"{case.cell}_forward"
        chosen = kernels_for(backend, KernelCase(case.cell, case.dtype, case.H, device=backend))
        return None if chosen.modules[name] == kernel else chosen.refused[name][kernel]


def default_kernel(case: Case, backend: str) -> str:
    """Return the module that serves a case when nothing is ruled out."""
    with environment(RNNKIT_KERNELS=""):
        chosen = kernels_for(backend, KernelCase(case.cell, case.dtype, case.H, device=backend))
        return chosen.modules[f"{case.cell}_forward"]


def side_of(problem: Problem, kernel: str, backend: str = "numpy", dtype: str | None = None) -> Side:
    """Return rnnkit's side of a case.

    Parameters
    ----------
    problem : Problem
    kernel : str
        One of `kernel_modules`.
    backend : str
        One of `BACKENDS`.
    dtype : str, optional
        By default the case's.
    """
    make = _MAKERS[problem.case.operation]
    call, results = make(problem, backend, dtype or problem.case.dtype)
    return Side(name_of(kernel), call, results, scope_of(kernel, backend))


def name_of(kernel: str) -> str:
    """Return the name of a kernel's side: "torch" alone would be the peer."""
    return f"rnnkit {kernel}"


def expected(problem: Problem) -> dict[str, Host]:
    """Return the right results: the reference kernel's in float64."""
    return side_of(problem, "reference", "numpy", "float64").compute()


Made = tuple[Callable[[], Any], Callable[[Any], dict[str, Host]]]


def _layer(problem: Problem, backend: str, dtype: str) -> Any:
    case = problem.case
    layer: Any = LAYERS[case.cell](case.I, case.H, backend=backend, dtype=dtype, seed=0)
    layer.load_params({name.removeprefix("layer."): value for name, value in problem.params.items()
                       if "." not in name or name.startswith("layer.")})  # fmt: skip
    return layer


def _state(problem: Problem, layer: Any) -> Any:
    parts = tuple(layer.asarray(part) for part in problem.state)
    return parts if len(parts) == 2 else parts[0]


def _named(output: Any, state: Any) -> dict[str, Host]:
    parts = state if isinstance(state, tuple) else (state,)
    names = ("h_n", "c_n")[: len(parts)]
    results = {name: rnnkit.to_numpy(part) for name, part in zip(names, parts, strict=True)}
    return {"output": rnnkit.to_numpy(output), **results}


def _forward(problem: Problem, backend: str, dtype: str) -> Made:
    layer = _layer(problem, backend, dtype)
    x, state = layer.asarray(problem.x), _state(problem, layer)
    lengths = None if problem.lengths is None else layer.asarray(problem.lengths)
    return lambda: layer(x, state, lengths=lengths), lambda result: _named(*result)


def _step(problem: Problem, backend: str, dtype: str) -> Made:
    layer = _layer(problem, backend, dtype)
    x_t, state = layer.asarray(problem.x[0]), _state(problem, layer)
    return lambda: layer.step(x_t, state), lambda result: _named(*result)


def _train(problem: Problem, backend: str, dtype: str) -> Made:
    layer = _layer(problem, backend, dtype)
    x, state, d_output = layer.asarray(problem.x), _state(problem, layer), layer.asarray(problem.d_output)

    def call() -> Any:
        (output, final), pullback = layer.vjp(x, state)
        return output, final, pullback(d_output)

    def results(result: Any) -> dict[str, Host]:
        output, final, grads = result
        gradients = {f"d_{name}": rnnkit.to_numpy(value) for name, value in grads.params.items()}
        return {**_named(output, final), "d_x": rnnkit.to_numpy(grads.x), **gradients}

    return call, results


class LanguageModelStep:
    """One training step of embedding, layer, linear, cross-entropy and Adam, from rnnkit's parts.

    Parameters
    ----------
    problem : Problem
    backend, dtype : str
    """

    def __init__(self, problem: Problem, backend: str, dtype: str):
        case = problem.case
        where: dict[str, Any] = {"backend": backend, "dtype": dtype, "seed": 0}
        self.embedding = rnnkit.Embedding(VOCABULARY, case.I, **where)
        self.layer = _layer(problem, backend, dtype)
        self.linear = rnnkit.Linear(case.H, VOCABULARY, **where)
        self.embedding.load_params({"weight": problem.params["embedding.weight"]})
        self.linear.load_params({name: problem.params[f"linear.{name}"] for name in ("weight", "bias")})
        self.optimizers = [rnnkit.Adam(LM_LEARNING_RATE) for _ in range(3)]
        self.tokens, self.targets = self.layer.asarray(problem.x), self.layer.asarray(problem.targets)
        self.state = _state(problem, self.layer)

    def __call__(self) -> tuple[Any, dict[str, Any]]:
        """Return the loss before the step and the gradients by name."""
        embedded, to_embedding = self.embedding.vjp(self.tokens)
        (output, _), to_layer = self.layer.vjp(embedded, self.state)
        logits, to_linear = self.linear.vjp(output)
        loss, d_logits = rnnkit.softmax_cross_entropy(logits, self.targets)
        linear = to_linear(d_logits)
        layer = to_layer(linear.x)
        embedding = to_embedding(layer.x)
        parts = {"embedding": embedding.params, "layer": layer.params, "linear": linear.params}
        for optimizer, (name, d_params) in zip(self.optimizers, parts.items(), strict=True):
            optimizer.step(getattr(self, name).params, d_params)
        return loss, parts


def _lm(problem: Problem, backend: str, dtype: str) -> Made:
    step = LanguageModelStep(problem, backend, dtype)

    def results(result: Any) -> dict[str, Host]:
        loss, parts = result
        named = {
            f"d_{part}.{name}": rnnkit.to_numpy(value)
            for part, params in parts.items()
            for name, value in params.items()
        }
        losses = [loss] + [step()[0] for _ in range(CHECKED_LM_STEPS - 1)]
        return {"losses": np.array([float(rnnkit.to_numpy(value)) for value in losses]), **named}

    return step, results


_MAKERS: dict[str, Callable[[Problem, str, str], Made]] = {
    "forward": _forward, "ragged": _forward, "train": _train, "step": _step, "lm": _lm,
}  # fmt: skip
