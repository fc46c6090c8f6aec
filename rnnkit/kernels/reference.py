"""The maths of the three cells, written once in pure Array API: the executable specification.

A *cell* is one time step, a *scan* is the whole time loop. What does not depend on the state before it,
the product of the input with ``weight_ih`` and both biases, was added up for all time steps in one large
matrix product before the scan; it arrives as `gates`. So one time step is one matrix product with
``weight_hh`` and some elementwise functions, and the backward scan returns the gradient with respect to
`gates`, from which all weight gradients follow in one large product each, outside.

With s(z) = 1 / (1 + exp(-z)), * elementwise, @ the matrix product, and a_t the rows of `gates[t]`:

RNN   h_t = tanh(a_t + W h_{t-1})                                   or relu in place of tanh

LSTM  i_t = s(a_i + W_i h_{t-1})      input gate                    gate order i, f, g, o
      f_t = s(a_f + W_f h_{t-1})      forget gate
      g_t = tanh(a_g + W_g h_{t-1})   candidate
      o_t = s(a_o + W_o h_{t-1})      output gate
      c_t = f_t * c_{t-1} + i_t * g_t
      h_t = o_t * tanh(c_t)                                         or W_hr (o_t * tanh(c_t))

GRU   r_t = s(a_r + W_r h_{t-1})      reset gate                    gate order r, z, n
      z_t = s(a_z + W_z h_{t-1})      update gate
      n_t = tanh(a_n + r_t * (W_n h_{t-1} + b_hn))                  candidate
      h_t = (1 - z_t) * n_t + z_t * h_{t-1}

Sources: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990); S. Hochreiter and
J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), with the forget gate of F. A. Gers,
J. Schmidhuber and F. Cummins, "Learning to forget", Neural Computation 12 (2000); the projection of
H. Sak, A. Senior and F. Beaufays, "Long short-term memory based recurrent neural network architectures
for large vocabulary speech recognition" (2014), arXiv:1402.1128; K. Cho et al., "Learning phrase
representations using RNN encoder-decoder" (2014), arXiv:1406.1078, the reset gate after the product.

Shapes (the letters are explained in `rnnkit._typing`): gates (T, B, G*H); h_0 (B, P); c_0 (B, H);
weight_hh (G*H, P); weight_hr (P, H); output (T, B, P). P is H but for a projected LSTM.

Every scan takes ``lengths`` (B,), integers in [0, T]: from there on a sequence is over; its state stands
still, its output and its gradients are zero, and `reverse` scans begin at its own last step.

Half precision: `gates`, `c` and everything in between are float32; `h` is rounded at every step, so that a
sequence cut in pieces gives the same numbers as the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .._array import namespace_of
from .._typing import Array, Namespace
from ._case import Case


def why_not(name: str, case: Case) -> str | None:
    """Say why this module cannot serve `case`: it always can."""
    return None


# ---------------------------------------------------------------------------------------------- RNN


class RNNSaved(NamedTuple):
    """What `rnn_backward` needs: h (T, B, H), the state after each step."""

    h: Array
    lengths: Array | None
    reverse: bool
    nonlinearity: str


def rnn_forward(
    gates: Array, h_0: Array, weight_hh: Array, *, nonlinearity: str = "tanh",
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, RNNSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs."""
    xp = namespace_of(gates)
    weight = _transposed(xp, weight_hh, gates.dtype)
    h, states = h_0, []
    for t in _steps(gates, reverse):
        z = gates[t, :, :] + _as(xp, h, gates.dtype) @ weight
        h_t = xp.tanh(z) if nonlinearity == "tanh" else xp.where(z < 0, xp.zeros_like(z), z)
        h = _advance(xp, t, lengths, _as(xp, h_t, h_0.dtype), h)
        states.append(h)
    all_h = _stack(xp, states, reverse)
    saved = RNNSaved(all_h, lengths, reverse, nonlinearity) if save else None
    return _zero_padding(xp, all_h, lengths), h, saved


