"""What users pass in wrongly: each time a message with argument, expectation and what came."""

from __future__ import annotations

import numpy as np
import pytest

import rnnkit


@pytest.fixture
def layer():
    return rnnkit.LSTM(64, 4, seed=0)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "input_size must be at least 1, got 0"),
        ((3, 0), {}, ValueError, "hidden_size must be at least 1, got 0"),
        ((3, 4.0), {}, TypeError, "hidden_size must be an integer, got 4.0"),
        ((3, True), {}, TypeError, "hidden_size must be an integer, got True"),
        ((3, 4, 0), {}, ValueError, "num_layers must be at least 1, got 0"),
        ((3, 4), {"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\], got 1.5"),
        ((3, 4), {"dropout": float("nan")}, ValueError, r"dropout must lie in \[0, 1\], got nan"),
        ((3, 4), {"dropout": "0.5"}, TypeError, "dropout must be a number, got '0.5'"),
        ((3, 4), {"proj_size": 4}, ValueError, "proj_size must be smaller than hidden_size=4, got 4"),
        ((3, 4), {"proj_size": -1}, ValueError, "proj_size must be at least 0, got -1"),
        ((3, 4), {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias needs bias=True"),
        ((3, 4), {"seed": 1.5}, TypeError, "seed must be an integer or None, got 1.5"),
    ],
)
def test_constructor(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rnnkit.LSTM(*arguments, **options)


def test_constructor_of_the_others():
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'sin'"):
        rnnkit.RNN(3, 4, nonlinearity="sin")
    with pytest.raises(TypeError, match="proj_size"):
        rnnkit.GRU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match="cell must be one of rnn, lstm, gru, got 'transformer'"):
        rnnkit.LanguageModel(4, 4, cell="transformer")
    with pytest.raises(ValueError, match="need cell='lstm'"):
        rnnkit.LanguageModel(4, 4, cell="gru", proj_size=2)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        rnnkit.Dropout(-0.1)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (zeros(32, 8, 65), ValueError, r"x must have shape \(T, B, input_size=64\), got \(32, 8, 65\)"),
        (zeros(64), ValueError, r"x must have shape \(T, B, input_size=64\), got \(64,\)"),
        (zeros(2, 3, 4, 64), ValueError, r"x must have shape \(T, B, input_size=64\)"),
        (
            zeros(2, 3, 4, dtype=np.int64),
            ValueError,
            r"x must have shape \(T, B\) of integers, got \(2, 3, 4\)",
        ),
        (zeros(0, 8, 64), ValueError, r"x must have at least one time step, got shape \(0, 8, 64\)"),
        (zeros(2, 8, 64, dtype=np.float64), TypeError, "x must have dtype float32, got float64"),
        (zeros(2, 8, 64, dtype=np.complex64), TypeError, "x must have dtype float32, got complex64"),
        (zeros(2, 8, 64, dtype=bool), TypeError, "x must have dtype float32, got bool"),
        (zeros(2, 8, 64, dtype=">f4"), TypeError, "x must have dtype float32, got >f4"),
        (np.full((2, 8), 64), ValueError, r"x must lie in \[0, 64\), got 64"),
        (np.full((2, 8), -1), ValueError, r"x must lie in \[0, 64\), got -1"),
    ],
)
def test_input(layer, x, error, message):
    for call in (layer, layer.vjp):
        with pytest.raises(error, match=message):
            call(x)


def test_batch_first_says_so():
    layer = rnnkit.LSTM(64, 4, batch_first=True)
    with pytest.raises(ValueError, match=r"x must have shape \(B, T, input_size=64\), got \(8, 32, 65\)"):
        layer(zeros(8, 32, 65))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3, 6], ValueError, r"lengths must lie in \[0, T=5\], got 6"),
        ([3, -1], ValueError, r"lengths must lie in \[0, T=5\], got -1"),
        ([3.0, 2.0], TypeError, "lengths must be integers, got dtype float64"),
        ([True, False], TypeError, "lengths must be integers, got dtype bool"),
        ([3], ValueError, r"lengths must have shape \(B=2,\), got \(1,\)"),
        ([[3, 2]], ValueError, r"lengths must have shape \(B=2,\), got \(1, 2\)"),
        (3, ValueError, r"lengths must have shape \(B=2,\), got \(\)"),
        ("32", TypeError, "lengths must be integers"),
    ],
)
def test_lengths(layer, lengths, error, message):
    with pytest.raises(error, match=message):
        layer(zeros(5, 2, 64), lengths=lengths)


