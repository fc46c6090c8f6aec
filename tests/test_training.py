"""Data, the language model, training, checkpoints."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from gradcheck import check_directional

import rnnkit
from rnnkit import to_numpy, training
from rnnkit.data import Sequences, Stream

# --------------------------------------------------------------------------------------------- data


def test_counting_language():
    sequences = rnnkit.counting_language(500, 9, seed=1)
    assert sequences == rnnkit.counting_language(500, 9, seed=1)
    assert sequences != rnnkit.counting_language(500, 9, seed=2)
    counts = np.zeros(10, int)
    for sequence in sequences:
        n = len(sequence) // 2
        assert sequence == ["a"] * n + ["b"] * n + ["EOS"]
        counts[n] += 1
    assert counts[0] == 0
    assert np.all(counts[1:] > 25)
    with pytest.raises(ValueError, match="max_n must be at least 1, got 0"):
        rnnkit.counting_language(3, 0)


def test_vocabulary():
    vocabulary = rnnkit.Vocabulary(["banana", "bandana"])
    assert vocabulary.tokens == ("a", "n", "b", "d", "EOS", "<unk>")
    assert vocabulary.encode("bad?").tolist() == [2, 0, 3, 5]
    assert vocabulary.decode([2, 0, 3, 5]) == ["b", "a", "d", "<unk>"]
    assert vocabulary.decode(vocabulary.encode("banana")) == list("banana")
    np.testing.assert_array_equal(vocabulary.one_hot("na"), np.eye(6)[[1, 0]])
    assert "d" in vocabulary
    assert "z" not in vocabulary
    assert len(vocabulary) == 6
    assert vocabulary == rnnkit.Vocabulary.from_tokens(vocabulary.tokens)
    assert rnnkit.Vocabulary(["banana"], max_size=4).tokens == ("a", "n", "EOS", "<unk>")
    assert rnnkit.Vocabulary([]).tokens == ("EOS", "<unk>")
    assert vocabulary.encode("").tolist() == []
    with pytest.raises(ValueError, match=r"numbers must lie in \[0, 6\), got 6"):
        vocabulary.decode([6])
    with pytest.raises(ValueError, match="tokens must be distinct"):
        rnnkit.Vocabulary.from_tokens(["a", "a"])
    with pytest.raises(ValueError, match="max_size must be at least 3"):
        rnnkit.Vocabulary(["ab"], max_size=2)


def test_split():
    items = list(range(100))
    parts = rnnkit.split(items)
    assert [len(part) for part in parts] == [80, 10, 10]
    assert [item for part in parts for item in part] == items
    assert [len(part) for part in rnnkit.split(np.arange(7), (0.5, 0.5))] == [4, 3]
    with pytest.raises(ValueError, match="fractions must be at least 0 and sum to 1"):
        rnnkit.split(items, (0.5, 0.6))


def test_next_token_pair():
    inputs, targets = rnnkit.next_token_pair(np.arange(4))
    assert inputs.tolist() == [0, 1, 2]
    assert targets.tolist() == [1, 2, 3]


def test_ragged_batches(backend, counting):
    _, sequences = counting
    model = rnnkit.LanguageModel(4, 4, backend=backend)
    data = Sequences(sequences, model.asarray)
    seen = []
    for batch in data.batches(6, seed=3, label="epoch 0"):
        T, B = batch.inputs.shape
        lengths = [T] * B if batch.lengths is None else batch.lengths
        assert batch.num_tokens == sum(lengths)
        assert not batch.goes_on
        for b, length in enumerate(lengths):
            inputs, targets = to_numpy(batch.inputs)[:length, b], to_numpy(batch.targets)[:length, b]
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            seen.append((inputs[0], *targets))
    assert sorted(seen) == sorted(map(tuple, sequences))
    assert data.num_batches(6) == 4
    for wrong in ([], [np.array([1])], [np.array([1.0, 2.0])]):
        with pytest.raises(ValueError, match="sequence"):
            Sequences(wrong, model.asarray)


def test_one_long_sequence_costs_no_memory_for_the_short_ones():
    moved = []

    def asarray(host):
        moved.append(host.size)
        return np.asarray(host)

    data = Sequences([np.arange(1000, dtype=np.uint8), np.array([3, 4]), np.array([5, 6, 7])], asarray)
    assert moved == [1005]
    _, batch = data.batches(2)
    np.testing.assert_array_equal(batch.inputs, [[5], [6]])
    np.testing.assert_array_equal(batch.targets, [[6], [7]])


def test_stream_windows_cover_each_column_once():
    tokens = np.arange(23)
    stream = Stream(tokens, 3, 4, np.asarray)
    batches = list(stream.batches(3))
    assert [batch.goes_on for batch in batches] == [False, True]
    assert stream.num_batches(3) == 2
    for part in ("inputs", "targets"):
        whole = np.concatenate([getattr(batch, part) for batch in batches])
        expected = tokens[:21].reshape(3, 7).T + (part == "targets")
        np.testing.assert_array_equal(whole, expected)
    with pytest.raises(ValueError, match="more than batch_size=30 tokens, got 23"):
        Stream(tokens, 30, 4, np.asarray)


def test_read_text(tmp_path):
    path = tmp_path / "text"
    path.write_text("one two\nthree\n", encoding="utf-8")
    assert rnnkit.read_text(path)[:4] == ["o", "n", "e", " "]
    assert rnnkit.read_text(path, "word") == ["one", "two", "EOS", "three", "EOS"]
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        rnnkit.read_text(path)
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        rnnkit.read_text(path)
    with pytest.raises(ValueError, match="level must be"):
        rnnkit.read_text(path, "sentence")


# -------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("options", [{}, {"embedding_dim": 3, "dropout": 0.3, "num_layers": 2}])
def test_language_model_gradients(backend, cell, options, rng):
    model = rnnkit.LanguageModel(6, 5, cell, backend=backend, dtype="float64", **options)
    tokens = rng.integers(0, 6, (4, 3))
    lengths = [4, 2, 0]
    tokens[2:, 1] = tokens[:, 2] = 77  # in the padding anything may stand
    A = model.asarray
    point = {name: 0.5 * rng.standard_normal(value.shape) for name, value in model.params.items()}

    def forward(point):
        model.load_params(point)
        return model.vjp(A(tokens), lengths=lengths, seed=5)

    (logits, _), pullback = forward(point)
    d_logits = rng.standard_normal(logits.shape)
    d_logits[2:, 1] = d_logits[:, 2] = 0.0
    grads = pullback(A(d_logits))
    gradient = {name: to_numpy(value) for name, value in grads.params.items()}
    check_directional(lambda p: np.sum(to_numpy(forward(p)[0][0]) * d_logits), point, gradient, rng)


def test_parts_are_views_of_the_models_buffer(backend):
    model = rnnkit.LanguageModel(6, 5, embedding_dim=3, backend=backend, seed=0)
    for copy in (model, pickle.loads(pickle.dumps(model)), model.to()):
        copy.params.flat[...] = 0.5
        for part in (copy.embedding, copy.rnn, copy.linear):
            assert np.all(to_numpy(part.params.flat) == 0.5)
        assert list(copy.params)[:2] == ["embedding.weight", "rnn.weight_ih_l0"]


def test_generate(backend, counting):
    vocabulary, _ = counting
    model = rnnkit.LanguageModel(len(vocabulary), 8, tokens=vocabulary.tokens, backend=backend, seed=0)
    greedy = model.generate([0, 0], 12)
    assert len(greedy) == 12
    assert greedy == model.generate([0, 0], 12, temperature=0.0, seed=9)
    drawn = model.generate([0], 200, temperature=1.0, seed=1)
    assert drawn == model.generate([0], 200, temperature=1.0, seed=1)
    assert drawn != model.generate([0], 200, temperature=1.0, seed=2)
    assert set(drawn) == set(range(4))
    stopped = model.generate([0], 200, temperature=1.0, seed=1, stop=vocabulary.eos)
    assert stopped == drawn[: drawn.index(vocabulary.eos) + 1]
    assert model.generate([0], 0) == []


def test_generated_tokens_follow_the_models_distribution():
    model = rnnkit.LanguageModel(4, 2, seed=0)
    model.params.flat[...] = 0.0
    model.params["linear.bias"][...] = np.log([0.1, 0.2, 0.3, 0.4])
    for temperature in (1.0, 3.0):
        drawn = model.generate([0], 4000, temperature=temperature, seed=4)
        expected = np.array([0.1, 0.2, 0.3, 0.4]) ** (1 / temperature)
        shares = np.bincount(drawn, minlength=4) / 4000
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)  # four deviations


def test_step_equals_the_whole(backend, rng):
    model = rnnkit.LanguageModel(6, 5, embedding_dim=3, num_layers=2, backend=backend, dtype="float64")
    tokens = model.asarray(rng.integers(0, 6, (5, 2)))
    whole, _ = model(tokens)
    state = None
    for t in range(5):
        logits, state = model.step(tokens[t, ...], state)
        np.testing.assert_allclose(to_numpy(logits), to_numpy(whole)[t], rtol=0, atol=1e-14)


# ----------------------------------------------------------------------------------------- training


def train(counting, **options):
    vocabulary, sequences = counting
    cell = options.pop("cell", "lstm")
    model = rnnkit.LanguageModel(
        len(vocabulary),
        8,
        cell,
        seed=0,
        dropout=options.pop("dropout", 0.0),
        backend=options.pop("backend", "numpy"),
    )
    defaults = {
        "epochs": 6, "batch_size": 8, "optimizer": rnnkit.Adam(0.02), "clip_norm": 1.0, "progress": False,
        "seed": 3, "schedule": rnnkit.cosine_schedule(6, warmup=2),
    }  # fmt: skip
    history = rnnkit.fit(model, sequences[:16], sequences[16:], **(defaults | options))
    return model, history


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_fit_learns(backend, counting, cell):
    _, history = train(counting, cell=cell, backend=backend, epochs=12, schedule=None)
    assert history.epochs == 12
    assert history.train_loss[-1] < 0.7 * history.train_loss[0]
    assert history.validation_loss[-1] < 0.8 * history.validation_loss[0]
    assert history.best_epoch == 1 + int(np.argmin(history.validation_loss))
    assert all(seconds > 0 for seconds in history.seconds)


def test_every_backend_trains_alike(backend, counting):
    vocabulary, sequences = counting
    losses = []
    for where in ("numpy", backend):
        model = rnnkit.LanguageModel(len(vocabulary), 8, dtype="float64", backend=where, seed=0, dropout=0.2)
        history = rnnkit.fit(model, sequences, epochs=3, batch_size=8, progress=False)
        losses.append(history.train_loss)
    np.testing.assert_allclose(*losses, rtol=1e-10)


def test_a_hundred_steps_are_bit_identical(counting):
    runs = [train(counting, dropout=0.2, epochs=50, schedule=None) for _ in range(2)]
    np.testing.assert_array_equal(runs[0][0].params.flat, runs[1][0].params.flat)
    assert runs[0][1].validation_loss == runs[1][1].validation_loss


def test_a_training_step_clips(backend, rng):
    """With SGD, whose step is as long as the gradient, and through `fit` as well."""
    tokens = rng.integers(0, 5, 40)

    def steps(clip_norm):
        model = rnnkit.LanguageModel(5, 6, dtype="float64", backend=backend, seed=0)
        before = np.array(to_numpy(model.params.flat))
        batch = next(iter(Stream(tokens, 4, 100, model.asarray).batches(4)))
        rnnkit.train_step(model, rnnkit.SGD(1.0), batch, clip_norm=clip_norm)
        yield np.linalg.norm(np.array(to_numpy(model.params.flat)) - before)
        model.params.flat[...] = model.asarray(before)
        rnnkit.fit(
            model, tokens, epochs=1, batch_size=4, window=100, optimizer=rnnkit.SGD(1.0), clip_norm=clip_norm,
            progress=False,
        )  # fmt: skip
        yield np.linalg.norm(np.array(to_numpy(model.params.flat)) - before)

    one, by_fit = steps(None)
    assert by_fit == one > 0.02
    np.testing.assert_allclose(list(steps(0.01)), 0.01, rtol=1e-3)


def test_a_training_step_takes_an_optimizer_that_does_not_clip(rng):
    """Of a user's own, whose step knows no clip_norm."""

    class Sign(rnnkit.SGD):
        def step(self, params, grads):
            params.flat -= self.lr * np.sign(grads.flat)

    model = rnnkit.LanguageModel(5, 6, dtype="float64", seed=0)
    before = model.params.flat.copy()
    batch = next(iter(Stream(rng.integers(0, 5, 40), 4, 10, model.asarray).batches(4)))
    rnnkit.train_step(model, Sign(0.5), batch)
    np.testing.assert_allclose(np.abs(model.params.flat - before).max(), 0.5, rtol=0, atol=1e-12)


