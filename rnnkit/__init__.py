"""RNN, LSTM and GRU on NumPy, CuPy and PyTorch arrays, with exact hand-derived gradients."""

from ._array import BackendUnavailableError, to_numpy
from ._version import __version__
from .layers import Dropout, Embedding, Linear
from .losses import mean_squared_error, softmax_cross_entropy
from .optim import SGD, Adam, clip_grad_norm
from .parameters import Gradients, ParameterDict
from .recurrent import GRU, LSTM, RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SGD",
    "Adam",
    "BackendUnavailableError",
    "Dropout",
    "Embedding",
    "Gradients",
    "Linear",
    "ParameterDict",
    "__version__",
    "clip_grad_norm",
    "mean_squared_error",
    "softmax_cross_entropy",
    "to_numpy",
]
