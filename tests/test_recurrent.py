"""RNN, LSTM and GRU: gradients by differences, parity with torch, and what the contract promises."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from gradcheck import check_directional
from property_based import HealthCheck, given, settings, st

import rnnkit
from rnnkit import to_numpy

CELLS = {"rnn": rnnkit.RNN, "lstm": rnnkit.LSTM, "gru": rnnkit.GRU}
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def make(cell, *args, **options):
    return CELLS[cell](*args, **options)


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def as_state(layer, parts):
    return tuple(parts) if isinstance(layer, rnnkit.LSTM) else parts[0]


def random_state(layer, B, rng):
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size]
    if isinstance(layer, rnnkit.LSTM):
        sizes.append(layer.hidden_size)
    shapes = [(layers, size) if B is None else (layers, B, size) for size in sizes]
    return [rng.standard_normal(shape) for shape in shapes]


def random_params(layer, rng):
    """Larger than the initial ones, so that the gates leave their linear range; biases too."""
    return {name: 0.5 * rng.standard_normal(value.shape) for name, value in layer.params.items()}


# --------------------------------------------------------------------------------------- gradients

OPTIONS = [
    {},
    {"bias": False},
    {"bidirectional": True},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.4},
    {"num_layers": 3, "batch_first": True, "bias": False},
]
SPECIAL = {
    "rnn": [{}, {"nonlinearity": "relu"}],
    "lstm": [{}, {"proj_size": 3}],
    "gru": [{}],
}


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        pytest.param(
            cell, {**options, **special}, id="-".join([cell, *map(str, {**options, **special}.items())])
        )
        for cell in CELLS
        for options, special in itertools.product(OPTIONS, SPECIAL[cell])
    ],
)
def test_gradients_by_differences(backend, cell, options, ragged, rng):
    T, B, I, H = 4, 3, 3, 5
    layer = make(cell, I, H, backend=backend, dtype="float64", **options)
    names = ["h_0", "c_0"][: 2 if cell == "lstm" else 1]
    lengths = None
    x = rng.standard_normal((T, B, I))
    if ragged:
        lengths = rng.permutation([T, rng.integers(1, T), 0])
    point = {"x": np.swapaxes(x, 0, 1).copy() if layer.batch_first else x}
    point |= dict(zip(names, random_state(layer, B, rng), strict=True)) | random_params(layer, rng)

    def forward(point):
        layer.load_params({name: point[name] for name in layer.params})
        state = as_state(layer, [layer.asarray(point[name]) for name in names])
        return layer.vjp(layer.asarray(point["x"]), state, lengths=lengths, seed=7)

    (output, state), pullback = forward(point)
    d_output = rng.standard_normal(output.shape)
    d_state = [rng.standard_normal(part.shape) for part in as_tuple(state)]

    def loss(point):
        (output, state), _ = forward(point)
        total = np.sum(to_numpy(output) * d_output)
        return total + sum(np.sum(to_numpy(a) * b) for a, b in zip(as_tuple(state), d_state, strict=True))

    grads = pullback(layer.asarray(d_output), as_state(layer, [layer.asarray(d) for d in d_state]))
    gradient = {"x": to_numpy(grads.x)} | {name: to_numpy(value) for name, value in grads.params.items()}
    gradient |= {name: to_numpy(value) for name, value in zip(names, as_tuple(grads.state), strict=True)}
    step = 1e-6 if options.get("nonlinearity") == "relu" else 1e-5
    check_directional(loss, point, gradient, rng, f"{cell} {options} lengths={lengths}", step)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_integer_input_equals_one_hot_vectors(backend, cell, bidirectional, rng):
    T, B, V, H = 6, 4, 7, 5
    layer = make(cell, V, H, bidirectional=bidirectional, backend=backend, dtype="float64")
    tokens = rng.integers(0, V, (T, B))
    results = []
    for x in (tokens, np.eye(V)[tokens]):
        (output, state), pullback = layer.vjp(layer.asarray(x), lengths=[6, 2, 0, 5])
        grads = pullback(layer.asarray(np.ones(output.shape)))
        results.append([to_numpy(a) for a in (output, *as_tuple(state), *grads.params.values())])
        assert (grads.x is None) == (x is tokens)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------- parity with torch


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("V", [3, 40], ids=["few", "many"])  # than tokens, so that either way is taken
@pytest.mark.parametrize("cell", CELLS)
def test_an_embedding_equals_its_vectors(backend, cell, V, ragged, rng):
    T, B, I = 5, 3, 4
    layer = make(cell, I, 6, bidirectional=True, backend=backend, dtype="float64", seed=1)
    table, host = rng.standard_normal((V, I)), rng.integers(0, V, (T, B))
    tokens, embedding = layer.asarray(host), layer.asarray(table)
    lengths = [2, 0, 4] if ragged else None
    (output, _), pullback = layer.vjp(tokens, lengths=lengths, embedding=embedding)
    (expected, _), pull_vectors = layer.vjp(layer.asarray(table[host]), lengths=lengths)
    np.testing.assert_allclose(to_numpy(output), to_numpy(expected), atol=1e-12)
    plain, _ = layer(tokens, lengths=lengths, embedding=embedding)
    np.testing.assert_allclose(to_numpy(plain), to_numpy(expected), atol=1e-12)
    d_output = layer.asarray(rng.standard_normal(output.shape))
    grads, of_vectors = pullback(d_output), pull_vectors(d_output)
    d_table = np.zeros_like(table)
    np.add.at(d_table, host.reshape(-1), to_numpy(of_vectors.x).reshape(-1, I))
    np.testing.assert_allclose(to_numpy(grads.x), d_table, atol=1e-12)
    np.testing.assert_allclose(to_numpy(grads.params.flat), to_numpy(of_vectors.params.flat), atol=1e-12)


def test_what_an_embedding_must_be():
    layer = rnnkit.LSTM(4, 6, seed=0)
    tokens, table = np.zeros((5, 3), int), np.zeros((7, 4), np.float32)
    with pytest.raises(ValueError, match=r"embedding must have shape \(V, input_size=4\), got \(7, 5\)"):
        layer(tokens, embedding=np.zeros((7, 5), np.float32))
    with pytest.raises(TypeError, match="embedding must have dtype float32, got float64"):
        layer(tokens, embedding=table.astype(float))
    with pytest.raises(ValueError, match="embedding needs x of integers"):
        layer(np.zeros((5, 3, 4), np.float32), embedding=table)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 7\), got 7"):
        layer(tokens + 7, embedding=table)


@pytest.mark.parametrize("tokens", [False, True], ids=["floats", "tokens"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_and_all_rows_give_the_same(backend, cell, tokens, monkeypatch, rng):
    T, B, I = 6, 5, 4
    layer = make(cell, I, 3, 2, bidirectional=True, backend=backend, dtype="float64", seed=1)
    x = layer.asarray(rng.integers(0, I, (T, B)) if tokens else rng.standard_normal((T, B, I)))
    parts = random_state(layer, B, rng)
    state = as_state(layer, [layer.asarray(part) for part in parts])
    lengths, results = [3, T, 0, 1, T], []
    d_output = layer.asarray(rng.standard_normal((T, B, 6)))
    for dense in (0.0, 1.0):  # the share of live rows from which on none is packed: 16 of 30 are live
        monkeypatch.setattr("rnnkit.sequence._DENSE", dense)
        (output, final), pullback = layer.vjp(x, state, lengths=lengths)
        grads = pullback(d_output, final)
        arrays = [output, *as_tuple(final), grads.params.flat, *as_tuple(grads.state)]
        results.append([to_numpy(part) for part in (arrays if tokens else [*arrays, grads.x])])
    for all_rows, packed in zip(*results, strict=True):
        np.testing.assert_allclose(packed, all_rows, atol=1e-12)


def torch_layer(torch, layer, cell):
    options = dict(layer.config)
    options.pop("forget_bias", None)
    if not layer.proj_size:
        options.pop("proj_size", None)
    peer = getattr(torch.nn, cell.upper())(**options).to(getattr(torch, layer.dtype))
    peer.load_state_dict({name: torch.tensor(to_numpy(value)) for name, value in layer.params.items()})
    return peer


def run_torch(torch, peer, x, state, lengths, d_output, d_state):
    """Return output, states and all gradients of torch's layer as flat lists of NumPy arrays."""
    x = torch.tensor(x, requires_grad=True)
    state = [torch.tensor(part, requires_grad=True) for part in state]
    given = tuple(state) if len(state) == 2 else state[0]
    if lengths is None:
        output, final = peer(x, given)
    else:
        T = x.shape[1 if peer.batch_first else 0]
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=peer.batch_first, enforce_sorted=False
        )
        output, final = peer(packed, given)
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(
            output, batch_first=peer.batch_first, total_length=T
        )
    finals = as_tuple(final)
    loss = (output * torch.tensor(d_output)).sum()
    loss = loss + sum((a * torch.tensor(d)).sum() for a, d in zip(finals, d_state, strict=True))
    loss.backward()
    grads = [x.grad, *(part.grad for part in state), *(p.grad for _, p in peer.named_parameters())]
    return [a.detach().numpy() for a in (output, *finals)], [g.numpy() for g in grads]


