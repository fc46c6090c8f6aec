"""Embedding, Linear and Dropout: what a recurrent layer needs around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ._array import accumulation_dtype, backend_of
from ._random import dropout_scale
from ._typing import Array
from .kernels import Case, kernels_for
from .parameters import Gradients, Layer, create, initial_normal, initial_uniform, join
from .validation import check_dtype, check_float, check_probability, check_size, check_tokens, resolve_seed

Pullback = Callable[[Array], Gradients]


class Linear(Layer):
    """y = x W^T + b over the last axis.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of x's and y's last axis.
    bias : bool
        Whether there is a b.
    backend, dtype, seed
        As in `rnnkit.LSTM`.

    Notes
    -----
    Parameters: ``weight (out_features, in_features)``, ``bias (out_features,)``, both uniform in
    [-1/sqrt(in_features), 1/sqrt(in_features)) like torch.nn.Linear's.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        backend: Any = None, dtype: Any = "float32", seed: int | None = None,
    ):  # fmt: skip
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.bias = bool(bias)
        config = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias}
        super().__init__(config, backend, dtype)
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes["bias"] = (self.out_features,)
        initial = initial_uniform(shapes, 1.0 / math.sqrt(self.in_features), resolve_seed(seed))
        self._adopt(create(self._backend, self._dtype, initial))

    def __call__(self, x: Array) -> Array:
        """Return y (..., out_features) for x (..., in_features)."""
        x = self._accept(x)
        xp = self._backend.xp
        with self._backend.active():
            y = self._matmul(
                xp.reshape(x, (-1, self.in_features)), xp.matrix_transpose(self._params["weight"])
            )
            if self.bias:
                y += self._params["bias"]
            return xp.reshape(xp.astype(y, x.dtype, copy=False), (*x.shape[:-1], self.out_features))

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Return y and the function that turns d_y into `Gradients`; two matrix products.

        Until it is called neither x nor the parameters may be changed in place.
        """
        x = self._accept(x)
        y = self(x)

        def pullback(d_y: Array) -> Gradients:
            xp = self._backend.xp
            with self._backend.active():
                d_y = xp.reshape(
                    check_float("d_y", d_y, y.shape, self._backend, self._dtype), (-1, self.out_features)
                )
                rows = xp.reshape(x, (-1, self.in_features))
                d_params = {"weight": self._matmul(xp.matrix_transpose(d_y), rows)}
                if self.bias:
                    wide = self._backend.dtype(accumulation_dtype(self._dtype))
                    d_params["bias"] = xp.sum(xp.astype(d_y, wide, copy=False), axis=0)
                d_x = xp.astype(self._matmul(d_y, self._params["weight"]), x.dtype, copy=False)
                return Gradients(xp.reshape(d_x, x.shape), join(d_params, x.dtype))

        return y, pullback

    def _accept(self, x: Any) -> Array:
        x = self._backend.accept(x, "x")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (..., in_features={self.in_features}), got {tuple(x.shape)}")
        check_dtype("x", x, self._backend, self._dtype)
        return x


class Embedding(Layer):
    """A table of vectors, one a token.

    Parameters
    ----------
    num_embeddings : int
        How many tokens there are.
    embedding_dim : int
        The length of their vectors.
    backend, dtype, seed
        As in `rnnkit.LSTM`.

    Notes
    -----
    Parameter: ``weight (num_embeddings, embedding_dim)``, standard normal like torch.nn.Embedding's.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *,
        backend: Any = None, dtype: Any = "float32", seed: int | None = None,
    ):  # fmt: skip
        self.num_embeddings = check_size("num_embeddings", num_embeddings)
        self.embedding_dim = check_size("embedding_dim", embedding_dim)
        config = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        super().__init__(config, backend, dtype)
        shapes = {"weight": (self.num_embeddings, self.embedding_dim)}
        initial = initial_normal(shapes, resolve_seed(seed))
        self._adopt(create(self._backend, self._dtype, initial))

    def __call__(self, tokens: Array) -> Array:
        """Return the vectors (..., embedding_dim) of integer tokens (...)."""
        xp = self._backend.xp
        with self._backend.active():
            tokens = self._accept(tokens)
            rows = xp.take(self._params["weight"], xp.reshape(tokens, (-1,)), axis=0)
            return xp.reshape(rows, (*tokens.shape, self.embedding_dim))

    def vjp(self, tokens: Array) -> tuple[Array, Pullback]:
        """Return the vectors and the function that turns their gradient into `Gradients`."""
        with self._backend.active():
            tokens = self._accept(tokens)
        vectors = self(tokens)

        def pullback(d_vectors: Array) -> Gradients:
            xp = self._backend.xp
            case = Case("embedding", self._dtype, self.embedding_dim, device=self.backend)
            with self._backend.active():
                d_rows = xp.reshape(
                    check_float("d_vectors", d_vectors, vectors.shape, self._backend, self._dtype),
                    (-1, self.embedding_dim),
                )
                backward = kernels_for(self._backend.library, case)["embedding_backward"]
                d_weight = backward(d_rows, xp.reshape(tokens, (-1,)), self.num_embeddings)
                return Gradients(None, join({"weight": d_weight}, vectors.dtype))

        return vectors, pullback

    def _accept(self, tokens: Any) -> Array:
        tokens = self._backend.accept(tokens, "tokens")
        return check_tokens("tokens", tokens, self.num_embeddings, self._backend.on_host)


class Dropout:
    """Inverted dropout: in training each number is zeroed with probability p, the rest divided by 1 - p.

    Parameters
    ----------
    p : float
        In [0, 1].
    """

    def __init__(self, p: float = 0.5):
        self.p = check_probability("p", p)

    def __call__(self, x: Array) -> Array:
        """Return x itself: at inference nothing is dropped."""
        return x

    def vjp(self, x: Array, *, seed: int) -> tuple[Array, Callable[[Array], Array]]:
        """Return the thinned-out x and the function that turns its gradient into d_x.

        The same `seed` gives the same mask for the same shape on every backend.
        """
        if self.p == 0.0:
            return x, lambda d_y: d_y
        backend = backend_of(x)

        def pullback(d_y: Array) -> Array:
            with backend.active():
                return d_y * scale

        with backend.active():
            scale = dropout_scale(x, backend.xp, self.p, resolve_seed(seed), "dropout")
            return x * scale, pullback

    def __repr__(self) -> str:
        return f"Dropout({self.p})"
