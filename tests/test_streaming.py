"""The short way through `step`, which plain NumPy arrays take: the same numbers and the same errors."""

from __future__ import annotations

import numpy as np
import pytest

import rnnkit

LAYERS = [rnnkit.RNN, rnnkit.LSTM, rnnkit.GRU]


def parts(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 3}, {"dtype": "float64"}], ids=str)
@pytest.mark.parametrize("B", [1, 3, 20])
def test_steps_give_what_the_sequence_gives(layer_type, options, B):
    layer = layer_type(5, 40, **options, backend="numpy", seed=1)
    x = np.random.default_rng(0).standard_normal((8, B, 5)).astype(layer.dtype)
    output, final = layer(x)
    state = None
    for t in range(8):
        assert layer._fits_quick_step(x[t], state) == (t > 0)
        y_t, state = layer.step(x[t], state)
        np.testing.assert_allclose(y_t, output[t], rtol=0, atol=1e-6 if layer.dtype == "float32" else 1e-14)
    for ours, theirs in zip(parts(state), parts(final), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 if layer.dtype == "float32" else 1e-14)


def test_a_projected_layer_steps_too():
    layer = rnnkit.LSTM(5, 12, proj_size=4, backend="numpy", seed=1)
    x = np.random.default_rng(0).standard_normal((6, 2, 5)).astype(np.float32)
    state = None
    for t in range(6):
        y_t, state = layer.step(x[t], state)
    np.testing.assert_allclose(y_t, layer(x)[0][-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_a_step_leaves_its_inputs_and_its_past_alone(layer_type):
    layer = layer_type(5, 7, backend="numpy", seed=1)
    x = np.ones((2, 5), np.float32)
    y_0, before = layer.step(x)
    copies = [y_0.copy(), *(part.copy() for part in parts(before))]
    y_1, after = layer.step(x, before)
    for array, copy in zip([y_0, *parts(before)], copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert not any(np.shares_memory(y_1, part) for part in (*parts(before), *parts(after)))


def test_a_step_sees_weights_that_were_changed_in_place():
    layer = rnnkit.LSTM(5, 7, backend="numpy", seed=1)
    x = np.ones((1, 5), np.float32)
    _, state = layer.step(x)
    layer.params.flat[...] = 0.0
    y_t, _ = layer.step(x, (state[0], np.zeros_like(state[1])))
    np.testing.assert_array_equal(y_t, np.zeros((1, 7), np.float32))


@pytest.mark.parametrize(
    ("x_t", "change", "error", "message"),
    [
        (np.ones((1, 6), np.float32), lambda h, c: (h, c), ValueError, "x_t must have shape"),
        (np.ones((1, 5), np.float64), lambda h, c: (h, c), TypeError, "x must have dtype float32"),
        (np.ones((2, 5), np.float32), lambda h, c: (h, c), ValueError, "h_0 must have shape"),
        (
            np.ones((1, 5), np.float32),
            lambda h, c: (h, c.astype(np.float64)),
            TypeError,
            "c_0 must have dtype",
        ),
        (np.ones((1, 5), np.float32), lambda h, c: h, TypeError, "must be a pair"),
        ([[1.0] * 5], lambda h, c: (h, c), TypeError, "x_t must be an array"),
    ],
)
def test_errors_are_those_of_the_general_way(x_t, change, error, message):
    layer = rnnkit.LSTM(5, 7, backend="numpy", seed=1)
    _, state = layer.step(np.ones((1, 5), np.float32))
    with pytest.raises(error, match=message):
        layer.step(x_t, change(*state))