def compare_with_torch(torch, layer, cell, x, state, lengths, rng):
    A = layer.asarray
    peer = torch_layer(torch, layer, cell)
    (output, final), pullback = layer.vjp(A(x), as_state(layer, [A(part) for part in state]), lengths=lengths)
    dtype = np.dtype(layer.dtype)
    d_output = rng.standard_normal(output.shape).astype(dtype)
    d_state = [rng.standard_normal(part.shape).astype(dtype) for part in as_tuple(final)]
    values, gradients = run_torch(torch, peer, x, state, lengths, d_output, d_state)
    grads = pullback(A(d_output), as_state(layer, [A(d) for d in d_state]))
    ours = [to_numpy(a) for a in (output, *as_tuple(final))]
    names = [name for name, _ in peer.named_parameters()]
    our_grads = [grads.x, *as_tuple(grads.state), *(grads.params[name] for name in names)]
    value_error = max(np.max(np.abs(a - b), initial=0.0) for a, b in zip(ours, values, strict=True))
    our_grads = [to_numpy(a) for a in our_grads]
    grad_error = distance(our_grads, gradients)
    if dtype == np.float32 and grad_error > 1e-5:
        # Where a gradient nearly cancels, both are rounded coarsely: then ours may be as far from the truth
        # as torch's, but not much farther.
        x, *wide = (np.asarray(part, np.float64) for part in (x, d_output, *state, *d_state))
        d_output, (state, d_state) = wide[0], (wide[1 : 1 + len(state)], wide[1 + len(state) :])
        _, exact = run_torch(torch, peer.double(), x, state, lengths, d_output, d_state)
        if distance(our_grads, exact) <= 3 * distance(gradients, exact):
            grad_error = 0.0
    return value_error, grad_error


