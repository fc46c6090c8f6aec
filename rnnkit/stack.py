"""What RNN, LSTM and GRU share: the public calls, and the layers on top of each other.

One direction of one layer is in `rnnkit.direction`, the cells are in `rnnkit.recurrent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from ._array import is_integer
from ._random import dropout_scale
from ._typing import Array
from .direction import Direction, Recorded, backward_both, forward_both
from .kernels import Case, Kernels, kernels_for, names_of
from .parameters import Gradients, Layer, ParameterDict, initial_uniform
from .sequence import SequenceInput, check_sequence
from .validation import check_float, check_probability, check_size, resolve_seed, zero_padding

State = Any  # h, or (h, c) for an LSTM
Pullback = Callable[..., Gradients]


# A layer's dropout factors (None without) and its directions, from the first layer to the last.
Tape = list[tuple[Array | None, list[Recorded]]]


class Stack(Layer):
    """What the three cells share. A subclass names its gates, its states and its kernels."""

    _cell: ClassVar[str]
    _gates: ClassVar[int]
    _direction: ClassVar[type[Direction]] = Direction
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

    def __call__(
        self, x: Array, state: State = None, *, lengths: Any = None, embedding: Array | None = None
    ) -> tuple[Array, State]:
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
        embedding : array (V, I), optional
            With integer x, the vectors that the integers stand for: the same as ``x=embedding[x]``, but
            each of them is multiplied with the weights at most once, however often it occurs.

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
            call = self._check(x, state, lengths, embedding)
            output, states, _ = self._run(call, self._check_states("state", state, call), save=False)
            return call.as_given(output), self._present_state(call, states)

    def vjp(
        self, x: Array, state: State = None, *, lengths: Any = None, embedding: Array | None = None,
        seed: int | None = None,
    ) -> tuple[tuple[Array, State], Pullback]:  # fmt: skip
        """Run the sequence for training and return the way back (a vector-Jacobian product).

        Parameters
        ----------
        x, state, lengths, embedding
            As in a plain call.
        seed : int, optional
            Fixes the dropout masks; needed when `dropout` > 0 and there are several layers.

        Returns
        -------
        (output, state)
            As from a plain call, but with dropout.
        pullback : callable
            ``pullback(d_output, d_state=None)`` returns `Gradients`: ``x``, ``params`` and ``state``; with
            an embedding, ``x`` is its gradient (V, I).
            Either argument may be None, which means zeros. It can be called once, since it reuses its
            buffers; a second call raises RuntimeError. Until then neither x, output nor the parameters
            may be changed in place.
        """
        if seed is None and self._drops:
            raise ValueError("vjp needs seed= when dropout > 0: the same seed gives the same masks")
        with self._backend.active():
            call = self._check(x, state, lengths, embedding)
            initial = self._check_states("state", state, call)
            if state is not None:
                # A copy: the way back reads it, and a caller may reset his own in the meantime.
                initial = [self._backend.xp.asarray(part, copy=True) for part in initial]
            output, states, tape = self._run(call, initial, save=True, seed=resolve_seed(seed))
            result = call.as_given(output), self._present_state(call, states)
        shape = tuple(output.shape)

        def pullback(d_output: Array | None, d_state: State = None) -> Gradients:
            with self._backend.active():
                if not tape:
                    raise RuntimeError("this pullback was called before; call vjp again for another")
                d_out = self._check_d_output(d_output, call, shape)
                return self._run_back(call, tape, d_out, self._check_states("d_state", d_state, call))

        return result, pullback

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
            call = self._check(x_t[None, ...], state, batch_first=False)
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
        """Whether this is the plain case of a stream: NumPy arrays x_t (B, I) and state, all as is right.

        All else, errors included, takes the general way.
        """
        dtype = self._step_dtype
        if type(x_t) is not np.ndarray or x_t.dtype != dtype or x_t.ndim != 2:
            return False
        B, features = x_t.shape
        parts = state if isinstance(state, tuple) else (state,)
        if features != self.input_size or len(parts) != len(self._step_sizes):
            return False
        for part, size in zip(parts, self._step_sizes, strict=True):
            if type(part) is not np.ndarray or part.dtype != dtype:
                return False
            if part.shape != (self.num_layers, B, size):
                return False
        return True

    def _quick_step(self, x_t: Array, state: State) -> tuple[Array, State]:
        """Do what `_run` does, without what a single step of NumPy arrays has no need of."""
        states, kernels = state if isinstance(state, tuple) else (state,), self._kernels()
        if self.num_layers == 1:
            x_t, final = self._directions[0][0].step(kernels, x_t, list(states))
        else:
            finals = []
            for layer, (direction,) in enumerate(self._directions):
                x_t, own = direction.step(kernels, x_t, [kind[layer : layer + 1] for kind in states])
                finals.append(own)
            final = [np.concatenate(kind) for kind in zip(*finals, strict=True)]
        return x_t, final[0] if len(final) == 1 else tuple(final)

    # ------------------------------------------------------------------------------ there and back

    def _run(
        self, call: SequenceInput, states: list[Array], *, save: bool, seed: int = 0
    ) -> tuple[Array, list[list[Array]], Tape]:
        """Return output, the final states of each kind by layer and direction, and the tape."""
        kernels, x = self._kernels(), call.x
        tape: Tape = []
        finals: list[list[Array]] = [[] for _ in self._state_names]
        for layer in range(self.num_layers):
            scale = None
            if save and layer and self._drops:
                scale = dropout_scale(x, self._backend.xp, self.dropout, seed, f"dropout_l{layer - 1}")
                x = x * scale
            outputs, recorded = [], []
            for output, final, record in self._run_layer(kernels, layer, x, states, call, save):
                for collected, value in zip(finals, final, strict=True):
                    collected.append(value)
                outputs.append(output)
                if record is not None:
                    recorded.append(record)
            x = outputs[0] if len(outputs) == 1 else self._backend.xp.concat(outputs, axis=-1)
            if save:
                tape.append((scale, recorded))
        return x, finals, tape

    def _run_layer(
        self, kernels: Kernels, layer: int, x: Array, states: list[Array], call: SequenceInput, save: bool
    ) -> list[tuple[Array, list[Array], Recorded | None]]:
        """Return what each direction of a layer does; they run at once where a kernel gains from that."""
        directions = self._directions[layer]
        both = self._both(kernels, "forward", call)
        if both is not None:
            initial = [self._of(states, layer, k) for k in range(len(directions))]
            return forward_both(directions, both, x, initial, call, save=save)
        return [
            direction.forward(kernels, x, self._of(states, layer, k), call, save=save)
            for k, direction in enumerate(directions)
        ]

    def _both(self, kernels: Kernels, way: str, call: SequenceInput) -> Callable[..., Any] | None:
        """Return the kernel for both directions of a layer at once, or None."""
        return kernels.both(f"{self._cell}_{way}", *call.x.shape[:2]) if self.bidirectional else None

    def _of(self, kinds: list[Array], layer: int, k: int) -> list[Array]:
        """Return a direction's part (B, .) of each kind of state (L*D, B, .)."""
        at = layer * (1 + self.bidirectional) + k
        return [self._backend.contiguous(kind[at, :, :]) for kind in kinds]

    def _run_back(self, call: SequenceInput, tape: Tape, d_output: Array, d_states: list[Array]) -> Gradients:
        kernels, d_x = self._kernels(), d_output
        # Every direction writes its own part of it.
        d_params = ParameterDict(self._backend.xp.empty_like(self._params.flat), self._params.shapes)
        d_initial: list[list[Array]] = [[] for _ in self._state_names]
        for layer in reversed(range(self.num_layers)):
            scale, recorded = tape.pop()  # a layer's buffers are free as soon as it is done
            d_y, d_x = d_x, None
            for d_in, d_0 in self._run_layer_back(kernels, layer, recorded, d_y, d_states, call, d_params):
                if d_in is not None:
                    d_x = d_in if d_x is None else d_x + d_in
                for kind, value in zip(d_initial, d_0, strict=True):
                    kind.insert(0, value)
            if scale is not None:
                d_x = d_x * scale
        if d_x is not None and call.embedding is None:
            d_x = call.as_given(d_x)
        return Gradients(d_x, d_params, self._present_state(call, d_initial))

    def _run_layer_back(
        self, kernels: Kernels, layer: int, recorded: list[Recorded], d_y: Array, d_states: list[Array],
        call: SequenceInput, d_params: ParameterDict,
    ) -> Iterator[tuple[Array | None, list[Array]]]:  # fmt: skip
        """Yield what each direction of a layer returns, the last first; each has a part of d_y."""
        directions, P = self._directions[layer], recorded[0].output.shape[-1]

        def incoming(k: int) -> tuple[Array, list[Array]]:
            d_part = d_y[:, :, k * P : (k + 1) * P] if self.bidirectional else d_y
            return self._backend.contiguous(d_part), self._of(d_states, layer, k)

        both = self._both(kernels, "backward", call)
        scanned = both and backward_both(directions, both, recorded, [incoming(0), incoming(1)])
        for k in reversed(range(len(directions))):
            own = self._local(d_params, layer, k)
            if scanned is None:
                yield directions[k].backward(kernels, recorded.pop(), *incoming(k), call, own)
            else:
                yield directions[k].gradients(scanned.pop(), len(d_states), recorded.pop(), call, own)

    # ----------------------------------------------------------------------------------- validation

    def _check(
        self, x: Any, state: State, lengths: Any = None, embedding: Any = None,
        batch_first: bool | None = None,
    ) -> SequenceInput:  # fmt: skip
        return check_sequence(
            x, lengths, embedding, self._backend, self._dtype, self.input_size,
            self.batch_first if batch_first is None else batch_first, has_state=state is not None,
        )  # fmt: skip

    def _check_states(self, argument: str, state: State, call: SequenceInput) -> list[Array]:
        """Return each kind of state, h and c, as (L*D, B, .); None means zeros, as a whole or in part."""
        layers, B = self.num_layers * (1 + self.bidirectional), call.x.shape[1]
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
    def _drops(self) -> bool:
        return self.dropout > 0.0 and self.num_layers > 1

    def _state_sizes(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the last axis and the dtype of each state."""
        return (self.hidden_size,), (self._dtype,)

    def _kernels(self) -> Kernels:
        return kernels_for(self._backend.library, self._case)

    def _adopt(self, params: ParameterDict) -> None:
        super()._adopt(params)
        # What a quick step asks for. Half precision keeps c in another dtype: it takes the general way.
        self._step_dtype = None if self._dtype == "float16" else self._params.flat.dtype
        self._step_sizes = self._state_sizes()[0]
        self._case = Case(
            self._cell, self._dtype, self.hidden_size, self.proj_size,
            self._config.get("nonlinearity", "tanh"), self.backend,
        )  # fmt: skip

        def direction(layer: int, k: int) -> Direction:
            own = self._local(params, layer, k)
            return self._direction(self._case, self._backend, own, k == 1, self._matmul)

        self._directions = [
            [direction(layer, k) for k in range(1 + self.bidirectional)] for layer in range(self.num_layers)
        ]

    def _names(self, layer: int, direction: int) -> dict[str, str]:
        """Return the names of a direction's parameters by their names without layer and direction."""
        local = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * self.bias
        local += ["weight_hr"] * bool(self.proj_size)
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        return {name: name + suffix for name in local}

    def _local(self, params: ParameterDict, layer: int, direction: int) -> dict[str, Array]:
        return {local: params[name] for local, name in self._names(layer, direction).items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        H, P, D = self.hidden_size, self.proj_size or self.hidden_size, 1 + self.bidirectional
        GH = self._gates * H
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            own = {
                "weight_ih": (GH, self.input_size if layer == 0 else D * P), "weight_hh": (GH, P),
                "bias_ih": (GH,), "bias_hh": (GH,), "weight_hr": (P, H),
            }  # fmt: skip
            for k in range(D):
                shapes |= {name: own[local] for local, name in self._names(layer, k).items()}
        return shapes

    def _initial(self, seed: int | None) -> dict[str, np.ndarray[Any, Any]]:
        return initial_uniform(self._shapes(), 1.0 / math.sqrt(self.hidden_size), resolve_seed(seed))

    def _present_state(self, call: SequenceInput, kinds: list[list[Array]]) -> State:
        stack = self._backend.xp.stack
        stacked = [kind[0][None, ...] if len(kind) == 1 else stack(kind) for kind in kinds]
        if not call.batched:
            stacked = [kind[:, 0, :] for kind in stacked]
        return stacked[0] if len(stacked) == 1 else tuple(stacked)
