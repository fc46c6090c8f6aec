"""The seam: which module computes a scan.

A *kernel* is a function behind this seam. `reference` defines all of them, in pure Array API, for every
case; a faster module defines any subset of the same names, with the same arguments and results::

    lstm_forward(gates, h_0, c_0, weight_hh, *, weight_hr=None, lengths=None, reverse=False, save=True)
        -> output, h_n, c_n, saved
    lstm_backward(saved, weight_hh, d_output, d_h_n, d_c_n, *, weight_hr=None)
        -> d_gates, d_h_0, d_c_0 [, d_weight_hr]
    gru_forward(gates, h_0, weight_hh, *, bias_hn=None, lengths=None, reverse=False, save=True)
        -> output, h_n, saved
    gru_backward(saved, weight_hh, d_output, d_h_n) -> d_gates, d_h_0, d_recurrent_n
    rnn_forward(gates, h_0, weight_hh, *, nonlinearity="tanh", lengths=None, reverse=False, save=True)
        -> output, h_n, saved
    rnn_backward(saved, weight_hh, d_output, d_h_n) -> d_gates, d_h_0
    embedding_backward(d_rows, index, num_rows) -> d_table
    adam(flat, d_flat, mean, square, *, betas, steps, lr, eps, weight_decay): in place but for d_flat
    clip(flat, max_norm) -> norm: scales flat in place
    softmax_cross_entropy(logits, targets, counts, gradient=True) -> loss, d_logits, None if not wanted
    matmul(a, b, out=None) -> a @ b, 2-D, in `out` if given: the large products before and after a scan

A module that has `adam` may add a step that clips, which leaves d_flat scaled or as it was::

    clipped_adam(flat, d_flat, mean, square, *, max_norm, and as adam's) -> norm: clip(d_flat), then adam

A module may add forward scans with the input projection included: for any case, and for few steps and
sequences, where states are (1, B, H) and biases have no elements if a layer has none::

    {rnn,lstm,gru}_layer(x, *states, weight_hh, *, weight_ih=None, bias=None, index=None, and as the scan's)
        -> as the scan's: step t of sequence b reads row index[t, b] of x, else row t*B+b, which is multiplied
        with weight_ih (G*H, I), or is (G*H) already; bias (G*H,) is added
    lstm_short(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh) -> output, h_n, c_n
    gru_short(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh) -> output, h_n
    rnn_short(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, *, nonlinearity="tanh") -> output, h_n

A module may also have ``both(name, case, T, B)``: the function that computes a scan, there or back, in both
directions of a layer at once, or None where that gains nothing. It takes the same arguments but `reverse`,
those that the directions do not share as lists of two, and returns a list of two results, that of the reverse
direction last.

Each has ``why_not(name, case)``, None where it can serve the case and otherwise the reason, in a few words.
It may have ``note(name, case)``, a line for `explain()` on what the numbers depend on, or None. A scan's
forward and backward always come from the same module, since `saved` is its own business.

What a kernel may rely on: arguments were validated; all arrays are in C order, of the layer's dtype, but
`gates`, `c` and their gradients, `mean` and `square` of `accumulation_dtype`; `lengths` is int64. `gates` and
`saved` are the kernel's own: it may overwrite them and keep them. All other inputs stay as they are, and
results never share memory with them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ._case import Case

__all__ = ["Case", "Kernels", "kernels_for", "names_of", "warmup"]

# Fastest first. What is not listed has the reference alone.
_MODULES: dict[str, tuple[str, ...]] = {
    "numpy": ("numba", "numpy", "reference"),
    "cupy": ("cuda", "reference"),
    "torch": ("torch", "reference"),
}


@dataclass(frozen=True)
class Kernels:
    """The kernels that serve a case: functions by name, the module of each, and why not a faster one.

    `asked_for_both` are the modules' functions `both`, by the name of the kernel.
    """

    case: Case
    functions: dict[str, Callable[..., Any]]
    modules: dict[str, str]
    refused: dict[str, dict[str, str]]
    asked_for_both: dict[str, Callable[..., Any]]

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the function of that name."""
        return self.functions[name]

    def both(self, name: str, T: int, B: int) -> Callable[..., Any] | None:
        """Return what runs the kernel of that name in both directions of a layer at once, or None."""
        ask = self.asked_for_both.get(name)
        return None if ask is None else ask(name, self.case, T, B)

    def note(self, name: str) -> str | None:
        """Return what the module of that kernel has to say about its numbers now, or None."""
        say = getattr(_load(self.modules[name]), "note", None)
        return say(name, self.case) if say else None