def distance(ours, theirs):
    """Return the largest error of an array relative to its norm."""
    return max(
        float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-3)
        for a, b in zip(ours, theirs, strict=True)
    )


def random_case(rng):
    cell = rng.choice(list(CELLS))
    options = {
        "num_layers": int(rng.integers(1, 4)),
        "bias": bool(rng.integers(2)),
        "batch_first": bool(rng.integers(2)),
        "bidirectional": bool(rng.integers(2)),
    }
    I, H = int(rng.integers(1, 9)), int(rng.integers(2, 12))
    if cell == "lstm" and rng.integers(2):
        options["proj_size"] = int(rng.integers(1, H))
    if cell == "rnn":
        options["nonlinearity"] = str(rng.choice(["tanh", "relu"]))
    return str(cell), I, H, options


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_200_random_configurations_agree_with_torch(backend, torch, dtype, rng):
    for number in range(200 if backend == "numpy" else 50):
        cell, I, H, options = random_case(rng)
        layer = make(cell, I, H, backend=backend, dtype=dtype, **options)
        T, B = int(rng.integers(1, 8)), int(rng.integers(1, 6))
        x = rng.standard_normal((B, T, I) if layer.batch_first else (T, B, I)).astype(dtype)
        state = [part.astype(dtype) for part in random_state(layer, B, rng)]
        lengths = rng.integers(1, T + 1, B) if rng.integers(2) else None  # torch refuses length 0
        values, grads = compare_with_torch(torch, layer, cell, x, state, lengths, rng)
        value_limit, grad_limit = (1e-12, 1e-12) if dtype == "float64" else (1e-5, 1e-5)
        case = f"case {number}: {layer!r}, T={T}, B={B}, lengths={lengths}"
        assert values <= value_limit, f"{case}: outputs differ by {values:.1e}"
        assert grads <= grad_limit, f"{case}: gradients differ by {grads:.1e}"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recorded_torch_results(backend, path):
    data = np.load(path)
    cell, options = str(data["cell"]), eval(str(data["options"]), {})
    layer = make(cell, backend=backend, dtype="float64", **options)
    layer.load_params({name.removeprefix("p."): data[name] for name in data.files if name.startswith("p.")})
    A = layer.asarray
    states = [A(data[name]) for name in ("h_0", "c_0") if name in data.files]
    lengths = data["lengths"] if "lengths" in data.files else None
    (output, final), pullback = layer.vjp(A(data["x"]), as_state(layer, states), lengths=lengths)
    d_final = [A(data[name]) for name in ("d_h_n", "d_c_n") if name in data.files]
    grads = pullback(A(data["d_output"]), as_state(layer, d_final))
    got = {"output": output, "d_x": grads.x} | {f"d_p.{name}": value for name, value in grads.params.items()}
    got |= dict(zip(("h_n", "c_n"), as_tuple(final), strict=False))
    got |= dict(zip(("d_h_0", "d_c_0"), as_tuple(grads.state), strict=False))
    for name, value in got.items():
        np.testing.assert_allclose(to_numpy(value), data[name], rtol=0, atol=1e-12, err_msg=name)


