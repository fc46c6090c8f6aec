"""RNN, LSTM and GRU on NumPy, CuPy and PyTorch arrays, with exact hand-derived gradients."""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from ._array import BackendUnavailableError, to_numpy
    from .checkpoint import load, save
    from .data import Vocabulary, counting_language, next_token_pair, read_text, split
    from .layers import Dropout, Embedding, Linear
    from .losses import mean_squared_error, softmax_cross_entropy
    from .model import LanguageModel
    from .optim import SGD, Adam, clip_grad_norm
    from .parameters import Gradients, ParameterDict
    from .recurrent import GRU, LSTM, RNN
    from .training import Evaluation, History, cosine_schedule, evaluate, fit, train_step

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SGD",
    "Adam",
    "BackendUnavailableError",
    "Dropout",
    "Embedding",
    "Evaluation",
    "Gradients",
    "History",
    "LanguageModel",
    "Linear",
    "ParameterDict",
    "Vocabulary",
    "__version__",
    "clip_grad_norm",
    "cosine_schedule",
    "counting_language",
    "evaluate",
    "fit",
    "load",
    "mean_squared_error",
    "next_token_pair",
    "read_text",
    "save",
    "softmax_cross_entropy",
    "split",
    "to_numpy",
    "train_step",
]

# Modules load when one of their names is first used: to run a model needs neither training nor files.
_HOMES = {
    "_array": ("BackendUnavailableError", "to_numpy"),
    "checkpoint": ("load", "save"),
    "data": ("Vocabulary", "counting_language", "next_token_pair", "read_text", "split"),
    "layers": ("Dropout", "Embedding", "Linear"),
    "losses": ("mean_squared_error", "softmax_cross_entropy"),
    "model": ("LanguageModel",),
    "optim": ("SGD", "Adam", "clip_grad_norm"),
    "parameters": ("Gradients", "ParameterDict"),
    "recurrent": ("GRU", "LSTM", "RNN"),
    "training": ("Evaluation", "History", "cosine_schedule", "evaluate", "fit", "train_step"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