def test_evaluate_does_not_depend_on_the_batches(backend, counting):
    vocabulary, sequences = counting
    model = rnnkit.LanguageModel(len(vocabulary), 8, dtype="float64", backend=backend, seed=0)
    one = rnnkit.evaluate(model, sequences, batch_size=3)
    other = rnnkit.evaluate(model, sequences, batch_size=100)
    assert one.num_tokens == other.num_tokens == sum(len(sequence) - 1 for sequence in sequences)
    assert abs(one.loss - other.loss) < 1e-13
    assert abs(one.accuracy - other.accuracy) < 1e-13
    total = hits = 0.0
    for sequence in sequences:
        logits = to_numpy(model(model.asarray(sequence[:-1, None]))[0])[:, 0]
        log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        total -= np.sum(log_p[np.arange(len(log_p)), sequence[1:]])
        hits += np.sum(np.argmax(logits, axis=-1) == sequence[1:])
    assert abs(one.loss - total / one.num_tokens) < 1e-12
    assert abs(one.accuracy - hits / one.num_tokens) < 1e-12


def test_a_stream_carries_its_state(backend, rng):
    tokens = rng.integers(0, 5, 200)
    model = rnnkit.LanguageModel(5, 6, dtype="float64", backend=backend, seed=0)
    losses = [rnnkit.evaluate(model, tokens, batch_size=4, window=window).loss for window in (1, 7, 1000)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-12)
    still = {"epochs": 1, "batch_size": 4, "optimizer": rnnkit.SGD(0.0), "progress": False}
    trained = [rnnkit.fit(model, tokens, window=window, **still).train_loss[0] for window in (1, 7, 1000)]
    np.testing.assert_allclose(trained, losses[0], rtol=1e-12)
    history = rnnkit.fit(model, tokens, tokens, epochs=2, batch_size=4, window=10, progress=False)
    assert history.validation_loss[1] < history.validation_loss[0]


