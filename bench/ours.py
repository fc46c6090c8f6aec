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
        One of `BACKENDS`, or "cupy".
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
    layer: Any = LAYERS[case.cell](
        case.I, case.H, problem.layers, bidirectional=problem.directions == 2, backend=backend, dtype=dtype,
        seed=0,
    )  # fmt: skip
    layer.load_params(problem.params)
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
    lengths = None if problem.lengths is None else layer.asarray(problem.lengths)

    def call() -> Any:
        (output, final), pullback = layer.vjp(x, state, lengths=lengths)
        return output, final, pullback(d_output)

    def results(result: Any) -> dict[str, Host]:
        output, final, grads = result
        gradients = {f"d_{name}": rnnkit.to_numpy(value) for name, value in grads.params.items()}
        return {**_named(output, final), "d_x": rnnkit.to_numpy(grads.x), **gradients}

    return call, results


def _lm(problem: Problem, backend: str, dtype: str) -> Made:
    case = problem.case
    model = rnnkit.LanguageModel(
        VOCABULARY, case.H, case.cell, embedding_dim=case.I, backend=backend, dtype=dtype, seed=0
    )
    model.load_params(problem.params)
    optimizer = rnnkit.Adam(LM_LEARNING_RATE)
    tokens, targets, state = model.asarray(problem.x), model.asarray(problem.targets), _state(problem, model)

    def call() -> Any:
        (logits, _), pullback = model.vjp(tokens, state)
        loss, d_logits = rnnkit.softmax_cross_entropy(logits, targets)
        grads = pullback(d_logits).params
        optimizer.step(model.params, grads)
        return loss, grads

    def results(result: Any) -> dict[str, Host]:
        loss, grads = result
        gradients = {f"d_{name}": rnnkit.to_numpy(value) for name, value in grads.items()}
        losses = [loss] + [call()[0] for _ in range(CHECKED_LM_STEPS - 1)]
        return {"losses": np.array([float(rnnkit.to_numpy(value)) for value in losses]), **gradients}

    return call, results


_MAKERS: dict[str, Callable[[Problem, str, str], Made]] = {
    "forward": _forward, "ragged": _forward, "train": _train, "step": _step, "lm": _lm,
}  # fmt: skip