def rnn_backward(saved: RNNSaved, weight_hh: Array, d_output: Array, d_h_n: Array) -> tuple[Array, Array]:
    """Return d_gates (T, B, H) and d_h_0 (B, H)."""
    xp = namespace_of(d_output)
    dtype = _accumulation(xp, d_output.dtype)
    weight = _as(xp, weight_hh, dtype)
    d_h, d_gates = _as(xp, d_h_n, dtype), []
    for t in _steps(d_output, not saved.reverse):
        h = _as(xp, saved.h[t, :, :], dtype)
        d_z = d_h + _as(xp, d_output[t, :, :], dtype)
        d_z = d_z * (1 - h * h) if saved.nonlinearity == "tanh" else xp.where(h > 0, d_z, xp.zeros_like(h))
        d_z = _advance(xp, t, saved.lengths, d_z, xp.zeros_like(d_z))
        d_h = _advance(xp, t, saved.lengths, d_z @ weight, d_h)
        d_gates.append(d_z)
    return _stack(xp, d_gates, not saved.reverse), _as(xp, d_h, d_output.dtype)


# --------------------------------------------------------------------------------------------- LSTM


class LSTMSaved(NamedTuple):
    """What `lstm_backward` needs: gates (T, B, 4H) after their nonlinearity, c_prev (T, B, H)."""

    gates: Array
    c_prev: Array
    lengths: Array | None
    reverse: bool


def lstm_forward(
    gates: Array, h_0: Array, c_0: Array, weight_hh: Array, *, weight_hr: Array | None = None,
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, Array, LSTMSaved | None]:  # fmt: skip
    """Return output (T, B, P), h_n (B, P), c_n (B, H) and what the backward scan needs."""
    xp = namespace_of(gates)
    weight = _transposed(xp, weight_hh, gates.dtype)
    projection = None if weight_hr is None else _transposed(xp, weight_hr, gates.dtype)
    h, c = h_0, c_0
    outputs, activated, c_before = [], [], []
    for t in _steps(gates, reverse):
        z_i, z_f, z_g, z_o = _split(gates[t, :, :] + _as(xp, h, gates.dtype) @ weight, 4)
        i, f, g, o = _sigmoid(xp, z_i), _sigmoid(xp, z_f), xp.tanh(z_g), _sigmoid(xp, z_o)
        if save:
            activated.append(xp.concat([i, f, g, o], axis=-1))
            c_before.append(c)
        c_t = f * c + i * g
        h_t = o * xp.tanh(c_t)
        if projection is not None:
            h_t = h_t @ projection
        c = _advance(xp, t, lengths, c_t, c)
        h = _advance(xp, t, lengths, _as(xp, h_t, h_0.dtype), h)
        outputs.append(h)
    output = _zero_padding(xp, _stack(xp, outputs, reverse), lengths)
    if not save:
        return output, h, c, None
    saved = LSTMSaved(_stack(xp, activated, reverse), _stack(xp, c_before, reverse), lengths, reverse)
    return output, h, c, saved