def test_lengths_without_a_batch(layer):
    with pytest.raises(ValueError, match="lengths needs a batch"):
        layer(zeros(5, 64), lengths=[3])


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (zeros(1, 2, 4), TypeError, r"state of an LSTM must be a pair \(h, c\), got ndarray"),
        ((zeros(1, 2, 4),), TypeError, r"state of an LSTM must be a pair"),
        ((zeros(1, 2, 4), zeros(1, 3, 4)), ValueError, r"c_0 must have shape \(1, 2, 4\), got \(1, 3, 4\)"),
        ((zeros(1, 4), zeros(1, 4)), ValueError, r"h_0 must have shape \(1, 2, 4\), got \(1, 4\)"),
        ((zeros(1, 2, 4, dtype=np.float64), zeros(1, 2, 4)), TypeError, "h_0 must have dtype float32"),
        (([[[0.0] * 4] * 2], zeros(1, 2, 4)), TypeError, "h_0 must be an array of backend 'numpy', got list"),
    ],
)
def test_state(layer, state, error, message):
    with pytest.raises(error, match=message):
        layer(zeros(5, 2, 64), state)


def test_gradients_passed_to_a_pullback(layer):
    (output, state), pullback = layer.vjp(zeros(5, 2, 64))
    with pytest.raises(ValueError, match=r"d_output must have shape \(5, 2, 4\), got \(5, 2, 3\)"):
        pullback(output[:, :, :3])
    with pytest.raises(TypeError, match="d_output must have dtype float32, got float64"):
        pullback(output.astype(np.float64))
    with pytest.raises(TypeError, match="d_state of an LSTM must be a pair"):
        pullback(output, state[0])
    with pytest.raises(ValueError, match=r"d_state\['h_0'\] must have shape"):
        pullback(output, (state[0][:, :1], state[1]))


def test_dropout_needs_a_seed():
    layer = rnnkit.LSTM(3, 4, 2, dropout=0.5)
    with pytest.raises(ValueError, match="vjp needs seed= when dropout > 0"):
        layer.vjp(zeros(2, 1, 3))
    model = rnnkit.LanguageModel(4, 4, dropout=0.5)
    with pytest.raises(ValueError, match="vjp needs seed= when dropout > 0"):
        model.vjp(np.zeros((2, 1), int))


def test_step_of_a_bidirectional_layer():
    with pytest.raises(ValueError, match="step needs bidirectional=False"):
        rnnkit.LSTM(3, 4, bidirectional=True).step(zeros(1, 3))


def good(layer):
    return {name: np.array(value) for name, value in layer.params.items()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: p.pop("bias_hh_l0"), ValueError, "missing: bias_hh_l0"),
        (lambda p: p.update(extra=zeros(1)), ValueError, "unknown: extra"),
        (
            lambda p: p.update(bias_ih_l0=zeros(15)),
            ValueError,
            r"bias_ih_l0 must have shape \(16,\), got \(15,\)",
        ),
        (
            lambda p: p.update(bias_ih_l0=zeros(16, dtype=int)),
            TypeError,
            "bias_ih_l0 must hold floating-point",
        ),
        (
            lambda p: p.update(bias_ih_l0=zeros(16, dtype=complex)),
            TypeError,
            "bias_ih_l0 must hold floating-point",
        ),
        (lambda p: p.update(bias_hh_l0=np.full(16, np.nan)), ValueError, "bias_hh_l0 holds NaN or infinite"),
        (lambda p: p.update(bias_hh_l0=np.full(16, np.inf)), ValueError, "bias_hh_l0 holds NaN or infinite"),
        (lambda p: p.update(bias_hh_l0="abc"), TypeError, "to_numpy takes an array"),
    ],
)
def test_load_params_changes_all_or_nothing(layer, change, error, message):
    before = layer.params.flat.copy()
    params = {name: value + 1 for name, value in good(layer).items()}
    change(params)
    with pytest.raises(error, match=message):
        layer.load_params(params)
    np.testing.assert_array_equal(layer.params.flat, before)


def test_load_params_of_something_else(layer):
    with pytest.raises(TypeError, match="takes a mapping of names to arrays, got list"):
        layer.load_params([1, 2])


def test_layers_beside_the_recurrent_ones():
    linear, embedding = rnnkit.Linear(3, 4), rnnkit.Embedding(5, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(..., in_features=3\), got \(2, 4\)"):
        linear(zeros(2, 4))
    with pytest.raises(TypeError, match="x must have dtype float32, got float64"):
        linear(zeros(2, 3, dtype=np.float64))
    with pytest.raises(ValueError, match=r"d_y must have shape \(2, 4\), got \(2, 3\)"):
        linear.vjp(zeros(2, 3))[1](zeros(2, 3))
    with pytest.raises(TypeError, match="tokens must be integers, got dtype float32"):
        embedding(zeros(2, 3))
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 5\), got 5"):
        embedding(np.array([0, 5]))


def test_language_model_input():
    model = rnnkit.LanguageModel(4, 4, embedding_dim=2)
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \(T, B\)"):
        model(np.zeros(3, int))
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 4\), got 9"):
        model(np.full((2, 1), 9))
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        model.generate([], 3)
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        model.generate([0], 3, temperature=-1)
    with pytest.raises(ValueError, match=r"prompt must lie in \[0, 4\), got 7"):
        model.generate([7], 3)