def test_early_stopping_and_keeping_the_best(counting):
    model, history = train(
        counting, epochs=60, patience=3, keep_best=True, optimizer=rnnkit.Adam(0.3), schedule=None
    )
    assert history.epochs < 60
    assert history.epochs - history.best_epoch == 3
    assert abs(rnnkit.evaluate(model, counting[1][16:]).loss - min(history.validation_loss)) < 1e-6


def test_schedule():
    factor = rnnkit.cosine_schedule(10, warmup=2, final=0.1)
    assert [factor(0), factor(1), factor(2)] == [0.5, 1.0, 1.0]
    assert abs(factor(10) - 0.1) < 1e-12
    assert abs(factor(6) - 0.55) < 1e-12


def test_divergence_is_an_error(counting):
    vocabulary, sequences = counting
    model = rnnkit.LanguageModel(len(vocabulary), 4)
    model.params["linear.bias"][0] = np.nan
    with (
        pytest.raises(FloatingPointError, match=r"the loss became nan in epoch 1.*smaller learning rate"),
        np.errstate(all="ignore"),
    ):
        rnnkit.fit(model, sequences, epochs=2, batch_size=8, progress=False)


def test_fit_refuses_wrong_arguments(counting):
    for options, message in (
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(counting, **options)
    model = rnnkit.LanguageModel(4, 4)
    with pytest.raises(ValueError, match="1-D integer array"):
        rnnkit.fit(model, np.zeros((3, 3)), epochs=1, batch_size=1, progress=False)


def test_history_plots(counting, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'rnnkit[plot]'")
    _, history = train(counting)
    history.plot(tmp_path / "loss.png", floor=0.3, title="x")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------- interruption


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 5, 7, 11])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_interrupted_run_ends_with_the_same_numbers(
    counting, tmp_path, monkeypatch, stop_at, stream, dtype
):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)  # write down every batch
    vocabulary, sequences = counting
    data = np.concatenate(sequences) if stream else sequences

    def run(folder):
        model = rnnkit.LanguageModel(len(vocabulary), 8, dropout=0.2, dtype=dtype, seed=0)
        history = rnnkit.fit(
            model, data, data, epochs=5, batch_size=6, window=8, optimizer=rnnkit.Adam(0.02), seed=1,
            checkpoint=folder, progress=False, schedule=rnnkit.cosine_schedule(5),
        )  # fmt: skip
        return model, history

    expected, expected_history = run(tmp_path / "whole")
    original, count = training.train_step, 0

    def stops(*args, **options):
        nonlocal count
        count += 1
        if count == stop_at:
            raise StoppedError
        return original(*args, **options)

    monkeypatch.setattr(training, "train_step", stops)
    with pytest.raises(StoppedError):
        run(tmp_path / "cut")
    monkeypatch.setattr(training, "train_step", original)
    model, history = run(tmp_path / "cut")
    np.testing.assert_array_equal(model.params.flat, expected.params.flat)
    assert history.train_loss == expected_history.train_loss
    assert history.validation_loss == expected_history.validation_loss
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {"last.safetensors", "best.safetensors", "history.json"}


