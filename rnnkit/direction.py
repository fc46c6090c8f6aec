"""One direction of one layer: the scan and the large matrix products around it, there and back.

What does not depend on the state before is computed for all time steps at once: the input's share of the
gates on the way there; on the way back the gradients of the input and of all parameters, from the gradient
of the gates that the scan returns. The scans themselves lie behind the seam in `rnnkit.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ._array import Backend, accumulation_dtype, is_integer
from ._typing import Array
from .kernels import Case, Kernels, kernels_for
from .sequence import SequenceInput

# Multiplications up to which a kernel for short sequences is taken; what each step of each sequence costs
# besides, in multiplications; the steps up to which it always is. Microseconds of an LSTM without and with
# it (Zen 3, one thread of a busy machine), (T, B, I=H): (100, 1, 64) 371 and 315, (1, 32, 128) 380 and 348,
# (1, 8, 256) 441 and 337. Many steps of few units: (100, 8, 16) 221 and 297. Few of many units, whose weights
# the other kernels pack for each call: (1, 1, 1024) 4739 and 1589, (1, 4, 1024) 6576 and 4607; on two threads
# (1, 4, 1024) 5141 and 4284, but (1, 8, 1024) 6493 and 8863.
_SHORT, _PER_STEP, _FEW_STEPS = 4_500_000, 4_000, 4


class Recorded(NamedTuple):
    """What the way back needs of the way there.

    Attributes
    ----------
    rows : array (n, I), or integers (n,)
        The input of all steps: of the live ones alone where the call packs them.
    h_0 : array (B, P) or None
        None means zeros.
    output : array (T, B, P)
    saved
        The kernel's own.
    """

    rows: Array
    h_0: Array | None
    output: Array
    saved: Any


class Direction:
    """One direction of one layer of an RNN, and what those of the other cells share.

    Parameters
    ----------
    case : Case
        What the kernels are chosen by.
    backend : Backend
    params : mapping of str to array
        The parameters by their names without layer and direction, such as ``weight_ih``: views, so that
        what changes there changes here.
    reverse : bool
        Whether the scan runs from a sequence's last step to its first.
    matmul : callable
        The seam's: ``matmul(a, b, out=None)``.
    """

    def __init__(
        self, case: Case, backend: Backend, params: Mapping[str, Array], reverse: bool,
        matmul: Callable[..., Array],
    ):  # fmt: skip
        self._case, self._backend, self._params = case, backend, params
        self._reverse, self._matmul = reverse, matmul
        self._weight_ih, self._weight_hh = params["weight_ih"], params["weight_hh"]
        self._weight_ih_transposed = backend.xp.matrix_transpose(self._weight_ih)
        self._has_bias = "bias_ih" in params
        self._wide = accumulation_dtype(case.dtype)
        self._options = self._scan_options()
        self._short = f"{case.cell}_short"
        work = math.prod(self._weight_ih.shape) + math.prod(self._weight_hh.shape) + _PER_STEP
        self._short_steps = max(_SHORT // work, _FEW_STEPS)
        no_bias = self._weight_hh[:0, 0]
        biases = (params.get(name, no_bias) for name in ("bias_ih", "bias_hh"))
        self._short_params = (self._weight_ih, self._weight_hh, *biases)
        self._short_options = self._options if case.cell == "rnn" else {}

    # ------------------------------------------------------------------------------------- forward

    def forward(
        self, kernels: Kernels, x: Array, states: list[Array], call: SequenceInput, *, save: bool
    ) -> tuple[Array, list[Array], Recorded | None]:
        """Return the output (T, B, P), the final states (B, .), and what the way back needs."""
        if self._short in kernels.functions and not (save or self._reverse or call.lengths is not None):
            short = self._run_short(kernels, x, [state[None] for state in states])
            if short is not None:
                return short[0], [state[0] for state in short[1]], None
        rows = self._input_rows(x, call)
        layer = kernels.functions.get(f"{self._case.cell}_layer")
        if layer is None:
            scan, options = kernels[f"{self._case.cell}_forward"], self._options
            source = self._gates(rows, call)
        else:
            scan, (source, options) = layer, self._input_of_layer(x, rows, call)
        scanned = scan(
            source, *states, self._weight_hh, **options, lengths=call.lengths, reverse=self._reverse,
            save=save,
        )  # fmt: skip
        return self._record(scanned, rows, states, call)

    def _input_rows(self, x: Array, call: SequenceInput) -> Array:
        """Return x (T, B, I), or integers (T, B), as rows; only those of live steps if the call packs."""
        T, B, *features = x.shape
        rows = self._backend.xp.reshape(x, (T * B, *features))
        return rows if call.live is None else self._backend.xp.take(rows, call.live.index, axis=0)

    def _gates(self, rows: Array, call: SequenceInput) -> Array:
        """Return what the input adds to the gates, (T, B, G*H), from all its rows."""
        (T, B), gates = call.x.shape[:2], self.input_share(rows, call.embedding)
        if call.live is not None:
            gates = self._backend.put_rows(gates, call.live.index, T * B)
        return self._backend.xp.reshape(gates, (T, B, gates.shape[1]))

    def _record(
        self, scanned: tuple[Any, ...], rows: Array, states: list[Array], call: SequenceInput
    ) -> tuple[Array, list[Array], Recorded | None]:
        """Return what `forward` does, from what the kernel returned."""
        output, *final, saved = scanned
        if saved is None:
            return output, final, None
        return output, final, Recorded(rows, states[0] if call.has_state else None, output, saved)

    def _input_of_layer(self, x: Array, rows: Array, call: SequenceInput) -> tuple[Array, dict[str, Any]]:
        """Return the input of a kernel that includes the input projection, and all its keywords."""
        options: dict[str, Any] = {**self._options, "bias": self._gate_bias() if self._has_bias else None}
        index = None if call.live is None else call.live.positions
        if not is_integer(rows):
            source = self._backend.xp.reshape(rows, x.shape) if index is None else rows
            return source, {**options, "index": index, "weight_ih": self._weight_ih}
        few = rows.shape[0] < self._table_length(call.embedding)
        if call.embedding is not None and few:
            return call.embedding, {**options, "index": x, "weight_ih": self._weight_ih}
        shares = self._shares_of_tokens(rows if few else None, call.embedding)
        if few and index is None:
            shares = self._backend.xp.reshape(shares, (*x.shape, shares.shape[1]))
        return shares, {**options, "index": index if few else x}

    def step(self, kernels: Kernels, x_t: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        """Return the output (B, P) and the states (1, B, .) after one step x_t (B, I), of NumPy arrays."""
        short = self._run_short(kernels, x_t[None], states)
        if short is not None:
            return short[0][0], short[1]
        initial = [np.ascontiguousarray(state[0]) for state in states]
        output, *final, _ = kernels[f"{self._case.cell}_forward"](
            self.input_share(x_t)[None], *initial, self._weight_hh, **self._options, save=False
        )
        return output[0], [state[None] for state in final]

    def _run_short(self, kernels: Kernels, x: Array, states: list[Array]) -> tuple[Array, list[Array]] | None:
        """Return the output (T, B, P) and the states (1, B, .) from the kernel for short sequences.

        None where there is none, where there is too much to do, or where x (T, B, I) or a state is not of the
        kind that it takes.
        """
        run = kernels.functions.get(self._short)
        if run is None or x.ndim != 3 or x.shape[0] * x.shape[1] > self._short_steps:
            return None
        for array in (x, *states):
            if not array.flags.carray:
                return None
        output, *final = run(x, *states, *self._short_params, **self._short_options)
        return output, final

    def input_share(self, rows: Array, embedding: Array | None = None) -> Array:
        """Return (n, G*H), what the input adds to the gates, and the biases.

        Parameters
        ----------
        rows : array (n, I), or integers (n,)
        embedding : array (V, I), optional
            The vectors that the integers stand for; one-hot vectors of length I without it. Where there
            are fewer of them than rows, they are multiplied and the products gathered.
        """
        if not is_integer(rows):
            gates = self._matmul(rows, self._weight_ih_transposed)
            if self._has_bias:
                gates += self._gate_bias()
            return gates
        few = rows.shape[0] < self._table_length(embedding)
        shares = self._shares_of_tokens(rows if few else None, embedding)
        if self._has_bias:
            shares = shares + self._gate_bias()  # not in place: they may be the weights themselves
        return shares if few else self._backend.xp.take(shares, rows, axis=0)

    def _table_length(self, embedding: Array | None) -> int:
        """Return how many tokens there are."""
        return int(self._weight_ih.shape[1] if embedding is None else embedding.shape[0])

    def _shares_of_tokens(self, tokens: Array | None, embedding: Array | None) -> Array:
        """Return (n, G*H) for these tokens, or (V, G*H) for all there are."""
        xp = self._backend.xp
        if embedding is not None:
            vectors = embedding if tokens is None else xp.take(embedding, tokens, axis=0)
            return self._matmul(vectors, self._weight_ih_transposed)
        columns = self._weight_ih if tokens is None else xp.take(self._weight_ih, tokens, axis=1)
        rows = self._backend.contiguous(xp.matrix_transpose(columns))
        return xp.astype(rows, self._backend.dtype(self._wide), copy=False)

    def _gate_bias(self) -> Array:
        """Return the bias (G*H,) that can be added before the scan."""
        return self._params["bias_ih"] + self._params["bias_hh"]

    def _scan_options(self) -> dict[str, Any]:
        """Return the keywords that this cell's forward kernel needs beyond the common ones."""
        return {"nonlinearity": self._case.nonlinearity}

    # ------------------------------------------------------------------------------------ backward

    def backward(
        self, kernels: Kernels, recorded: Recorded, d_output: Array, d_final: list[Array],
        call: SequenceInput, d_params: Mapping[str, Array],
    ) -> tuple[Array | None, list[Array]]:  # fmt: skip
        """Return d_x and the gradients of the initial states; write those of the parameters to `d_params`.

        d_x is (T, B, I); (V, I), the embedding's gradient, for tokens with one; None for one-hot vectors.
        """
        scanned = kernels[f"{self._case.cell}_backward"](
            recorded.saved, self._weight_hh, d_output, *d_final, **self._backward_options()
        )
        return self.gradients(scanned, len(d_final), recorded, call, d_params)

    def gradients(
        self, scanned: tuple[Array, ...], states: int, recorded: Recorded, call: SequenceInput,
        d_params: Mapping[str, Array],
    ) -> tuple[Array | None, list[Array]]:  # fmt: skip
        """Return what `backward` does, from what the kernel returned; the cell has so many states."""
        d_gates, *rest = scanned
        d_initial, special = rest[:states], rest[states:]
        d_rows = self._live_rows(d_gates, call)
        d_x = self._input_gradients(recorded.rows, d_rows, call, d_params)
        d_bias = self._sum(d_rows) if self._has_bias else None
        self._recurrent_gradients(recorded, call, d_rows, d_bias, special, d_params)
        return d_x, d_initial

    def _backward_options(self) -> dict[str, Any]:
        """Return the keywords that this cell's backward kernel needs."""
        return {}

    def _live_rows(self, sequence: Array, call: SequenceInput) -> Array:
        """Return (T, B, N) as rows (T*B, N), or only those of live steps if the call packs them."""
        xp, (T, B, N) = self._backend.xp, sequence.shape
        rows = xp.reshape(sequence, (T * B, N))
        return rows if call.live is None else xp.take(rows, call.live.index, axis=0)

    def _input_gradients(
        self, rows: Array, d_rows: Array, call: SequenceInput, d_params: Mapping[str, Array]
    ) -> Array | None:
        xp, d_weight = self._backend.xp, d_params["weight_ih"]
        if not is_integer(rows):
            self._write_product(d_weight, [(xp.matrix_transpose(d_rows), rows)])
            d_x = xp.astype(self._matmul(d_rows, self._weight_ih), rows.dtype, copy=False)
            T, B = call.x.shape[:2]
            if call.live is not None:
                d_x = self._backend.put_rows(d_x, call.live.index, T * B)
            return xp.reshape(d_x, (T, B, d_x.shape[1]))
        if call.embedding is None:
            write(xp, d_weight, xp.matrix_transpose(self._sum_by_token(d_rows, rows, d_weight.shape[1])))
            return None
        V = call.embedding.shape[0]
        if rows.shape[0] < V:
            vectors = xp.take(call.embedding, rows, axis=0)
            self._write_product(d_weight, [(xp.matrix_transpose(d_rows), vectors)])
            d_embedding = self._sum_by_token(self._matmul(d_rows, self._weight_ih), rows, V)
        else:
            d_shares = self._sum_by_token(d_rows, rows, V)
            self._write_product(d_weight, [(xp.matrix_transpose(d_shares), call.embedding)])
            d_embedding = self._matmul(d_shares, self._weight_ih)
        return xp.astype(d_embedding, call.embedding.dtype, copy=False)

    def _sum_by_token(self, d_rows: Array, tokens: Array, count: int) -> Array:
        """Return (count, N): the sum of the rows of each token."""
        case = Case("embedding", self._case.dtype, d_rows.shape[1], device=self._case.device)
        scatter = kernels_for(self._backend.library, case)["embedding_backward"]
        total: Array = scatter(d_rows, tokens, count)
        return total

    def _recurrent_gradients(
        self, recorded: Recorded, call: SequenceInput, d_rows: Array, d_bias: Array | None,
        special: list[Array], d_params: Mapping[str, Array],
    ) -> None:  # fmt: skip
        """Write the gradients of the recurrent parameters and both biases."""
        self._write_product(d_params["weight_hh"], self._recurrent_products(recorded, call, d_rows))
        if d_bias is not None:
            write(self._backend.xp, d_params["bias_ih"], d_bias)
            write(self._backend.xp, d_params["bias_hh"], d_bias)

    def _recurrent_products(
        self, recorded: Recorded, call: SequenceInput, d_z: Array
    ) -> list[tuple[Array, Array]]:
        """Return the factors of products whose sum is that of d_z[t]^T h[t-1] over all steps.

        Those of all steps but the first with the output of the step before, and where the initial state
        is not zero those of the first step with it; no shifted copy of h is ever made.
        """
        xp, (T, B, P) = self._backend.xp, recorded.output.shape
        if call.live is not None:
            later, before, first, sequence = call.live.halves(self._reverse)
            h = xp.take(xp.reshape(recorded.output, (T * B, P)), before, axis=0)
            products = [(_pick(xp, d_z, later), h)]
            if recorded.h_0 is not None:
                products.append((_pick(xp, d_z, first), xp.take(recorded.h_0, sequence, axis=0)))
        else:
            h, n = recorded.output, (T - 1) * B
            if not self._reverse:
                first, later, h = d_z[:B, :], d_z[B:, :], h[:-1, :, :]
            else:
                first, later, h = d_z[n:, :], d_z[:n, :], h[1:, :, :]
                if call.lengths is not None:
                    first = self._last_steps(d_z, call.lengths)
            products = [(later, xp.reshape(h, (n, P)))] if T > 1 else []
            if recorded.h_0 is not None:
                products.append((first, recorded.h_0))
        return [(xp.matrix_transpose(a), b) for a, b in products]

    def _last_steps(self, d_z: Array, lengths: Array) -> Array:
        """Return (B, N): d_z (T*B, N) at each sequence's last step; of an empty one 0, from t = 0."""
        xp, B = self._backend.xp, lengths.shape[0]
        last = xp.where(lengths > 0, lengths - 1, xp.zeros_like(lengths))
        batch = xp.arange(B, dtype=last.dtype, device=last.device)
        return xp.take(d_z, last * B + batch, axis=0)

    def _sum(self, rows: Array) -> Array:
        """Return the sum (N,) of rows (n, N): as a product, 4.6 and 2.6 ms in NumPy (n=12800, N=1024)."""
        ones = self._backend.xp.ones((1, rows.shape[0]), dtype=rows.dtype, device=rows.device)
        return self._matmul(ones, rows)[0, :]

    def _write_product(self, out: Array, products: list[tuple[Array, Array]]) -> None:
        """Write the sum of some matrix products to `out`; in half precision it is summed up before."""
        if not products:
            out[...] = 0.0
            return
        total = self._matmul(*products[0], out=None if self._wide != self._case.dtype else out)
        for a, b in products[1:]:
            total += self._matmul(a, b)
        if total is not out:
            write(self._backend.xp, out, total)