def lstm_backward(
    saved: LSTMSaved, weight_hh: Array, d_output: Array, d_h_n: Array, d_c_n: Array, *,
    weight_hr: Array | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Return d_gates (T, B, 4H), d_h_0 (B, P), d_c_0 (B, H) and, given weight_hr, d_weight_hr (P, H)."""
    xp = namespace_of(d_output)
    dtype = saved.gates.dtype
    weight = _as(xp, weight_hh, dtype)
    projection = None if weight_hr is None else _as(xp, weight_hr, dtype)
    d_h, d_c = _as(xp, d_h_n, dtype), _as(xp, d_c_n, dtype)
    d_gates, unprojected, d_projected = [], [], []
    for t in _steps(d_output, not saved.reverse):
        i, f, g, o = _split(saved.gates[t, :, :], 4)
        c_prev = saved.c_prev[t, :, :]
        tanh_c = xp.tanh(f * c_prev + i * g)
        d_m = d_h_t = d_h + _as(xp, d_output[t, :, :], dtype)
        if projection is not None:
            d_m = d_h_t @ projection
            unprojected.append(o * tanh_c)
            d_projected.append(_advance(xp, t, saved.lengths, d_h_t, xp.zeros_like(d_h_t)))
        d_c_t = d_c + d_m * o * (1 - tanh_c * tanh_c)
        d_z = xp.concat(
            [
                d_c_t * g * i * (1 - i),
                d_c_t * c_prev * f * (1 - f),
                d_c_t * i * (1 - g * g),
                d_m * tanh_c * o * (1 - o),
            ],
            axis=-1,
        )
        d_z = _advance(xp, t, saved.lengths, d_z, xp.zeros_like(d_z))
        d_h = _advance(xp, t, saved.lengths, d_z @ weight, d_h)
        d_c = _advance(xp, t, saved.lengths, d_c_t * f, d_c)
        d_gates.append(d_z)
    results = (_stack(xp, d_gates, not saved.reverse), _as(xp, d_h, d_output.dtype), d_c)
    if projection is None:
        return results
    P, H = projection.shape
    d_projected = xp.reshape(xp.stack(d_projected), (-1, P))
    d_weight_hr = xp.matrix_transpose(d_projected) @ xp.reshape(xp.stack(unprojected), (-1, H))
    return *results, _as(xp, d_weight_hr, weight_hh.dtype)


# ---------------------------------------------------------------------------------------------- GRU


class GRUSaved(NamedTuple):
    """What `gru_backward` needs.

    gates (T, B, 3H) after their nonlinearity; recurrent_n (T, B, H), W_n h_{t-1} + b_hn; h_prev (T, B, H).
    """

    gates: Array
    recurrent_n: Array
    h_prev: Array
    lengths: Array | None
    reverse: bool


def gru_forward(
    gates: Array, h_0: Array, weight_hh: Array, *, bias_hn: Array | None = None,
    lengths: Array | None = None, reverse: bool = False, save: bool = True,
) -> tuple[Array, Array, GRUSaved | None]:  # fmt: skip
    """Return output (T, B, H), h_n (B, H) and what the backward scan needs.

    `gates` holds both biases of r and z, and the input's of n; `bias_hn` (H,) is the recurrent one of n.
    """
    xp = namespace_of(gates)
    weight = _transposed(xp, weight_hh, gates.dtype)
    h = h_0
    outputs, activated, recurrent, h_before = [], [], [], []
    for t in _steps(gates, reverse):
        a_r, a_z, a_n = _split(gates[t, :, :], 3)
        h_acc = _as(xp, h, gates.dtype)
        w_r, w_z, w_n = _split(h_acc @ weight, 3)
        if bias_hn is not None:
            w_n = w_n + _as(xp, bias_hn, gates.dtype)
        r, z = _sigmoid(xp, a_r + w_r), _sigmoid(xp, a_z + w_z)
        n = xp.tanh(a_n + r * w_n)
        if save:
            activated.append(xp.concat([r, z, n], axis=-1))
            recurrent.append(w_n)
            h_before.append(h)
        h_t = (1 - z) * n + z * h_acc
        h = _advance(xp, t, lengths, _as(xp, h_t, h_0.dtype), h)
        outputs.append(h)
    output = _zero_padding(xp, _stack(xp, outputs, reverse), lengths)
    if not save:
        return output, h, None
    parts = [_stack(xp, part, reverse) for part in (activated, recurrent, h_before)]
    return output, h, GRUSaved(parts[0], parts[1], parts[2], lengths, reverse)


def gru_backward(
    saved: GRUSaved, weight_hh: Array, d_output: Array, d_h_n: Array
) -> tuple[Array, Array, Array]:
    """Return d_gates (T, B, 3H), d_h_0 (B, H) and d_recurrent_n (T, B, H).

    The last is the gradient of W_n h_{t-1} + b_hn, which differs from that of a_n by the factor r.
    """
    xp = namespace_of(d_output)
    dtype = saved.gates.dtype
    weight = _as(xp, weight_hh, dtype)
    d_h, d_gates, d_recurrent_n = _as(xp, d_h_n, dtype), [], []
    for t in _steps(d_output, not saved.reverse):
        r, z, n = _split(saved.gates[t, :, :], 3)
        d_h_t = d_h + _as(xp, d_output[t, :, :], dtype)
        d_n = d_h_t * (1 - z) * (1 - n * n)
        d_r = d_n * saved.recurrent_n[t, :, :] * r * (1 - r)
        d_z = d_h_t * (_as(xp, saved.h_prev[t, :, :], dtype) - n) * z * (1 - z)
        d_a = xp.concat([d_r, d_z, d_n], axis=-1)
        d_w = xp.concat([d_r, d_z, d_n * r], axis=-1)
        d_a = _advance(xp, t, saved.lengths, d_a, xp.zeros_like(d_a))
        d_w = _advance(xp, t, saved.lengths, d_w, xp.zeros_like(d_w))
        d_h = _advance(xp, t, saved.lengths, d_w @ weight + d_h_t * z, d_h)
        d_gates.append(d_a)
        d_recurrent_n.append(_split(d_w, 3)[2])
    stacked = _stack(xp, d_gates, not saved.reverse)
    return stacked, _as(xp, d_h, d_output.dtype), _stack(xp, d_recurrent_n, not saved.reverse)


# ------------------------------------------------------------------------------- around the scans


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """Return a @ b for 2-D arrays, in `out` if given; half precision is multiplied and summed in float32."""
    xp = namespace_of(a)
    dtype = _accumulation(xp, a.dtype)
    product = _as(xp, a, dtype) @ _as(xp, b, dtype)
    if out is None:
        return product
    out[...] = _as(xp, product, out.dtype)
    return out


# Elements of the one-hot block that `embedding_backward` holds at a time: 16 MB in float32.
_ONE_HOT_BLOCK = 1 << 22


def embedding_backward(d_rows: Array, index: Array, num_rows: int) -> Array:
    """Return the gradient (num_rows, N) of the table whose rows `index` (M,) gave `d_rows` (M, N)."""
    xp = namespace_of(d_rows)
    rows = xp.arange(num_rows, dtype=index.dtype, device=d_rows.device)
    total = xp.zeros((num_rows, d_rows.shape[1]), dtype=d_rows.dtype, device=d_rows.device)
    M, block = index.shape[0], max(1, _ONE_HOT_BLOCK // num_rows)
    for start in range(0, M, block):
        part = slice(start, min(start + block, M))
        one_hot = rows[:, None] == index[None, part]
        total = total + xp.astype(one_hot, d_rows.dtype) @ d_rows[part, :]
    return total


def clip(flat: Array, max_norm: float) -> Array:
    """Scale flat (N,) in place to a norm of at most `max_norm` and return the norm that it had, ().

    The norm is of the dtype that sums are kept in. Both stay on the device.
    """
    xp = namespace_of(flat)
    wide = _as(xp, flat, _accumulation(xp, flat.dtype))
    norm = xp.linalg.vector_norm(wide)
    scale = max_norm / (norm + 1e-6)
    wide *= xp.where(scale < 1.0, scale, xp.ones_like(scale))
    if wide is not flat:
        flat[...] = _as(xp, wide, flat.dtype)
    return norm


def softmax_cross_entropy(
    logits: Array, targets: Array, counts: Array | None, gradient: bool = True
) -> tuple[Array, Array | None]:
    """Return the mean of -log softmax(logits)[target] over the rows that count, and its gradient if wanted.

    logits (M, V), neither of them 0; targets (M,) of int64; counts (M,) of bool, None for all rows. The loss
    is of the dtype that sums are kept in, and 0 where no row counts. A row that does not count has a gradient
    of zeros, whatever it holds. A target out of [0, V) makes the loss NaN.
    """
    xp, V = namespace_of(logits), logits.shape[1]
    z = _as(xp, logits, _accumulation(xp, logits.dtype))
    z = z - xp.max(z, axis=-1, keepdims=True)
    exp_z = xp.exp(z)
    total = xp.sum(exp_z, axis=-1, keepdims=True)
    is_target = xp.arange(V, dtype=targets.dtype, device=targets.device)[None, :] == targets[:, None]
    picked = xp.sum(xp.where(is_target, z, xp.zeros_like(z)), axis=-1)
    picked = xp.where((targets >= 0) & (targets < V), picked, xp.full_like(picked, float("nan")))
    losses = xp.log(total[:, 0]) - picked
    n = losses.shape[0]
    if counts is None:
        loss = xp.mean(losses)
    else:
        n = xp.sum(_as(xp, counts, losses.dtype))  # never read on the host: that would wait for the device
        n = xp.where(n > 0, n, xp.ones_like(n))
        loss = xp.sum(xp.where(counts, losses, xp.zeros_like(losses))) / n
    if not gradient:
        return loss, None
    probabilities = exp_z / total
    d_z = xp.where(is_target, probabilities - 1.0, probabilities) * (1.0 / n)
    if counts is not None:
        d_z = xp.where(counts[:, None], d_z, xp.zeros_like(d_z))
    return loss, _as(xp, d_z, logits.dtype)


def adam(
    flat: Array, d_flat: Array, mean: Array, square: Array, *, betas: tuple[float, float], steps: int,
    lr: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Change flat, mean and square (N,) in place by step number `steps` of Adam, which counts from 1.

    mean <- b1 mean + (1-b1) d;  square <- b2 square + (1-b2) d^2;  flat <- flat (1 - lr weight_decay)
    flat <- flat - lr / (1-b1^t) mean / (sqrt(square / (1-b2^t)) + eps)

    In half precision eps would be 0 and squares would overflow: only the new parameters are rounded to it.
    """
    xp, (beta_1, beta_2) = namespace_of(flat), betas
    updated, d = _as(xp, flat, mean.dtype), _as(xp, d_flat, mean.dtype)
    mean *= beta_1
    mean += (1.0 - beta_1) * d
    square *= beta_2
    square += (1.0 - beta_2) * d * d
    if weight_decay:
        updated *= 1.0 - lr * weight_decay
    # The bias corrections are numbers of the host: the step count is known there.
    step_size = lr / (1.0 - beta_1**steps)
    root = xp.sqrt(square) / (1.0 - beta_2**steps) ** 0.5 + eps
    updated -= step_size * mean / root
    if updated is not flat:
        flat[...] = _as(xp, updated, flat.dtype)


# ------------------------------------------------------------------------------------------- pieces


def _sigmoid(xp: Namespace, z: Array) -> Array:
    """1 / (1 + exp(-z)), by the identity that neither overflows nor needs clipping."""
    return 0.5 * xp.tanh(0.5 * z) + 0.5


def _steps(sequence: Array, reverse: bool) -> Iterable[int]:
    T = sequence.shape[0]
    return range(T - 1, -1, -1) if reverse else range(T)


def _split(z: Array, parts: int) -> list[Array]:
    """Cut (B, parts*H) into `parts` blocks (B, H)."""
    H = z.shape[1] // parts
    return [z[:, k * H : (k + 1) * H] for k in range(parts)]


def _advance(xp: Namespace, t: int, lengths: Array | None, new: Array, old: Array) -> Array:
    """Return `new` for the sequences that have a step t, and `old` for those that are over."""
    return new if lengths is None else xp.where((lengths > t)[:, None], new, old)


def _zero_padding(xp: Namespace, output: Array, lengths: Array | None) -> Array:
    if lengths is None:
        return output
    t = xp.arange(output.shape[0], dtype=lengths.dtype, device=lengths.device)
    return xp.where((t[:, None] < lengths[None, :])[:, :, None], output, xp.zeros_like(output))


def _stack(xp: Namespace, steps: list[Array], reverse: bool) -> Array:
    """Stack what a scan collected, in the order of time."""
    return xp.stack(steps[::-1] if reverse else steps)


def _transposed(xp: Namespace, weight: Array, dtype: object) -> Array:
    return _as(xp, xp.matrix_transpose(weight), dtype)


def _as(xp: Namespace, array: Array, dtype: object) -> Array:
    return xp.astype(array, dtype, copy=False)


def _accumulation(xp: Namespace, dtype: object) -> object:
    return dtype if dtype == xp.float64 else xp.float32