def test_a_killed_process_loses_nothing(counting, tmp_path):
    """SIGKILL in the middle of training: the next run goes on and ends as if nothing had happened."""
    code = textwrap.dedent(
        """
        import sys, os, numpy as np, rnnkit
        from rnnkit import training
        training.SECONDS_BETWEEN_CHECKPOINTS = 0.0
        folder, kill_at = sys.argv[1], int(sys.argv[2])
        steps, original = 0, training.train_step
        def step(*args, **options):
            global steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), 9)
            return original(*args, **options)
        training.train_step = step
        sequences = rnnkit.counting_language(20, 5, seed=1)
        v = rnnkit.Vocabulary(sequences)
        model = rnnkit.LanguageModel(len(v), 8, seed=0)
        data = [v.encode(s) for s in sequences]
        rnnkit.fit(model, data, epochs=4, batch_size=8, checkpoint=folder, progress=False)
        print(repr(model.params.flat.tobytes()))
        """
    )

    def run(folder, kill_at):
        return subprocess.run(
            [sys.executable, "-c", code, str(folder), str(kill_at)], capture_output=True, timeout=120
        )

    whole = run(tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert run(tmp_path / "cut", 8).returncode == -9
    rest = run(tmp_path / "cut", -1)
    assert rest.returncode == 0, rest.stderr
    assert rest.stdout == whole.stdout


def test_an_unfinished_run_of_other_settings_is_not_touched(counting, tmp_path, monkeypatch):
    original = training.train_step

    def stops(*args, **options):
        raise StoppedError

    train(counting, checkpoint=tmp_path, epochs=1)
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    calls = iter([original, original, stops])
    monkeypatch.setattr(training, "train_step", lambda *a, **k: next(calls)(*a, **k))
    with pytest.raises(StoppedError):
        train(counting, checkpoint=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for options, named in (({"clip_norm": 2.0}, "clip_norm"), ({"cell": "gru"}, "config")):
        with pytest.raises(ValueError, match=rf"unfinished run with other settings \(.*{named}"):
            train(counting, checkpoint=tmp_path, **options)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------- files


LAYERS = [
    lambda **o: rnnkit.LSTM(3, 4, 2, bidirectional=True, proj_size=2, forget_bias=1.0, **o),
    lambda **o: rnnkit.RNN(3, 4, nonlinearity="relu", **o),
    lambda **o: rnnkit.GRU(3, 4, bias=False, batch_first=True, **o),
    lambda **o: rnnkit.Linear(3, 4, **o),
    lambda **o: rnnkit.Embedding(3, 4, **o),
    lambda **o: rnnkit.LanguageModel(4, 3, "gru", 2, 5, dropout=0.1, tokens=["a", "b", "EOS", "<unk>"], **o),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_save_and_load(backend, make, dtype, tmp_path):
    layer = make(backend=backend, dtype=dtype)
    rnnkit.save(layer, tmp_path / "m.safetensors")
    for where in ("numpy", backend):
        loaded = rnnkit.load(tmp_path / "m.safetensors", backend=where)
        assert type(loaded) is type(layer)
        assert loaded.config == layer.config
        assert loaded.dtype == dtype
        np.testing.assert_array_equal(to_numpy(loaded.params.flat), to_numpy(layer.params.flat))
    assert rnnkit.load(tmp_path / "m.safetensors", dtype="float64").dtype == "float64"
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.oracle
def test_bfloat16_is_stored_exactly(torch, tmp_path):
    layer = rnnkit.LSTM(3, 4, backend="torch", dtype="bfloat16")
    rnnkit.save(layer, tmp_path / "m")
    loaded = rnnkit.load(tmp_path / "m", backend="torch")
    assert loaded.dtype == "bfloat16"
    assert torch.equal(loaded.params.flat, layer.params.flat)


def rewrite(path, change):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, framework="numpy") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(arrays, metadata)
    save_file(arrays, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: a.pop("weight"), "missing: weight"),
        (lambda a, m: a.update(extra=np.zeros(1)), "unknown: extra"),
        (lambda a, m: a.update(bias=np.full(4, np.nan)), "bias holds NaN or infinite"),
        (lambda a, m: a.update(bias=np.zeros(5)), r"bias must have shape \(4,\)"),
        (lambda a, m: m.clear(), "no model that rnnkit saved"),
        (lambda a, m: m.update({"class": "Transformer"}), "no model that rnnkit saved"),
        (lambda a, m: m.update(config="{"), "configuration that this version cannot read"),
        (lambda a, m: m.update(config='{"in_features": 3}'), "configuration that this version cannot read"),
        (lambda a, m: m.update(config='{"a": 3}'), "configuration that this version cannot read"),
        (lambda a, m: m.pop("dtype"), "configuration that this version cannot read"),
    ],
)
def test_load_refuses_other_models(change, message, tmp_path):
    path = tmp_path / "m.safetensors"
    rnnkit.save(rnnkit.Linear(3, 4), path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        rnnkit.load(path)


def test_load_refuses_broken_files(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="is not there"):
        rnnkit.load(path)
    with pytest.raises(FileNotFoundError, match="is not there or no file"):
        rnnkit.load(tmp_path)
    rnnkit.save(rnnkit.Linear(30, 40), path)
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:50], b"", b"not a model at all, but text"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            rnnkit.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    rnnkit.save(rnnkit.Linear(3, 4, seed=0), path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        rnnkit.save(rnnkit.Linear(3, 4, seed=1), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_history_json_is_plain(counting, tmp_path):
    _, history = train(counting, checkpoint=tmp_path)
    data = json.loads((tmp_path / "history.json").read_text())
    assert data["train_loss"] == history.train_loss
    assert math.isfinite(data["seconds"][0])


# ----------------------------------------------------------------------------------- the comparison


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (None, 40),  # none up to the limit
        ((7, 7 + 3, "EOS"), 6),  # an end too early
        ((9, 9 + 8, "b"), 8),  # an end missed
        ((11, 2, "EOS"), 10),  # an end among the a's
        ((13, 4, "b"), 40),  # after an a both a and b are right
    ],
)
def test_largest_n(monkeypatch, mistake, expected):
    from rnnkit import compare

    vocabulary = rnnkit.Vocabulary([["a", "b", "EOS"]])

    def predict(model, sequences):
        predictions = []
        for sequence in sequences:
            prediction = np.array(sequence[1:])
            n = len(sequence) // 2
            if mistake is not None and n == mistake[0]:
                prediction[mistake[1]] = vocabulary.encode([mistake[2]])[0]
            predictions.append(prediction)
        return predictions

    monkeypatch.setattr(compare, "predict", predict)
    assert compare.largest_n(None, vocabulary, limit=40) == expected


def test_entropy_floor():
    from rnnkit.compare import entropy_floor

    sequences = [["a"] * n + ["b"] * n + ["EOS"] for n in range(1, 10)]
    assert abs(entropy_floor(sequences, 9) - math.log(9) / 10) < 1e-15