class LSTMDirection(Direction):
    """One direction of one layer of an LSTM: with a projection if it has one."""

    def _scan_options(self) -> dict[str, Any]:
        return {"weight_hr": self._params["weight_hr"]} if "weight_hr" in self._params else {}

    def _backward_options(self) -> dict[str, Any]:
        return self._options

    def _recurrent_gradients(
        self, recorded: Recorded, call: SequenceInput, d_rows: Array, d_bias: Array | None,
        special: list[Array], d_params: Mapping[str, Array],
    ) -> None:  # fmt: skip
        super()._recurrent_gradients(recorded, call, d_rows, d_bias, special, d_params)
        if special:
            write(self._backend.xp, d_params["weight_hr"], special[0])


class GRUDirection(Direction):
    """One direction of one layer of a GRU, whose recurrent bias of n stands inside the product with r."""

    def _gate_bias(self) -> Array:
        b_ih, b_hh, cut = self._params["bias_ih"], self._params["bias_hh"], 2 * self._case.hidden_size
        return self._backend.xp.concat([b_ih[:cut] + b_hh[:cut], b_ih[cut:]])

    def _scan_options(self) -> dict[str, Any]:
        return {"bias_hn": self._params["bias_hh"][2 * self._case.hidden_size :]} if self._has_bias else {}

    def _recurrent_gradients(
        self, recorded: Recorded, call: SequenceInput, d_rows: Array, d_bias: Array | None,
        special: list[Array], d_params: Mapping[str, Array],
    ) -> None:  # fmt: skip
        xp, cut = self._backend.xp, 2 * self._case.hidden_size
        d_recurrent_n = self._live_rows(special[0], call)
        d_weight = d_params["weight_hh"]
        for part, out in ((d_rows[:, :cut], d_weight[:cut, :]), (d_recurrent_n, d_weight[cut:, :])):
            self._write_product(out, self._recurrent_products(recorded, call, part))
        if d_bias is not None:
            write(xp, d_params["bias_ih"], d_bias)
            write(xp, d_params["bias_hh"], xp.concat([d_bias[:cut], self._sum(d_recurrent_n)]))


