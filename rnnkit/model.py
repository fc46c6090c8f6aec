"""LanguageModel: tokens in, logits of the next token out; one way to put the layers together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._array import is_integer, to_numpy
from ._random import derive_seed, dropout_scale, uniform
from ._typing import Array
from .layers import Embedding, Linear
from .parameters import Gradients, Layer, ParameterDict, join
from .recurrent import GRU, LSTM, RNN
from .stack import Stack, State
from .validation import (
    NO_SEED,
    check_float,
    check_lengths,
    check_number,
    check_probability,
    check_size,
    check_tokens,
    resolve_seed,
    zero_padding,
)

CELLS: dict[str, type[Stack]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}

Pullback = Callable[..., Gradients]


class LanguageModel(Layer):
    """Predicts the next token: one-hot or embedding, then a recurrent layer, then a linear one.

    Parameters
    ----------
    vocab_size : int
        How many tokens there are.
    hidden_size : int
        Size of the recurrent state.
    cell : {"lstm", "gru", "rnn"}
        The recurrent layer.
    num_layers : int
        Of the recurrent layer.
    embedding_dim : int, optional
        Length of learned vectors that stand for the tokens. By default tokens are one-hot vectors, of
        which none is ever made.
    dropout : float
        In training, the probability of zeroing each number of the embedding, of the output of every
        recurrent layer, and so of what the linear layer sees.
    proj_size, forget_bias
        As in `LSTM`, for that cell only.
    tokens : sequence of str, optional
        The tokens themselves, for `generate` and whoever loads the model later.
    backend, dtype, seed
        As in `LSTM`.

    Attributes
    ----------
    embedding : Embedding or None
    rnn : RNN, LSTM or GRU
    linear : Linear
        The parts; their parameters are views of this model's, named ``embedding.weight``,
        ``rnn.weight_ih_l0``, ``linear.weight`` and so on.

    Examples
    --------
    >>> import numpy as np, rnnkit
    >>> model = rnnkit.LanguageModel(vocab_size=10, hidden_size=16, seed=0)
    >>> logits, state = model(np.zeros((7, 2), np.int64))
    >>> logits.shape
    (7, 2, 10)
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, cell: str = "lstm", num_layers: int = 1,
        embedding_dim: int | None = None, *, dropout: float = 0.0, proj_size: int = 0,
        forget_bias: float | None = None, tokens: Sequence[str] | None = None, backend: Any = None,
        dtype: Any = "float32", seed: int | None = None,
    ):  # fmt: skip
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
        if cell != "lstm" and (proj_size or forget_bias is not None):
            raise ValueError(f"proj_size and forget_bias need cell='lstm', got {cell!r}")
        self.vocab_size = check_size("vocab_size", vocab_size)
        self.dropout = check_probability("dropout", dropout)
        self.tokens = None if tokens is None else tuple(tokens)
        if self.tokens is not None and len(self.tokens) != vocab_size:
            raise ValueError(f"tokens must be vocab_size={vocab_size} strings, got {len(self.tokens)}")
        if embedding_dim is not None:
            embedding_dim = check_size("embedding_dim", embedding_dim)
        config = {
            "vocab_size": self.vocab_size, "hidden_size": check_size("hidden_size", hidden_size),
            "cell": cell, "num_layers": check_size("num_layers", num_layers),
            "embedding_dim": embedding_dim, "dropout": self.dropout,
            "proj_size": check_size("proj_size", proj_size, least=0),
            "forget_bias": None if forget_bias is None else check_number("forget_bias", forget_bias),
            "tokens": self.tokens,
        }  # fmt: skip
        super().__init__(config, backend, dtype)
        seed = resolve_seed(seed)

        def place(part: str) -> dict[str, Any]:
            own = NO_SEED if seed is NO_SEED else derive_seed(seed, part)
            return {"backend": self._backend, "dtype": self._dtype, "seed": own}

        special: dict[str, Any] = {}
        if cell == "lstm":
            special = {"proj_size": proj_size, "forget_bias": forget_bias}
        self.embedding = None
        if embedding_dim is not None:
            self.embedding = Embedding(vocab_size, embedding_dim, **place("embedding"))
        self.rnn = CELLS[cell](
            embedding_dim or vocab_size, hidden_size, num_layers, dropout=dropout, **special, **place("rnn")
        )
        self.linear = Linear(proj_size or hidden_size, vocab_size, **place("linear"))
        values = {
            f"{part}.{name}": value for part, layer in self._parts() for name, value in layer.params.items()
        }
        with self._backend.active():
            self._bind(join(values, self._backend.dtype(self._dtype)))

    def __call__(self, tokens: Array, state: State = None, *, lengths: Any = None) -> tuple[Array, State]:
        """Return the logits of each next token and the final state.

        Parameters
        ----------
        tokens : array (T, B) of integers in [0, V)
        state : as returned by the call before; optional
        lengths : array or list of B integers in [0, T], optional

        Returns
        -------
        logits : array (T, B, V)
        state : array or pair of arrays (L, B, H)

        Raises
        ------
        ValueError, TypeError
            As `LSTM` does.
        """
        with self._backend.active():
            tokens, lengths = self._check_tokens(tokens, lengths)
            vectors = None if self.embedding is None else self.embedding.params["weight"]
            output, state = self.rnn(tokens, state, lengths=lengths, embedding=vectors)
            return self.linear(output), state

    def vjp(
        self, tokens: Array, state: State = None, *, lengths: Any = None, seed: int | None = None
    ) -> tuple[tuple[Array, State], Pullback]:
        """Return ``(logits, state), pullback``; ``pullback(d_logits, d_state=None)`` gives `Gradients`.

        Arguments as in a plain call; `seed` fixes the dropout masks and is needed with dropout > 0. As
        with `LSTM.vjp`, a pullback can be called once.
        """
        if self.dropout and seed is None:
            raise ValueError("vjp needs seed= when dropout > 0: the same seed gives the same masks")
        seed = resolve_seed(seed)
        with self._backend.active():
            tokens, lengths = self._check_tokens(tokens, lengths)
            x, vectors, pull_embedding, scale_x = tokens, None, None, None
            if self.embedding is not None and self.dropout:
                x, pull_embedding = self.embedding.vjp(tokens)
                x, scale_x = self._drop(x, seed, "embedding")
            elif self.embedding is not None:
                vectors = self.embedding.params["weight"]
            (output, final), pull_rnn = self.rnn.vjp(x, state, lengths=lengths, embedding=vectors, seed=seed)
            output, scale_output = self._drop(output, seed, "output")
            logits, pull_linear = self.linear.vjp(output)

        def pullback(d_logits: Array, d_state: State = None) -> Gradients:
            with self._backend.active():
                if lengths is not None:
                    shape = tuple(logits.shape)
                    d_logits = check_float("d_logits", d_logits, shape, self._backend, self._dtype)
                    d_logits = zero_padding(d_logits, lengths)
                linear = pull_linear(d_logits)
                d_output = linear.x if scale_output is None else linear.x * scale_output
                rnn, xp = pull_rnn(d_output, d_state), self._backend.xp
                parts = {"rnn": rnn.params.flat, "linear": linear.params.flat}
                if pull_embedding is not None:
                    parts["embedding"] = pull_embedding(rnn.x * scale_x).params.flat
                elif self.embedding is not None:
                    parts["embedding"] = xp.reshape(rnn.x, (-1,))
                flat = xp.concat([parts[name] for name, _ in self._parts()])
                return Gradients(None, ParameterDict(flat, self._params.shapes), rnn.state)

        return (logits, final), pullback

    def step(self, tokens: Array, state: State = None) -> tuple[Array, State]:
        """Return the logits (B, V) after one more token of each sequence, (B,), and the new state."""
        with self._backend.active():
            x = tokens if self.embedding is None else self.embedding(tokens)
            output, state = self.rnn.step(x, state)
            return self.linear(output), state

    def generate(
        self, prompt: Sequence[int], num_tokens: int, *, temperature: float = 0.0, stop: int | None = None,
        seed: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Continue a sequence of tokens.

        Parameters
        ----------
        prompt : sequence of int
            At least one token.
        num_tokens : int
            How many to add at most.
        temperature : float
            0 takes the likeliest token each time; 1 draws from the model's distribution, higher values
            from flatter ones.
        stop : int, optional
            A token after which to stop; it is the last of the result.
        seed : int, optional
            Fixes the drawing.

        Returns
        -------
        list of int
            The new tokens.

        Raises
        ------
        ValueError
            The prompt is empty or has a token out of range, or temperature is negative.
        """
        if len(prompt) == 0:
            raise ValueError("prompt must have at least one token, got none")
        if not temperature >= 0.0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        seed = resolve_seed(seed)
        numbers = check_tokens("prompt", np.asarray(prompt), self.vocab_size, on_host=True)
        logits, state = self(self.asarray(numbers[:, None]))
        logits = logits[-1, ...]
        result: list[int] = []
        for k in range(check_size("num_tokens", num_tokens, least=0)):
            scores = to_numpy(logits)[0].astype(np.float64)
            if temperature > 0.0:
                # The largest of logits + Gumbel noise is a draw from the softmax (Gumbel 1954).
                noise = uniform(np, self.vocab_size, seed, f"token{k}")
                scores = scores / temperature - np.log(-np.log(noise + 2.0**-25))
            result.append(int(np.argmax(scores)))
            if result[-1] == stop or k == num_tokens - 1:
                break
            logits, state = self.step(self.asarray([result[-1]]), state)
        return result

    def explain(self) -> str:
        """Say which kernels serve the recurrent layer, and why not faster ones."""
        return self.rnn.explain()

    def _check_tokens(self, tokens: Any, lengths: Any) -> tuple[Array, Array | None]:
        """Return the tokens, with padding replaced by token 0, and the lengths on the backend."""
        tokens = self._backend.accept(tokens, "tokens")
        if tokens.ndim != 2 or not is_integer(tokens):
            raise ValueError(
                "tokens must be integers of shape (T, B), "
                f"got dtype {tokens.dtype} and shape {tuple(tokens.shape)}"
            )
        if lengths is not None:
            lengths = check_lengths(lengths, self._backend, *tokens.shape)
            tokens = zero_padding(tokens, lengths)
        return check_tokens("tokens", tokens, self.vocab_size, self._backend.on_host), lengths

    def _drop(self, x: Array, seed: int, label: str) -> tuple[Array, Array | None]:
        if not self.dropout:
            return x, None
        scale = dropout_scale(x, self._backend.xp, self.dropout, seed, f"dropout_{label}")
        return x * scale, scale

    def _parts(self) -> list[tuple[str, Layer]]:
        parts = [("embedding", self.embedding), ("rnn", self.rnn), ("linear", self.linear)]
        return [(name, layer) for name, layer in parts if layer is not None]

    def _bind(self, params: ParameterDict) -> None:
        """Take `params` as this model's buffer, and let the parts' parameters be views of it."""
        self._adopt(params)
        for name, layer in self._parts():
            layer._adopt(params.part(f"{name}."))
