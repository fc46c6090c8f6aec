"""Optimisers. Each works on one flat buffer of parameters and one of gradients, in place, on their device."""

from __future__ import annotations

from typing import Any

from ._array import accumulation_dtype, backend_of, dtype_name, namespace_of
from ._typing import Array
from .kernels import Case, Kernels, kernels_for
from .parameters import ParameterDict
from .validation import check_number


class Optimizer:
    """What the optimisers share: a learning rate, and state that follows the parameters.

    Attributes
    ----------
    lr : float
        The learning rate of the next step; a schedule may set it.
    state : dict of str to array
        Vectors beside ``params.flat``; empty before the first step.
    steps : int
        How many steps were taken.
    """

    def __init__(self, lr: float, **settings: float):
        self.lr = _non_negative("lr", lr)
        self._settings = settings
        self.state: dict[str, Array] = {}
        self.steps = 0

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"lr": self.lr, **self._settings}

    def step(
        self, params: ParameterDict, grads: ParameterDict, *, clip_norm: float | None = None
    ) -> Array | None:
        """Change `params` in place by one step against `grads`.

        Parameters
        ----------
        params, grads : ParameterDict
            Of a layer, and from its pullback.
        clip_norm : float, optional
            Positive: the step is the one after ``clip_grad_norm(grads, clip_norm)``, and `grads` are used up:
            what they hold afterwards, scaled or not, is not defined. Without it they stay as they are.

        Returns
        -------
        array () or None
            With `clip_norm` the norm of the gradients as they were; it stays on the device, and nothing waits
            for it. Else None.

        Raises
        ------
        ValueError
            They are not the parameters and gradients of the same layer, or `clip_norm` is not positive.
        """
        for argument, value in (("params", params), ("grads", grads)):
            if not isinstance(value, ParameterDict):
                raise TypeError(
                    f"{argument} must be a ParameterDict, such as layer.params, got {type(value).__name__}"
                )
        if type(params.flat) is not type(grads.flat):
            raise TypeError("params and grads must be arrays of the same library")
        if params.shapes != grads.shapes:
            raise ValueError(
                f"grads must have the names and shapes of params, got {list(grads)} for {list(params)}"
            )
        if self.state and next(iter(self.state.values())).shape != params.flat.shape:
            raise ValueError("this optimiser's state belongs to other parameters: make a new optimiser")
        if clip_norm is not None:
            _check_max_norm("clip_norm", clip_norm)
        self.steps += 1
        try:
            with backend_of(params.flat).active():
                if clip_norm is not None:
                    return self._clipped_step(params.flat, grads.flat, clip_norm)
                self._step(params.flat, grads.flat)
        except BaseException:
            self.steps -= 1  # it was not taken
            raise
        return None

    def _step(self, flat: Array, d_flat: Array) -> None:
        raise TypeError("Optimizer is the base of SGD and Adam: use one of those")

    def _clipped_step(self, flat: Array, d_flat: Array, max_norm: float) -> Array:
        norm = _clip(d_flat, max_norm)
        self._step(flat, d_flat)
        return norm

    def _slot(self, name: str, flat: Array) -> Array:
        """Return the state vector of that name, zeros at first; of the dtype that sums are kept in."""
        if name not in self.state:
            self.state[name] = namespace_of(flat).zeros_like(flat, dtype=_accumulation(flat))
        return self.state[name]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.config.items())})"


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, by torch.optim.SGD's formulas.

    v <- momentum * v + gradient (+ weight_decay * parameter);  parameter <- parameter - lr * v

    Parameters
    ----------
    lr : float
        Learning rate.
    momentum : float
        How much of the step before goes on.
    weight_decay : float
        L2 penalty, added to the gradient.
    """

    def __init__(self, lr: float = 1e-2, *, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(
            lr,
            momentum=_non_negative("momentum", momentum),
            weight_decay=_non_negative("weight_decay", weight_decay),
        )

    def _step(self, flat: Array, d_flat: Array) -> None:
        xp, wide = namespace_of(flat), _accumulation(flat)
        momentum, decay = self._settings["momentum"], self._settings["weight_decay"]
        # Half precision: small steps would be lost in the sums; only the new parameters are rounded.
        updated, d_flat = xp.astype(flat, wide, copy=False), xp.astype(d_flat, wide, copy=False)
        if decay:
            d_flat = d_flat + decay * updated
        if momentum:
            velocity = self._slot("velocity", flat)
            velocity *= momentum
            velocity += d_flat
            d_flat = velocity
        updated -= self.lr * d_flat
        if updated is not flat:
            flat[...] = xp.astype(updated, flat.dtype)


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019).

    The formulas are torch.optim.AdamW's; without weight decay also torch.optim.Adam's.

    Parameters
    ----------
    lr : float
        Learning rate.
    betas : (float, float)
        Decay of the running means of the gradient and of its square.
    eps : float
        Added to the root of the second.
    weight_decay : float
        Each step first shrinks the parameters by lr * weight_decay.
    """

    def __init__(
        self, lr: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        self.betas = (float(betas[0]), float(betas[1]))
        super().__init__(
            lr, eps=_non_negative("eps", eps), weight_decay=_non_negative("weight_decay", weight_decay)
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"lr": self.lr, "betas": list(self.betas), **self._settings}

    def _step(self, flat: Array, d_flat: Array) -> None:
        _kernels("adam", flat)["adam"](*self._vectors(flat, d_flat), **self._numbers())

    def _clipped_step(self, flat: Array, d_flat: Array, max_norm: float) -> Array:
        kernel = _kernels("adam", flat).functions.get("clipped_adam")
        if kernel is None:
            return super()._clipped_step(flat, d_flat, max_norm)
        norm: Array = kernel(*self._vectors(flat, d_flat), max_norm=max_norm, **self._numbers())
        return norm

    def _vectors(self, flat: Array, d_flat: Array) -> tuple[Array, ...]:
        return flat, d_flat, self._slot("mean", flat), self._slot("square", flat)

    def _numbers(self) -> dict[str, Any]:
        return {"betas": self.betas, "steps": self.steps, "lr": self.lr, **self._settings}


def clip_grad_norm(grads: ParameterDict, max_norm: float) -> Array:
    """Scale the gradients in place so that their norm, taken together, is at most `max_norm`.

    Parameters
    ----------
    grads : ParameterDict
        From a pullback.
    max_norm : float
        Positive.

    Returns
    -------
    array ()
        The norm before; it stays on the device, and nothing waits for it.

    Raises
    ------
    ValueError
        `max_norm` is not positive.

    References
    ----------
    R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", ICML
    (2013). The formula is torch.nn.utils.clip_grad_norm_'s.
    """
    if not isinstance(grads, ParameterDict):
        raise TypeError(f"grads must be a ParameterDict, from a pullback, got {type(grads).__name__}")
    _check_max_norm("max_norm", max_norm)
    with backend_of(grads.flat).active():
        return _clip(grads.flat, max_norm)


def _clip(flat: Array, max_norm: float) -> Array:
    norm: Array = _kernels("clip", flat)["clip"](flat, max_norm)
    return norm


def _kernels(name: str, flat: Array) -> Kernels:
    backend = backend_of(flat)
    return kernels_for(backend.library, Case(name, dtype_name(flat.dtype), 0, device=backend.name))


def _accumulation(flat: Array) -> Any:
    return getattr(namespace_of(flat), accumulation_dtype(dtype_name(flat.dtype)))


def _check_max_norm(name: str, value: float) -> None:
    if not value > 0.0:
        raise ValueError(f"{name} must be positive, got {value}")


def _non_negative(name: str, value: float) -> float:
    value = check_number(name, value)
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value
