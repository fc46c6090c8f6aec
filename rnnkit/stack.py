"""What RNN, LSTM and GRU share: layers and directions, and all the large matrix products.

The scans themselves lie behind the seam in `rnnkit.kernels`; the cells are in `rnnkit.recurrent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ._array import accumulation_dtype, is_integer
from ._random import dropout_scale
from ._typing import Array
from .kernels import Case, Kernels, kernels_for, names_of
from .parameters import Gradients, Layer, initial_uniform, join
from .validation import (
    SequenceInput,
    check_float,
    check_probability,
    check_sequence,
    check_size,
    resolve_seed,
    zero_padding,
)

State = Any  # h, or (h, c) for an LSTM
Pullback = Callable[..., Gradients]


class Scanned(NamedTuple):
    """What the backward pass needs of one direction of one layer."""

    x: Array
    h_0: Array
    output: Array
    saved: Any


# A layer's dropout factors (None without) and its directions, from the first layer to the last.
Tape = list[tuple[Array | None, list[Scanned]]]


class Stack(Layer):
    """What the three cells share. A subclass names its gates, its states and its kernels."""

    _cell: ClassVar[str]
    _gates: ClassVar[int]
    _state_names: ClassVar[tuple[str, ...]] = ("h_0",)

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool,
        dropout: float, bidirectional: bool, backend: Any, dtype: Any, **special: Any,
    ):  # fmt: skip
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.num_layers = check_size("num_layers", num_layers)
        self.proj_size = check_size("proj_size", special.get("proj_size", 0), least=0)
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size must be smaller than hidden_size={hidden_size}, got {self.proj_size}"
            )
        self.bias = bool(bias)
        self.batch_first = bool(batch_first)
        self.dropout = check_probability("dropout", dropout)
        self.bidirectional = bool(bidirectional)
        config = {
            "input_size": self.input_size, "hidden_size": self.hidden_size, "num_layers": self.num_layers,
            "bias": self.bias, "batch_first": self.batch_first, "dropout": self.dropout,
            "bidirectional": self.bidirectional, **special,
        }  # fmt: skip
        super().__init__(config, backend, dtype)

    # ------------------------------------------------------------------------------ the public calls

    def __call__(self, x: Array, state: State = None, *, lengths: Any = None) -> tuple[Array, State]:
        """Run the sequence; nothing is kept for a backward pass.

        Parameters
        ----------
        x : array (T, B, I), (B, T, I) with batch_first, or (T, I) without a batch
            Or integers of one dimension less, which mean one-hot vectors of size `input_size`.
        state : array or pair of arrays (L*D, B, H), optional
            The initial state; zeros by default. Without a batch (L*D, H). Of an LSTM the pair (h_0, c_0),
            h_0 of size P and c_0 of size H.
        lengths : array or list of B integers in [0, T], optional
            How many time steps each sequence has. What lies behind is never read.

        Returns
        -------
        output : array (T, B, D*P)
            Of the last layer; laid out like x; zero from a sequence's length on.
        state : array or pair of arrays (L*D, B, H)
            After each sequence's last step.

        Raises
        ------
        ValueError
            A shape, a length or a token does not fit.
        TypeError
            An argument is of the wrong kind: another dtype, another device, not an array.
        """
        with self._backend.active():
            call = self._check(x, lengths, self.batch_first)
            output, states, _ = self._run(call, self._check_states("state", state, call), save=False)
            return call.as_given(output), self._present_state(call, states)

    def vjp(
        self, x: Array, state: State = None, *, lengths: Any = None, seed: int | None = None
    ) -> tuple[tuple[Array, State], Pullback]:
        """Run the sequence for training and return the way back (a vector-Jacobian product).

        Parameters
        ----------
        x, state, lengths
            As in a plain call.
        seed : int, optional
            Fixes the dropout masks; needed when `dropout` > 0 and there are several layers.

        Returns
        -------
        (output, state)
            As from a plain call, but with dropout.
        pullback : callable
            ``pullback(d_output, d_state=None)`` returns `Gradients`: ``x``, ``params`` and ``state``.
            Either argument may be None, which means zeros. It can be called once, since it reuses its
            buffers; a second call raises RuntimeError. Until then neither x, output nor the parameters
            may be changed in place.
        """
        if seed is None and self._drops:
            raise ValueError("vjp needs seed= when dropout > 0: the same seed gives the same masks")
        with self._backend.active():
            call = self._check(x, lengths, self.batch_first)
            # A copy: the way back reads it, and a caller may reset his own in the meantime.
            copy = self._backend.xp.asarray
            initial = [copy(part, copy=True) for part in self._check_states("state", state, call)]
            output, states, tape = self._run(call, initial, save=True, seed=resolve_seed(seed))
        shape = tuple(output.shape)

        def pullback(d_output: Array | None, d_state: State = None) -> Gradients:
            with self._backend.active():
                if not tape:
                    raise RuntimeError("this pullback was called before; call vjp again for another")
                d_out = self._check_d_output(d_output, call, shape)
                return self._run_back(call, tape, d_out, self._check_states("d_state", d_state, call))

        return (call.as_given(output), self._present_state(call, states)), pullback

    def step(self, x_t: Array, state: State = None) -> tuple[Array, State]:
        """Run a single time step: streaming.

        Parameters
        ----------
        x_t : array (B, I) or (I,)
            Or integers (B,) or ().
        state : as returned by the step before; None at first

        Returns
        -------
        y_t : array (B, P) or (P,)
        state
            For the next step. Any cutting of a sequence into steps gives the same numbers.

        Raises
        ------
        ValueError
            The layer is bidirectional: its output depends on the future.
        """
        if self.bidirectional:
            raise ValueError("step needs bidirectional=False: the reverse direction begins in the future")
        if self._fits_quick_step(x_t, state):
            return self._quick_step(x_t, state)
        with self._backend.active():
            x_t = self._backend.accept(x_t, "x_t")
            tokens = is_integer(x_t)
            if x_t.ndim + tokens not in (1, 2) or (not tokens and x_t.shape[-1] != self.input_size):
                wanted = "(B,) of integers" if tokens else f"(B, input_size={self.input_size})"
                raise ValueError(f"x_t must have shape {wanted}, got {tuple(x_t.shape)}")
            call = self._check(x_t[None, ...], None, batch_first=False)
            output, states, _ = self._run(call, self._check_states("state", state, call), save=False)
            return call.as_given(output)[0, ...], self._present_state(call, states)

    def explain(self) -> str:
        """Say which kernel serves this layer, and why not a faster one."""
        kernels = self._kernels()
        lines = [f"{self!r}"]
        for name in names_of(self._cell):
            lines.append(f"  {name}: {kernels.modules[name]}")
            lines += [f"    {note}" for note in [kernels.note(name)] if note]
            lines += [f"    not {module}: {reason}" for module, reason in kernels.refused[name].items()]
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------- streaming

    def _fits_quick_step(self, x_t: Any, state: State) -> bool:
        """Whether this is the plain case of a stream: NumPy arrays (B, I) and state, all as they should be.

        All else, errors included, takes the general way.
        """
        dtype = self._params.flat.dtype
        if type(x_t) is not np.ndarray or x_t.ndim != 2 or x_t.dtype != dtype or self._dtype == "float16":
            return False
        parts = state if isinstance(state, tuple) else (state,)
        sizes, _ = self._state_sizes()
        if x_t.shape[1] != self.input_size or len(parts) != len(sizes):
            return False
        return all(
            type(part) is np.ndarray and part.dtype == dtype and part.flags.c_contiguous
            and part.shape == (self.num_layers, len(x_t), size)
            for part, size in zip(parts, sizes, strict=True)
        )  # fmt: skip

    def _quick_step(self, x_t: Array, state: State) -> tuple[Array, State]:
        """Do what `_run` does, without what a single step of NumPy arrays has no need of.

        It halves the time of a call: 43 instead of 87 us (LSTM, B = 1, H = 64, on a busy Zen 3).
        """
        states = state if isinstance(state, tuple) else (state,)
        forward = self._kernels()[f"{self._cell}_forward"]
        finals = []
        for layer in range(self.num_layers):
            suffix = f"_l{layer}"
            gates = np.dot(x_t, self._params[f"weight_ih{suffix}"].T)
            if self.bias:
                gates += self._gate_bias(suffix)
            output, *final, _ = forward(
                gates[None], *[kind[layer] for kind in states], self._params[f"weight_hh{suffix}"],
                **self._scan_options(suffix), save=False,
            )  # fmt: skip
            x_t = output[0]
            finals.append(final)
        kinds = [list(kind) for kind in zip(*finals, strict=True)]
        state = [kind[0][None] if len(kind) == 1 else np.stack(kind) for kind in kinds]
        return x_t, state[0] if len(state) == 1 else tuple(state)

    # -------------------------------------------------------------------------------------- forward

    def _run(
        self, call: SequenceInput, states: list[Array], *, save: bool, seed: int = 0
    ) -> tuple[Array, list[list[Array]], Tape]:
        """Return output, the final states of each kind by layer and direction, and the tape."""
        xp, kernels = self._backend.xp, self._kernels()
        forward = kernels[f"{self._cell}_forward"]
        finals: list[list[Array]] = [[] for _ in self._state_names]
        tape: Tape = []
        x = call.x
        for layer in range(self.num_layers):
            scale = None
            if save and layer and self._drops:
                scale = dropout_scale(x, xp, self.dropout, seed, f"dropout_l{layer - 1}")
                x = x * scale
            scans = []
            for direction in range(self._directions):
                k = layer * self._directions + direction
                suffix = self._suffix(layer, direction)
                initial = [self._backend.contiguous(kind[k, :, :]) for kind in states]
                output, *final, saved = forward(
                    self._input_projection(x, suffix), *initial, self._params[f"weight_hh{suffix}"],
                    **self._scan_options(suffix), lengths=call.lengths, reverse=direction == 1, save=save,
                )  # fmt: skip
                for collected, value in zip(finals, final, strict=True):
                    collected.append(value)
                scans.append(Scanned(x, initial[0], output, saved))
            x = scans[0].output if len(scans) == 1 else xp.concat([scan.output for scan in scans], axis=-1)
            if save:
                tape.append((scale, scans))
        return x, finals, tape

    def _input_projection(self, x: Array, suffix: str) -> Array:
        """Return gates (T, B, G*H): the input's share of all time steps at once, with the biases."""
        xp = self._backend.xp
        T, B = x.shape[:2]
        weight_ih = self._params[f"weight_ih{suffix}"]
        weight = weight_ih.T
        if is_integer(x):
            # Rows of the transposed table are quick to gather, but to transpose it costs as much as V rows.
            rows, few = xp.reshape(x, (-1,)), self.input_size > T * B
            gates = (
                self._backend.contiguous(xp.take(weight_ih, rows, axis=1).T)
                if few
                else xp.take(weight, rows, axis=0)
            )
            gates = xp.astype(gates, self._backend.dtype(accumulation_dtype(self._dtype)), copy=False)
        else:
            gates = self._matmul(xp.reshape(x, (T * B, x.shape[2])), weight)
        if self.bias:
            gates += self._gate_bias(suffix)
        return xp.reshape(gates, (T, B, self._gates * self.hidden_size))

    def _gate_bias(self, suffix: str) -> Array:
        """Return the bias (G*H,) that can be added before the scan."""
        return self._params[f"bias_ih{suffix}"] + self._params[f"bias_hh{suffix}"]

    def _scan_options(self, suffix: str) -> dict[str, Any]:
        """Return the keywords that this cell's forward kernel needs beyond the common ones."""
        return {}

    # ------------------------------------------------------------------------------------- backward

    def _run_back(
        self, call: SequenceInput, tape: Tape, d_output: Array,
        d_states: list[Array],
    ) -> Gradients:  # fmt: skip
        d_initial: list[list[Array]] = [[] for _ in self._state_names]
        d_params: dict[str, Array] = {}
        d_x = d_output
        for layer in reversed(range(self.num_layers)):
            scale, scans = tape.pop()  # a layer's buffers are free as soon as it is done
            d_y, d_x, P = d_x, None, scans[0].output.shape[-1]
            for direction in reversed(range(self._directions)):
                k = layer * self._directions + direction
                scan = scans.pop()
                d_part = d_y if self._directions == 1 else d_y[:, :, direction * P : (direction + 1) * P]
                d_in, d_0 = self._scan_back(
                    call, scan, self._suffix(layer, direction), direction == 1,
                    self._backend.contiguous(d_part),
                    [self._backend.contiguous(d_state[k, :, :]) for d_state in d_states], d_params,
                )  # fmt: skip
                if d_in is not None:
                    d_x = d_in if d_x is None else d_x + d_in
                for kind, value in zip(d_initial, d_0, strict=True):
                    kind.insert(0, value)
            if scale is not None:
                d_x = d_x * scale
        params = join({name: d_params[name] for name in self._params}, self._params.flat.dtype)
        d_x = None if d_x is None else call.as_given(d_x)
        return Gradients(d_x, params, self._present_state(call, d_initial))

    def _scan_back(
        self, call: SequenceInput, scan: Scanned, suffix: str, reverse: bool, d_output: Array,
        d_final: list[Array], d_params: dict[str, Array],
    ) -> tuple[Array | None, list[Array]]:  # fmt: skip
        """Return d_x and the gradients of the initial states; put those of the parameters in `d_params`."""
        xp, params = self._backend.xp, self._params
        weight_hr = self._scan_options(suffix).get("weight_hr")
        extra = {} if weight_hr is None else {"weight_hr": weight_hr}
        backward = self._kernels()[f"{self._cell}_backward"]
        d_gates, *rest = backward(scan.saved, params[f"weight_hh{suffix}"], d_output, *d_final, **extra)
        d_0, special = rest[: len(d_final)], rest[len(d_final) :]
        T, B, GH = d_gates.shape
        rows = xp.reshape(d_gates, (T * B, GH))

        if is_integer(scan.x):
            d_x = None
            case = Case("embedding", self._dtype, GH, device=self.backend)
            scatter = kernels_for(self._backend.library, case)["embedding_backward"]
            tokens = xp.reshape(scan.x, (-1,))
            d_params[f"weight_ih{suffix}"] = xp.matrix_transpose(scatter(rows, tokens, self.input_size))
        else:
            weight_ih = params[f"weight_ih{suffix}"]
            d_x = xp.astype(self._matmul(rows, weight_ih), d_output.dtype, copy=False)
            d_x = xp.reshape(d_x, scan.x.shape)
            x = xp.reshape(scan.x, (T * B, scan.x.shape[2]))
            d_params[f"weight_ih{suffix}"] = self._matmul(xp.matrix_transpose(rows), x)
        d_bias = xp.sum(rows, axis=0) if self.bias else None

        self._recurrent_gradients(call, scan, suffix, reverse, d_gates, special, d_bias, d_params)
        return d_x, d_0

    def _recurrent_gradients(
        self, call: SequenceInput, scan: Scanned, suffix: str, reverse: bool, d_gates: Array,
        special: list[Array], d_bias: Array | None, d_params: dict[str, Array],
    ) -> None:  # fmt: skip
        """Put the gradients of the recurrent parameters and both biases in `d_params`."""
        d_params[f"weight_hh{suffix}"] = self._recurrent_weight_gradient(call, scan, reverse, d_gates)
        if d_bias is not None:
            d_params[f"bias_ih{suffix}"] = d_params[f"bias_hh{suffix}"] = d_bias

    def _recurrent_weight_gradient(
        self, call: SequenceInput, scan: Scanned, reverse: bool, d_z: Array
    ) -> Array:
        """Return sum over t of d_z[t]^T h[t-1], where h[-1] is h_0, without ever shifting a copy of h.

        One product of everything but the first step with the outputs, which are zero where a sequence is
        over, and one of the first step with h_0.
        """
        xp = self._backend.xp
        T, B, N = d_z.shape
        P = scan.output.shape[2]
        if not reverse:
            first, later, before = d_z[0, :, :], d_z[1:, :, :], scan.output[:-1, :, :]
        else:
            later, before = d_z[:-1, :, :], scan.output[1:, :, :]
            if call.lengths is None:
                first = d_z[-1, :, :]
            else:
                last = xp.where(call.lengths > 0, call.lengths - 1, xp.zeros_like(call.lengths))
                batch = xp.arange(B, dtype=last.dtype, device=last.device)
                first = xp.take(xp.reshape(d_z, (T * B, N)), last * B + batch, axis=0)
        gradient = self._matmul(xp.matrix_transpose(first), scan.h_0)
        if T > 1:
            later = xp.reshape(later, ((T - 1) * B, N))
            gradient += self._matmul(xp.matrix_transpose(later), xp.reshape(before, ((T - 1) * B, P)))
        return gradient

    # ----------------------------------------------------------------------------------- validation

    def _check(self, x: Any, lengths: Any, batch_first: bool) -> SequenceInput:
        return check_sequence(x, lengths, self._backend, self._dtype, self.input_size, batch_first)

    def _check_states(self, argument: str, state: State, call: SequenceInput) -> list[Array]:
        """Return each kind of state, h and c, as (L*D, B, .); None means zeros, as a whole or in part."""
        layers, B = self.num_layers * self._directions, call.x.shape[1]
        kinds = zip(self._state_names, self._state_parts(argument, state), *self._state_sizes(), strict=True)
        checked = []
        for name, part, size, dtype in kinds:
            if part is None:
                checked.append(self._backend.zeros((layers, B, size), dtype))
                continue
            if dtype != self._dtype and self._backend.owns(part) and part.dtype == self._params.flat.dtype:
                part = self._backend.xp.astype(part, self._backend.dtype(dtype))  # a half c: widened, exact
            shape = (layers, B, size) if call.batched else (layers, size)
            name = name if argument == "state" else f"{argument}[{name!r}]"
            array = check_float(name, part, shape, self._backend, dtype)
            checked.append(array if call.batched else array[:, None, :])
        return checked

    def _check_d_output(self, d_output: Any, call: SequenceInput, shape: tuple[int, ...]) -> Array:
        """Return d_output as (T, B, D*P), zero in the padding."""
        if d_output is None:
            return self._backend.zeros(shape, self._dtype)
        wanted = call.given_shape(shape[2])
        d_output = call.time_first(check_float("d_output", d_output, wanted, self._backend, self._dtype))
        return d_output if call.lengths is None else zero_padding(d_output, call.lengths)

    def _state_parts(self, argument: str, state: State) -> tuple[Any, ...]:
        return (state,)

    # --------------------------------------------------------------------------------------- pieces

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _drops(self) -> bool:
        return self.dropout > 0.0 and self.num_layers > 1

    def _state_sizes(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the last axis and the dtype of each state."""
        return (self.hidden_size,), (self._dtype,)

    def _kernels(self) -> Kernels:
        case = Case(
            self._cell, self._dtype, self.hidden_size, self.proj_size,
            self._config.get("nonlinearity", "tanh"), self.backend,
        )  # fmt: skip
        return kernels_for(self._backend.library, case)

    def _suffix(self, layer: int, direction: int) -> str:
        return f"_l{layer}" + ("_reverse" if direction else "")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        H, P, D = self.hidden_size, self.proj_size or self.hidden_size, self._directions
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            for direction in range(D):
                suffix = self._suffix(layer, direction)
                shapes[f"weight_ih{suffix}"] = (self._gates * H, self.input_size if layer == 0 else D * P)
                shapes[f"weight_hh{suffix}"] = (self._gates * H, P)
                if self.bias:
                    shapes[f"bias_ih{suffix}"] = shapes[f"bias_hh{suffix}"] = (self._gates * H,)
                if self.proj_size:
                    shapes[f"weight_hr{suffix}"] = (P, H)
        return shapes

    def _initial(self, seed: int | None) -> dict[str, np.ndarray[Any, Any]]:
        return initial_uniform(self._shapes(), 1.0 / math.sqrt(self.hidden_size), resolve_seed(seed))

    def _present_state(self, call: SequenceInput, kinds: list[list[Array]]) -> State:
        stack = self._backend.xp.stack
        stacked = [kind[0][None, ...] if len(kind) == 1 else stack(kind) for kind in kinds]
        if not call.batched:
            stacked = [kind[:, 0, :] for kind in stacked]
        return stacked[0] if len(stacked) == 1 else tuple(stacked)