def forward_both(
    directions: list[Direction], scan: Callable[..., Any], x: Array, states: list[list[Array]],
    call: SequenceInput, *, save: bool,
) -> list[tuple[Array, list[Array], Recorded | None]]:  # fmt: skip
    """Return what `forward` of each direction of a layer does, by a kernel that runs both at once."""
    rows = directions[0]._input_rows(x, call)
    scanned = scan(
        [one._gates(rows, call) for one in directions],
        *map(list, zip(*states, strict=True)),
        [one._weight_hh for one in directions],
        **{name: [one._options[name] for one in directions] for name in directions[0]._options},
        lengths=call.lengths,
        save=save,
    )
    return [
        one._record(result, rows, initial, call)
        for one, result, initial in zip(directions, scanned, states, strict=True)
    ]


def backward_both(
    directions: list[Direction], scan: Callable[..., Any], recorded: list[Recorded],
    incoming: list[tuple[Array, list[Array]]],
) -> list[tuple[Array, ...]]:  # fmt: skip
    """Return the kernel's results for `gradients` of each direction, from its d_output and d_final."""
    results: list[tuple[Array, ...]] = scan(
        [one.saved for one in recorded],
        [one._weight_hh for one in directions],
        [d_output for d_output, _ in incoming],
        *map(list, zip(*(d_final for _, d_final in incoming), strict=True)),
    )
    return results


def write(xp: Any, out: Array, value: Array) -> None:
    """Copy `value` into `out`, in whose dtype it is rounded."""
    out[...] = xp.astype(value, out.dtype, copy=False)


def _pick(xp: Any, rows: Array, which: Any) -> Array:
    """Return some rows, given by a slice or by an array of indices."""
    return rows[which, :] if isinstance(which, slice) else xp.take(rows, which, axis=0)
