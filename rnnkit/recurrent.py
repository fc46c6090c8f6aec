"""The three recurrent layers: RNN, LSTM and GRU."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from ._array import accumulation_dtype
from .direction import GRUDirection, LSTMDirection
from .parameters import create
from .stack import Stack, State
from .validation import check_number, check_size


class LSTM(Stack):
    r"""Long short-term memory, with torch.nn.LSTM's formulas, parameters and defaults.

    For each time step t, with s the logistic function and * elementwise::

        i_t = s(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)        input gate
        f_t = s(W_if x_t + b_if + W_hf h_{t-1} + b_hf)        forget gate
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)     candidate
        o_t = s(W_io x_t + b_io + W_ho h_{t-1} + b_ho)        output gate
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t)              with proj_size:    W_hr (o_t * tanh(c_t))

    Parameters
    ----------
    input_size, hidden_size : int
        Sizes of one time step of x and of the state.
    num_layers : int
        Layers on top of each other; each reads the output of the one below.
    bias : bool
        Whether there are ``bias_ih`` and ``bias_hh``.
    batch_first : bool
        Whether x and output are (B, T, .) instead of (T, B, .). States never are.
    dropout : float
        Probability with which `vjp` zeroes each output of every layer but the last.
    bidirectional : bool
        Whether each layer has a second direction, from a sequence's last step to its first.
    proj_size : int
        If positive, h is projected to this size (Sak et al. 2014); smaller than `hidden_size`.
    forget_bias : float, optional
        Initial value of the forget gate's bias as a whole; 1 lets a new layer remember (Gers et al. 2000;
        Jozefowicz et al. 2015). By default it is drawn like all else.
    backend : str or module
        ``"numpy"``, ``"cupy"``, ``"cupy:1"``, ``"torch"``, ``"torch:cuda"`` or an Array API namespace
        module; by default the environment variable ``RNNKIT_BACKEND``, else NumPy.
    dtype : str
        ``"float32"``, ``"float64"``, and where the backend has them ``"float16"`` and ``"bfloat16"``.
    seed : int, optional
        Fixes the initial weights, the same on every backend. By default they differ from call to call.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range, or of the wrong kind.
    BackendUnavailableError
        The backend is not installed or has no device.

    Notes
    -----
    Parameters of layer k, with the suffix ``_reverse`` for the second direction: ``weight_ih_lk``
    (4H, I), above the first layer (4H, D*P); ``weight_hh_lk`` (4H, P); ``bias_ih_lk``, ``bias_hh_lk``
    (4H,); with projection ``weight_hr_lk`` (P, H). The rows of the gates stand in the order i, f, g, o.
    All begin uniform in [-1/sqrt(H), 1/sqrt(H)).

    In half precision c is float32, as state too, and sums are float32.

    References
    ----------
    S. Hochreiter, J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997); F. A. Gers,
    J. Schmidhuber, F. Cummins, "Learning to forget", Neural Computation 12 (2000); H. Sak, A. Senior,
    F. Beaufays, arXiv:1402.1128 (2014); R. Jozefowicz, W. Zaremba, I. Sutskever, "An empirical
    exploration of recurrent network architectures", ICML (2015).

    Examples
    --------
    >>> import numpy as np, rnnkit
    >>> lstm = rnnkit.LSTM(3, 5, seed=0)
    >>> x = np.ones((7, 2, 3), np.float32)
    >>> output, (h_n, c_n) = lstm(x, lengths=[7, 4])
    >>> output.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    >>> (output, state), pullback = lstm.vjp(x)
    >>> pullback(np.ones_like(output)).params["weight_hh_l0"].shape
    (20, 5)
    """

    _cell = "lstm"
    _gates = 4
    _direction = LSTMDirection
    _state_names: ClassVar[tuple[str, ...]] = ("h_0", "c_0")

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        forget_bias: float | None = None, backend: Any = None, dtype: Any = "float32",
        seed: int | None = None,
    ):  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, backend, dtype,
            proj_size=check_size("proj_size", proj_size, least=0),
            forget_bias=None if forget_bias is None else _finite("forget_bias", forget_bias),
        )  # fmt: skip
        initial = self._initial(seed)
        if forget_bias is not None:
            if not bias:
                raise ValueError("forget_bias needs bias=True")
            H = self.hidden_size
            for name, value in initial.items():
                if name.startswith("bias_"):
                    value[H : 2 * H] = forget_bias if name.startswith("bias_ih") else 0.0
        self._adopt(create(self._backend, self._dtype, initial))

    def _state_sizes(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        return sizes, (self._dtype, accumulation_dtype(self._dtype))

    def _state_parts(self, argument: str, state: State) -> tuple[Any, ...]:
        if state is None:
            return None, None
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError(f"{argument} of an LSTM must be a pair (h, c), got {type(state).__name__}")
        return tuple(state)


class GRU(Stack):
    """Gated recurrent unit, with torch.nn.GRU's formulas, parameters and defaults.

    For each time step t, with s the logistic function and * elementwise::

        r_t = s(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)                reset gate
        z_t = s(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)                update gate
        n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))     candidate
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    The reset gate multiplies after the matrix product, as in torch and cuDNN; Cho et al. (2014),
    arXiv:1406.1078, have it before.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, backend, dtype, seed
        As in `LSTM`, with the same errors.

    Notes
    -----
    The state is one array h. Parameters are those of `LSTM` with 3H rows in the order r, z, n, and no
    projection. All begin uniform in [-1/sqrt(H), 1/sqrt(H)).
    """

    _cell = "gru"
    _gates = 3
    _direction = GRUDirection

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, backend: Any = None,
        dtype: Any = "float32", seed: int | None = None,
    ):  # fmt: skip
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, backend, dtype
        )
        self._adopt(create(self._backend, self._dtype, self._initial(seed)))


class RNN(Stack):
    """The simple recurrent network of Elman (1990), with torch.nn.RNN's parameters and defaults.

    For each time step t::

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, backend, dtype, seed
        As in `LSTM`, with the same errors.
    nonlinearity : {"tanh", "relu"}
        What follows the sum.

    Notes
    -----
    The state is one array h. Parameters are those of `LSTM` with H rows, and no projection. All begin
    uniform in [-1/sqrt(H), 1/sqrt(H)).

    References
    ----------
    J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990).
    """

    _cell = "rnn"
    _gates = 1

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, nonlinearity: str = "tanh",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        backend: Any = None, dtype: Any = "float32", seed: int | None = None,
    ):  # fmt: skip
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, backend, dtype,
            nonlinearity=nonlinearity,
        )  # fmt: skip
        self._adopt(create(self._backend, self._dtype, self._initial(seed)))


def _finite(name: str, value: Any) -> float:
    number = check_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number
