"""Mistakes that were made once, each with the smallest case that showed it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import rnnkit
from rnnkit import to_numpy, training

CELLS = [rnnkit.RNN, rnnkit.LSTM, rnnkit.GRU]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kernels", ["", "numpy", "reference"])
def test_lengths_and_state_may_change_before_the_pullback(cell, kernels, monkeypatch, rng):
    monkeypatch.setenv("RNNKIT_KERNELS", kernels)
    layer = cell(3, 4, bidirectional=True, seed=0, dtype="float64")
    x = rng.standard_normal((5, 2, 3))
    flats = []
    for disturb in (False, True):
        lengths, h = np.array([5, 2]), np.full((2, 2, 4), 0.5)
        state = (h, h.copy()) if cell is rnnkit.LSTM else h
        (output, _), pullback = layer.vjp(x, state, lengths=lengths)
        if disturb:
            lengths[:] = 50
            for part in state if isinstance(state, tuple) else (state,):
                part[...] = 0.0
        flats.append(pullback(np.ones_like(output)).params.flat)
    np.testing.assert_array_equal(*flats)


@pytest.mark.oracle
def test_negative_strides_do_not_reach_torch(torch):
    layer = rnnkit.LSTM(3, 4, backend="torch")
    with pytest.raises(TypeError, match=r"x has negative strides.*np.ascontiguousarray\(x\)"):
        layer(np.zeros((5, 2, 3), np.float32)[::-1])


@pytest.mark.oracle
def test_torch_parameters_are_detached(torch):
    module = torch.nn.LSTM(3, 4)
    layer = rnnkit.LSTM(3, 4, backend="torch")
    layer.load_params(dict(module.named_parameters()))
    assert not layer.params.flat.requires_grad
    assert torch.equal(layer.params["bias_ih_l0"], module.bias_ih_l0.detach())


def test_parameters_can_be_swapped(backend):
    layer = rnnkit.RNN(4, 4, backend=backend, seed=0)
    before = {name: np.array(to_numpy(value)) for name, value in layer.params.items()}
    swapped = dict(layer.params)
    swapped["weight_ih_l0"], swapped["weight_hh_l0"] = swapped["weight_hh_l0"], swapped["weight_ih_l0"]
    layer.load_params(swapped)
    np.testing.assert_array_equal(to_numpy(layer.params["weight_ih_l0"]), before["weight_hh_l0"])
    np.testing.assert_array_equal(to_numpy(layer.params["weight_hh_l0"]), before["weight_ih_l0"])


def test_what_overflows_in_the_layers_dtype_is_refused():
    layer = rnnkit.Linear(2, 2, bias=False, seed=0)
    before = layer.params.flat.copy()
    with pytest.raises(ValueError, match="weight holds NaN or infinite values in float32"):
        layer.load_params({"weight": np.full((2, 2), 1e300)})
    np.testing.assert_array_equal(layer.params.flat, before)
    layer.params.flat[...] = 1e6
    with pytest.raises(ValueError, match="do not fit into float16"):
        layer.to(dtype="float16")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32"])
def test_small_integer_targets_do_not_wrap_around(dtype, rng):
    logits, targets = rng.standard_normal((6, 300)), rng.integers(0, 100, 6)
    expected = rnnkit.softmax_cross_entropy(logits, targets)
    got = rnnkit.softmax_cross_entropy(logits, targets.astype(dtype))
    assert float(got[0]) == float(expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


def test_losses_take_lists_of_lengths(backend):
    layer = rnnkit.Linear(1, 1, backend=backend, dtype="float64")
    logits, targets = layer.asarray(np.zeros((3, 2, 4))), layer.asarray(np.zeros((3, 2), int))
    loss, _ = rnnkit.softmax_cross_entropy(logits, targets, lengths=[3, 1])
    assert abs(float(loss) - np.log(4)) < 1e-15
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, T=3\], got 4"):
        rnnkit.softmax_cross_entropy(logits, targets, lengths=[4, 1])


def test_nan_in_padded_gradients_of_a_language_model(backend, rng):
    model = rnnkit.LanguageModel(5, 4, backend=backend, dtype="float64", seed=0)
    tokens, flats = model.asarray(rng.integers(0, 5, (4, 2))), []
    d = rng.standard_normal((4, 2, 5))
    for poison in (0.0, np.nan):
        d[2:, 1] = poison
        _, pullback = model.vjp(tokens, lengths=[4, 2])
        flats.append(to_numpy(pullback(model.asarray(d)).params.flat))
    np.testing.assert_array_equal(*flats)


@pytest.mark.parametrize("where", ["numpy", pytest.param("torch", marks=pytest.mark.oracle)])
def test_half_precision_trains(where, counting):
    vocabulary, sequences = counting
    model = rnnkit.LanguageModel(len(vocabulary), 8, dtype="float16", backend=where, seed=0)
    history = rnnkit.fit(
        model, sequences, epochs=8, batch_size=8, optimizer=rnnkit.Adam(0.02), clip_norm=1.0, progress=False
    )
    assert history.train_loss[-1] < 0.8 * history.train_loss[0]


def test_half_precision_sums_and_norms_are_wide():
    linear = rnnkit.Linear(1, 1, dtype="float16", seed=0)
    y, pullback = linear.vjp(np.ones((5000, 1), np.float16))
    grads = pullback(np.ones_like(y)).params
    assert float(grads["bias"][0]) == 5000.0
    grads.flat[...] = 60000.0
    assert abs(float(rnnkit.clip_grad_norm(grads, 1.0)) - 60000 * np.sqrt(2)) < 10


def test_numpy_integers_are_integers(tmp_path, counting):
    vocabulary, sequences = counting
    model = rnnkit.LanguageModel(np.int64(len(vocabulary)), np.int32(4), num_layers=np.int8(1))
    rnnkit.fit(
        model, sequences, epochs=np.int64(1), batch_size=np.int64(8), window=np.int64(4), seed=np.int64(0),
        schedule=lambda _: np.float32(1), clip_norm=np.float32(1), checkpoint=tmp_path, progress=False,
    )  # fmt: skip
    rnnkit.save(rnnkit.Linear(np.int64(2), np.int64(3)), tmp_path / "m")
    assert rnnkit.load(tmp_path / "m").config["in_features"] == 2


def test_an_interrupted_run_gives_the_learning_rate_back(counting, monkeypatch):
    vocabulary, sequences = counting
    optimizer, original = rnnkit.Adam(0.01), training.train_step
    calls = iter([original] * 4)
    monkeypatch.setattr(training, "train_step", lambda *a, **k: next(calls)(*a, **k))
    with pytest.raises(StopIteration):
        rnnkit.fit(
            rnnkit.LanguageModel(len(vocabulary), 4), sequences, epochs=9, batch_size=8, optimizer=optimizer,
            schedule=rnnkit.cosine_schedule(9), progress=False,
        )  # fmt: skip
    assert optimizer.lr == 0.01


def test_a_run_that_goes_astray_leaves_its_last_good_state(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    vocabulary, sequences = counting

    def run(schedule):
        model = rnnkit.LanguageModel(len(vocabulary), 4, seed=0)
        return rnnkit.fit(
            model, sequences, epochs=4, batch_size=8, optimizer=rnnkit.SGD(0.1), checkpoint=tmp_path,
            schedule=schedule, progress=False,
        )  # fmt: skip

    original, steps = training.train_step, 0

    def poisoned(model, *args, **options):
        nonlocal steps
        steps += 1
        result = original(model, *args, **options)
        if steps == 7:
            model.params.flat[0] = np.nan
        return result

    monkeypatch.setattr(training, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="a parameter became NaN or infinite in epoch 3"):
        run(None)
    monkeypatch.setattr(training, "train_step", original)
    assert run(None).epochs == 4


def test_unknown_tokens_are_found_before_training(counting):
    vocabulary, sequences = counting
    model = rnnkit.LanguageModel(len(vocabulary), 4, seed=0)
    before = model.params.flat.copy()
    bad = [*sequences, np.array([0, 9])]
    with pytest.raises(ValueError, match=r"validation: tokens must lie in \[0, vocab_size=4\), got 9"):
        rnnkit.fit(model, sequences, bad, epochs=1, batch_size=8, progress=False)
    with pytest.raises(ValueError, match=r"train: tokens must lie in \[0, vocab_size=4\), got 9"):
        rnnkit.fit(model, bad, epochs=1, batch_size=8, progress=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        rnnkit.evaluate(model, sequences, batch_size=0)
    np.testing.assert_array_equal(model.params.flat, before)


def test_a_comparison_deletes_nothing_that_is_not_its_own(tmp_path):
    from rnnkit.compare import compare

    settings = {
        "hidden_size": 3, "max_n": 3, "epochs": 1, "batch_size": 8, "learning_rate": 0.01, "eps": 0.01,
        "clip_norm": 1.0, "forget_bias": None, "seed": 0, "torch_peer": False, "progress": False,
    }  # fmt: skip
    (tmp_path / "lstm").mkdir()
    (tmp_path / "lstm" / "mine.py").write_text("mine")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="num_sequences=5 leaves a split empty"):
        compare(out=tmp_path, num_sequences=5, **settings)
    assert (tmp_path / "metrics.json").read_text() == "{}"  # refused before anything was touched
    assert not (tmp_path / "unfinished.json").exists()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'rnnkit[plot]'")
    compare(out=tmp_path, num_sequences=20, **settings)
    assert (tmp_path / "lstm" / "mine.py").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.json").read_text())["models"]
    (tmp_path / "unfinished.json").write_text("")  # killed while it was made
    with pytest.raises(ValueError, match="unfinished comparison with other settings"):
        compare(out=tmp_path, num_sequences=20, **settings)
    compare(out=tmp_path, num_sequences=20, restart=True, **settings)


def test_a_masked_array_is_no_array():
    x = np.ma.zeros((5, 2, 3), dtype=np.float32)
    with pytest.raises(TypeError, match=r"x must be a plain array.*np.asarray\(x\)"):
        rnnkit.RNN(3, 4)(x)


def test_what_the_caller_got_wrong_is_not_the_files_fault(tmp_path):
    rnnkit.save(rnnkit.Linear(2, 3), tmp_path / "m")
    with pytest.raises(ValueError, match="got 'nmpy'"):
        rnnkit.load(tmp_path / "m", backend="nmpy")
    with pytest.raises(TypeError, match="dtype must be one of"):
        rnnkit.load(tmp_path / "m", dtype="int8")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        rnnkit.save(rnnkit.Linear(2, 3), tmp_path / "nowhere" / "m")


def test_one_hot_input_of_few_and_of_many_tokens(backend, rng):
    layer = rnnkit.GRU(6, 4, backend=backend, dtype="float64", seed=0)
    for T in (1, 20):  # fewer tokens than the table has rows, and more
        tokens = rng.integers(0, 6, (T, 2))
        got = layer(layer.asarray(tokens))[0]
        expected = layer(layer.asarray(np.eye(6)[tokens]))[0]
        np.testing.assert_allclose(to_numpy(got), to_numpy(expected), rtol=0, atol=1e-15)
