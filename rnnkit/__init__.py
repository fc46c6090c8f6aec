"""RNN, LSTM and GRU on NumPy, CuPy and PyTorch arrays, with exact hand-derived gradients."""

from ._array import BackendUnavailableError, to_numpy
from ._version import __version__
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