def names_of(cell: str) -> tuple[str, ...]:
    """Return the names of the kernels that a cell needs."""
    if cell in ("matmul", "adam", "clip", "softmax_cross_entropy"):
        return (cell,)
    return (f"{cell}_backward",) if cell == "embedding" else (f"{cell}_forward", f"{cell}_backward")


def kernels_for(namespace: str, case: Case) -> Kernels:
    """Return, for each kernel of `case.cell`, the first module that serves the case.

    Parameters
    ----------
    namespace : str
        The array library, such as "numpy".
    case : Case
        What is to be computed.

    Notes
    -----
    The environment variable ``RNNKIT_KERNELS``, a comma-separated list of module names, restricts the
    choice; the reference always remains. It is for tests, for benchmarks, and to rule out a kernel when
    hunting a bug.
    """
    return _choose(namespace, case, os.environ.get("RNNKIT_KERNELS", ""))


def warmup() -> None:
    """Compile the CPU kernels for every cell and dtype, or load what was compiled before.

    Otherwise a layer's first call does it. The compiled code is kept on disk.

    Raises
    ------
    ImportError
        The compiler is not installed.
    """
    module = _load("numba")
    reason = module.why_not("lstm_forward", Case("lstm", "float32", 1))
    if reason is not None:
        raise ImportError(f"rnnkit's compiled CPU kernels: the module numba {reason}")
    module.warmup()


@lru_cache(maxsize=256)
def _choose(namespace: str, case: Case, only: str) -> Kernels:
    allowed = {name.strip() for name in only.split(",")} if only else None
    functions: dict[str, Callable[..., Any]] = {}
    modules: dict[str, str] = {}
    names = names_of(case.cell)
    refused: dict[str, dict[str, str]] = {name: {} for name in names}
    for module_name in _MODULES.get(namespace, ("reference",)):
        if allowed is not None and module_name not in allowed and module_name != "reference":
            reason: str | None = f"ruled out by RNNKIT_KERNELS={only}"
        else:
            reason = _serves(module_name, names, case)
        for name in names:
            if name in functions:
                continue
            if reason is None:
                functions[name] = getattr(_load(module_name), name)
                modules[name] = module_name
            else:
                refused[name][module_name] = reason
    asked_for_both = {}
    for name, module_name in list(modules.items()):
        module = _load(module_name)
        for more in _optional(name):
            if hasattr(module, more):
                functions[more] = getattr(module, more)
        if hasattr(module, "both"):
            asked_for_both[name] = module.both
    return Kernels(case, functions, modules, refused, asked_for_both)


def _optional(name: str) -> tuple[str, ...]:
    """Return what the module that serves a kernel may have beside it."""
    if name == "adam":
        return ("clipped_adam",)
    cell, forward, _ = name.partition("_forward")
    return (f"{cell}_layer", f"{cell}_short") if forward else ()


def _serves(module_name: str, names: tuple[str, ...], case: Case) -> str | None:
    """Return None where the module serves all `names` of the case, else why not."""
    try:
        module = _load(module_name)
    except ImportError as error:
        return f"{error.name} is not installed" if error.name else str(error).partition("\n")[0]
    for name in names:
        if not hasattr(module, name):
            return f"has no {name}"
        reason: str | None = module.why_not(name, case)
        if reason is not None:
            return reason
    return None


def _load(module_name: str) -> Any:
    return importlib.import_module(f".{module_name}", __name__)