def test_there_are_recorded_results():
    assert len(GOLDEN) >= 6


# --------------------------------------------------------------------------------- ragged, streaming


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ragged_batch_equals_each_sequence_alone(backend, data):
    cell = data.draw(st.sampled_from(list(CELLS)))
    T, B, I, H = (data.draw(st.integers(1, 6)) for _ in range(4))
    options = {"num_layers": data.draw(st.integers(1, 2)), "bidirectional": data.draw(st.booleans())}
    if cell == "lstm" and H > 1:
        options["proj_size"] = data.draw(st.integers(0, H - 1))
    lengths = np.array(data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    layer = make(cell, I, H, backend=backend, dtype="float64", seed=3, **options)
    x = rng.standard_normal((T, B, I))
    for b, length in enumerate(lengths):
        x[length:, b] = np.nan  # what lies in the padding must never be seen
    state = random_state(layer, B, rng)
    A = layer.asarray
    output, final = layer(A(x), as_state(layer, [A(part) for part in state]), lengths=lengths)
    output = to_numpy(output)
    for b, length in enumerate(lengths):
        assert np.all(output[length:, b] == 0.0)
        alone = [part[:, b : b + 1] for part in state]
        if length:
            expected, alone = layer(A(x[:length, b : b + 1]), as_state(layer, [A(part) for part in alone]))
            np.testing.assert_allclose(output[:length, b], to_numpy(expected)[:, 0], rtol=0, atol=1e-14)
            alone = [to_numpy(part) for part in as_tuple(alone)]
        for got, expected in zip(as_tuple(final), alone, strict=True):
            np.testing.assert_allclose(to_numpy(got)[:, b], expected[:, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_padding_reaches_no_gradient(backend, cell, rng):
    layer = make(cell, 3, 4, num_layers=2, bidirectional=True, backend=backend, dtype="float64")
    lengths = np.array([5, 0, 2])
    x, d_output = rng.standard_normal((5, 3, 3)), rng.standard_normal((5, 3, 8))
    flats = []
    for poison in (0.0, np.nan, np.inf):
        for b, length in enumerate(lengths):
            x[length:, b] = d_output[length:, b] = poison
        _, pullback = layer.vjp(layer.asarray(x), lengths=lengths)
        grads = pullback(layer.asarray(d_output))
        flats.append(np.concatenate([to_numpy(grads.params.flat), to_numpy(grads.x).ravel()]))
    assert np.all(np.isfinite(flats[0]))
    np.testing.assert_array_equal(flats[0], flats[1])
    np.testing.assert_array_equal(flats[0], flats[2])


@pytest.mark.parametrize("cell", CELLS)
def test_step_and_any_chunks_equal_the_whole_sequence(backend, cell, rng):
    layer = make(cell, 3, 4, num_layers=2, backend=backend, dtype="float64")
    x = rng.standard_normal((9, 2, 3))
    whole, final = layer(layer.asarray(x))
    steps, state = [], None
    for t in range(9):
        y, state = layer.step(layer.asarray(x[t]), state)
        steps.append(to_numpy(y))
    np.testing.assert_allclose(np.stack(steps), to_numpy(whole), rtol=0, atol=1e-14)
    chunks, state = [], None
    for start, end in ((0, 1), (1, 6), (6, 9)):
        y, state = layer(layer.asarray(x[start:end]), state)
        chunks.append(to_numpy(y))
    np.testing.assert_allclose(np.concatenate(chunks), to_numpy(whole), rtol=0, atol=1e-14)
    for a, b in zip(as_tuple(state), as_tuple(final), strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS)
def test_step_without_a_batch_and_with_tokens(backend, cell):
    layer = make(cell, 3, 4, batch_first=True, backend=backend, dtype="float64", seed=0)
    y, state = layer.step(layer.asarray(np.eye(3)[1]))
    assert y.shape == (4,)
    assert as_tuple(state)[0].shape == (1, 4)
    z, _ = layer.step(layer.asarray(np.array([1, 1])))
    np.testing.assert_allclose(to_numpy(z)[0], to_numpy(y), rtol=0, atol=1e-15)


# --------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_and_batch_first_are_the_same_numbers(backend, cell, rng):
    x = rng.standard_normal((6, 1, 3))
    first = make(cell, 3, 4, bidirectional=True, backend=backend, dtype="float64", seed=5)
    last = make(cell, 3, 4, bidirectional=True, batch_first=True, backend=backend, dtype="float64", seed=5)
    A = first.asarray
    state = random_state(first, 1, rng)
    flat = as_state(first, [A(part[:, 0]) for part in state])
    state = as_state(first, [A(part) for part in state])
    (y, s), pull = first.vjp(A(x), state)
    (y_u, s_u), pull_u = first.vjp(A(x[:, 0]), flat)
    (y_b, s_b), pull_b = last.vjp(A(np.swapaxes(x, 0, 1).copy()), state)
    assert y_u.shape == (6, 8)
    assert y_b.shape == (1, 6, 8)
    np.testing.assert_array_equal(to_numpy(y)[:, 0], to_numpy(y_u))
    np.testing.assert_array_equal(to_numpy(y)[:, 0], to_numpy(y_b)[0])
    for a, b, c in zip(as_tuple(s), as_tuple(s_u), as_tuple(s_b), strict=True):
        np.testing.assert_array_equal(to_numpy(a)[:, 0], to_numpy(b))
        np.testing.assert_array_equal(to_numpy(a), to_numpy(c))
    d = rng.standard_normal((6, 8))
    grads = [pull(A(d[:, None]), s), pull_u(A(d), s_u), pull_b(A(d[None]), s_b)]
    assert [tuple(g.x.shape) for g in grads] == [(6, 1, 3), (6, 3), (1, 6, 3)]
    for g in grads[1:]:
        np.testing.assert_allclose(to_numpy(g.params.flat), to_numpy(grads[0].params.flat), rtol=1e-12)


def test_pullback_takes_none_for_zeros(backend):
    layer = rnnkit.LSTM(3, 4, backend=backend, dtype="float64", seed=0)
    x = layer.asarray(np.ones((5, 2, 3)))
    ones = layer.asarray(np.ones((1, 2, 4)))
    zeros = layer.asarray(np.zeros((1, 2, 4)))
    flats = []
    for d_output, d_state in (
        (None, (ones, None)),
        (layer.asarray(np.zeros((5, 2, 4))), (ones, zeros)),
    ):
        _, pullback = layer.vjp(x)
        flats.append(to_numpy(pullback(d_output, d_state).params.flat))
    np.testing.assert_array_equal(*flats)


def test_pullback_can_be_called_once(backend):
    layer = rnnkit.GRU(3, 4, backend=backend)
    (output, _), pullback = layer.vjp(layer.asarray(np.zeros((2, 1, 3))))
    with pytest.raises(ValueError, match="d_output must have shape"):
        pullback(output[:1, ...])
    pullback(output)  # a refused call did not use it up
    with pytest.raises(RuntimeError, match="called before"):
        pullback(output)


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_and_params_are_left_alone(backend, cell, rng):
    layer = make(cell, 3, 4, num_layers=2, bidirectional=True, backend=backend, dtype="float64")
    x, state = rng.standard_normal((5, 2, 3)), random_state(layer, 2, rng)
    arrays = [layer.asarray(a) for a in (x, *state)]
    before = [np.array(to_numpy(a)) for a in (*arrays, layer.params.flat)]
    (output, final), pullback = layer.vjp(arrays[0], as_state(layer, arrays[1:]), lengths=[5, 3])
    d_output = layer.asarray(np.ones(output.shape))
    pullback(d_output, final)
    for a, b in zip((*arrays, layer.params.flat), before, strict=True):
        np.testing.assert_array_equal(to_numpy(a), b)
    np.testing.assert_array_equal(to_numpy(d_output), 1.0)


def test_read_only_input_is_fine():
    layer = rnnkit.LSTM(3, 4)
    x = np.ones((5, 2, 3), np.float32)
    x.flags.writeable = False
    (output, _), pullback = layer.vjp(x, lengths=np.array([5, 2]))
    output.flags.writeable = False
    pullback(output)


@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_is_answered_as_torch_does(backend, cell):
    layer = make(cell, 3, 4, num_layers=2, backend=backend)
    (output, state), pullback = layer.vjp(layer.asarray(np.zeros((5, 0, 3))))
    assert tuple(output.shape) == (5, 0, 4)
    assert tuple(as_tuple(state)[0].shape) == (2, 0, 4)
    grads = pullback(output)
    assert np.all(to_numpy(grads.params.flat) == 0.0)
    assert tuple(grads.x.shape) == (5, 0, 3)


def test_dropout_masks_are_the_same_everywhere_and_scale(backend, rng):
    x = rng.standard_normal((50, 8, 3))
    outputs = {}
    for where in ("numpy", backend):
        layer = rnnkit.RNN(3, 16, 2, dropout=0.3, backend=where, dtype="float64", seed=0)
        (first, _), _ = layer.vjp(layer.asarray(x), seed=11)
        (again, _), _ = layer.vjp(layer.asarray(x), seed=11)
        (other, _), _ = layer.vjp(layer.asarray(x), seed=12)
        np.testing.assert_array_equal(to_numpy(first), to_numpy(again))
        assert not np.allclose(to_numpy(first), to_numpy(other))
        outputs[str(where)] = to_numpy(first)
    np.testing.assert_allclose(*(list(outputs.values()) * 2)[:2], rtol=0, atol=1e-13)


def test_inference_drops_nothing():
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    layers = [rnnkit.LSTM(3, 4, 2, dropout=p, seed=0) for p in (0.0, 0.5)]
    np.testing.assert_array_equal(layers[0](x)[0], layers[1](x)[0])
    # Another kernel may serve training: two of them agree within 2e-6.
    np.testing.assert_allclose(layers[0](x)[0], layers[0].vjp(x)[0][0], rtol=0, atol=2e-6)


def test_same_seed_same_weights_on_every_backend(backend):
    ours = rnnkit.LSTM(3, 50, 2, bidirectional=True, seed=42)
    theirs = rnnkit.LSTM(3, 50, 2, bidirectional=True, seed=42, backend=backend)
    np.testing.assert_array_equal(ours.params.flat, to_numpy(theirs.params.flat))
    assert not np.array_equal(ours.params.flat, rnnkit.LSTM(3, 50, 2, bidirectional=True).params.flat)


def test_initialisation_is_torchs(rng):
    layer = rnnkit.GRU(30, 64, 2, seed=int(rng.integers(2**31)))
    bound = 1 / np.sqrt(64)
    for name, value in layer.params.items():
        assert np.all(np.abs(value) <= bound)
        if value.size > 1000:
            assert abs(float(value.mean())) < 0.1 * bound, name
            assert abs(float(value.std()) - bound / np.sqrt(3)) < 0.05 * bound, name
    correlation = np.corrcoef(layer.params["weight_hh_l0"].ravel(), layer.params["weight_hh_l1"].ravel())
    assert abs(correlation[0, 1]) < 0.05


def test_forget_bias():
    layer = rnnkit.LSTM(3, 4, 2, bidirectional=True, forget_bias=1.5, seed=0)
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        total = layer.params[f"bias_ih_{suffix}"] + layer.params[f"bias_hh_{suffix}"]
        np.testing.assert_array_equal(total[4:8], np.float32(1.5))
        assert not np.any(total[:4] == 1.5)


def test_to_moves_a_copy(backend, rng):
    layer = rnnkit.LSTM(3, 4, 2, proj_size=2, seed=0)
    moved = layer.to(backend, dtype="float64")
    np.testing.assert_array_equal(to_numpy(moved.params.flat), layer.params.flat)
    assert moved.dtype == "float64"
    assert moved.config == layer.config
    back = moved.to("numpy", dtype="float32")
    back.params["bias_ih_l0"][...] = 0.0
    assert np.any(layer.params["bias_ih_l0"] != 0.0)


def test_copies_and_pickles_keep_numbers_and_views(backend, rng):
    layer = rnnkit.GRU(3, 4, backend=backend, dtype="float64")
    x = layer.asarray(rng.standard_normal((4, 2, 3)))
    expected = to_numpy(layer(x)[0])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(to_numpy(other(x)[0]), expected)
        other.params.flat[...] = 0.0
        assert np.all(to_numpy(other(x)[0]) == 0.0)
    np.testing.assert_array_equal(to_numpy(layer(x)[0]), expected)


def test_params_are_views_with_torchs_names_and_cannot_be_replaced(backend):
    layer = rnnkit.LSTM(3, 4, 2, bidirectional=True, proj_size=2, backend=backend)
    assert list(layer.params)[:5] == [
        "weight_ih_l0",
        "weight_hh_l0",
        "bias_ih_l0",
        "bias_hh_l0",
        "weight_hr_l0",
    ]
    assert isinstance(layer.params, dict)
    layer.params.flat[...] = 0.0
    assert all(np.all(to_numpy(value) == 0.0) for value in layer.params.values())
    with pytest.raises(TypeError, match="load_params"):
        layer.params["bias_ih_l0"] = layer.params["bias_ih_l0"]
    for change in (lambda p: p.update({}), lambda p: p.pop("bias_ih_l0"), lambda p: p.clear()):
        with pytest.raises(TypeError, match="load_params"):
            change(layer.params)


@pytest.mark.oracle
def test_torch_state_dict_loads(backend, torch, rng):
    peer = torch.nn.LSTM(3, 4, 2, bidirectional=True)
    layer = rnnkit.LSTM(3, 4, 2, bidirectional=True, backend=backend)
    layer.load_params(peer.state_dict())
    x = rng.standard_normal((5, 2, 3)).astype(np.float32)
    expected = peer(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(to_numpy(layer(layer.asarray(x))[0]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision(backend, cell, name, rng):
    try:
        layer = make(cell, 8, 16, 2, backend=backend, dtype=name, seed=0)
    except TypeError as error:
        pytest.skip(str(error))
    exact = layer.to("numpy", dtype="float64")
    x = layer.asarray(rng.standard_normal((20, 3, 8)))
    (output, state), pullback = layer.vjp(x, lengths=[20, 7, 0])
    assert str(output.dtype).endswith(name)
    if cell == "lstm":
        assert str(state[1].dtype).endswith("float32")
    (expected, _), exact_pullback = exact.vjp(to_numpy(x).astype(np.float64), lengths=[20, 7, 0])
    # A few units in the last place of the half format: 2^-11 (float16) and 2^-8 (bfloat16) at 1.
    unit = 2.0**-11 if name == "float16" else 2.0**-8
    assert np.max(np.abs(to_numpy(output).astype(np.float64) - expected)) < 4 * unit
    d = layer.asarray(rng.standard_normal(output.shape))
    got = to_numpy(pullback(d).params.flat).astype(np.float64)
    want = exact_pullback(to_numpy(d).astype(np.float64)).params.flat
    assert np.linalg.norm(got - want) < 10 * unit * np.linalg.norm(want)
    first, middle = layer(x[:9, ...])
    second, _ = layer(x[9:, ...], middle)
    whole, _ = layer(x)
    pieces = np.concatenate([to_numpy(first), to_numpy(second)])
    # h is rounded at every step, so pieces differ only where a float32 sum, whose order BLAS chooses by the
    # number of rows, lies at the edge between two half numbers.
    np.testing.assert_allclose(pieces, to_numpy(whole), rtol=0, atol=4 * unit)


def test_explain_names_modules():
    text = rnnkit.LSTM(3, 4).explain()
    assert "lstm_forward" in text
    assert "lstm_backward" in text


def test_kernels_can_be_ruled_out(monkeypatch):
    monkeypatch.setenv("RNNKIT_KERNELS", "reference")
    layer = rnnkit.LSTM(3, 4, seed=0)
    assert "lstm_forward: reference" in layer.explain()
    assert "ruled out" in layer.explain()
