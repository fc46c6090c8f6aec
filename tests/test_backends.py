"""Backends: how they are chosen, what they take, and how they say no."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest

import rnnkit
from rnnkit import _cuda, to_numpy
from rnnkit._array import Backend, _bfloat16_of_cupy, resolve_backend


def lstm(**options):
    return rnnkit.LSTM(3, 4, seed=0, **options)


def test_default_is_numpy_and_the_environment_overrides(monkeypatch):
    monkeypatch.delenv("RNNKIT_BACKEND", raising=False)
    assert lstm().backend == "numpy"
    monkeypatch.setenv("RNNKIT_BACKEND", "abacus")
    with pytest.raises(ValueError, match="got 'abacus'"):
        lstm()
    assert lstm(backend="numpy").backend == "numpy"


@pytest.mark.parametrize("name", ["abacus", "numpy:0", "cupy:x", "cupy:-1", "", "jax"])
def test_unknown_backends(name):
    if name == "":
        assert lstm(backend=None).backend == "numpy"
        return
    with pytest.raises(ValueError, match=r"backend must be|takes a device number"):
        lstm(backend=name)


@pytest.mark.parametrize("value", [3, np.zeros(3), object()])
def test_a_backend_is_a_name_or_a_module(value):
    with pytest.raises(TypeError, match="backend must be a name or an Array API namespace module"):
        lstm(backend=value)


def test_a_module_that_is_no_namespace():
    with pytest.raises(TypeError, match="math is none"):
        lstm(backend=__import__("math"))


def test_modules_and_names_are_the_same():
    assert lstm(backend=np).backend == "numpy"
    import array_api_compat.numpy

    assert lstm(backend=array_api_compat.numpy).backend == "numpy"


def fake_cupy(monkeypatch, *, available=True, count=1, driver=13000, nvrtc=(13, 0)):
    """Put a CuPy for CUDA 13 in place, on a machine as described; `nvrtc` may be what its loading raises."""

    def nvrtc_version():
        if isinstance(nvrtc, Exception):
            raise nvrtc
        return nvrtc

    def properties(number):
        return {"name": b"A GPU", "totalGlobalMem": 80 * 2**30, "major": 9, "minor": 0}

    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.cuda = types.SimpleNamespace(
        is_available=lambda: available,
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: count,
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: 13020,
            getDeviceProperties=properties,
        ),
        nvrtc=types.SimpleNamespace(getVersion=nvrtc_version),
        get_local_runtime_version=lambda: 13010,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cublas", types.ModuleType("cupy.cublas"))
    return cupy


def refusal(backend="cupy"):
    """Return the message of a backend that is not there; it must be one line."""
    with pytest.raises(rnnkit.BackendUnavailableError) as error:
        lstm(backend=backend)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_cupy_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert 'which is not installed: pip install "rnnkit[cuda13]"' in refusal()


@pytest.mark.parametrize("driver", [0, 13000, 13020, 14000])
def test_cupy_without_a_device(monkeypatch, driver):
    fake_cupy(monkeypatch, available=False, driver=driver)
    assert re.search(r"needs an NVIDIA GPU.*14\.2\.0 finds none.*nvidia-smi", refusal())


def test_cupy_for_a_newer_cuda_than_the_driver(monkeypatch):
    fake_cupy(monkeypatch, available=False, driver=12080)
    assert re.search(
        r"needs a driver for CUDA 13.*here is for CUDA 12\.8.*uninstall cupy-cuda13x.*rnnkit\[cuda12\]",
        refusal("cupy:0"),
    )


def test_cupy_without_cudas_libraries(monkeypatch):
    reason = 'Failure finding "libnvrtc.so.13": No such file'
    fake_cupy(monkeypatch, nvrtc=RuntimeError(f"{reason}\nand much advice"))
    message = refusal()
    assert re.search(r'do not load here \(Failure finding "libnvrtc\.so\.13.*"cupy-cuda13x\[ctk\]"', message)
    assert "advice" not in message
    fake_cupy(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy.cublas", None)
    assert "do not load here" in refusal()


def test_cupy_that_fails_to_import_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text(
        "try:\n    import no_such_library\n"
        "except ImportError as error:\n    raise ImportError('\\n====\\nadvice') from error\n"
    )
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal()
    assert "do not load here (No module named 'no_such_library')" in message
    assert "advice" not in message


def test_cupy_device_that_is_not_there(monkeypatch):
    fake_cupy(monkeypatch, count=2)
    assert re.search(r"cupy:2.*finds 2", refusal("cupy:2"))


def test_cupy_13_has_no_bfloat16(monkeypatch):
    cupy = fake_cupy(monkeypatch)
    bfloat16 = _bfloat16_of_cupy()
    assert bfloat16.name == "bfloat16"
    cupy.__version__ = "13.6.0"
    with pytest.raises(TypeError, match=r"'bfloat16' needs CuPy 14 or later, and this is CuPy 13\.6\.0"):
        _bfloat16_of_cupy()


@pytest.mark.parametrize(("tf32", "shown"), [(1, "off"), (7, "on")])
def test_what_info_says_about_cupy(monkeypatch, tf32, shown):
    fake_cupy(monkeypatch, count=2)
    linalg = types.ModuleType("cupy._core._routines_linalg")
    linalg.COMPUTE_TYPE_TF32, linalg.get_compute_type = 7, lambda dtype: tf32
    monkeypatch.setitem(sys.modules, "cupy._core._routines_linalg", linalg)
    assert _cuda.describe_cupy() == [
        "device 0: A GPU, 80 GiB, compute capability 9.0",
        "device 1: A GPU, 80 GiB, compute capability 9.0",
        "CUDA 13.1; the driver is for CUDA 13.0",
        f"TF32 in float32 matrix products: {shown} (CUPY_TF32=1 turns it on)",
    ]


def test_torch_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("torch", "torch:cuda"):
        with pytest.raises(
            rnnkit.BackendUnavailableError, match=f'backend "{name}" needs.*pip install torch'
        ):
            lstm(backend=name)


@pytest.mark.oracle
def test_torch_devices(torch):
    with pytest.raises(ValueError, match="names no torch device"):
        lstm(backend="torch:abacus")
    assert lstm(backend="torch:cpu").backend == "torch:cpu"
    if not torch.cuda.is_available():
        with pytest.raises(rnnkit.BackendUnavailableError, match="has no such device here"):
            lstm(backend="torch:cuda")


@pytest.mark.oracle
def test_torch_tensors_that_require_grad(torch):
    layer = lstm(backend="torch")
    x = torch.zeros(2, 1, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"x requires grad.*x.detach\(\)"):
        layer(x)
    with torch.no_grad():
        layer(x)


@pytest.mark.oracle
def test_arrays_of_another_library_are_shared_not_copied(torch):
    x = np.ones((2, 1, 3), np.float32)
    where = resolve_backend("torch")
    shared = where.accept(x, "x")
    shared[0, 0, 0] = 7.0
    assert x[0, 0, 0] == 7.0
    output, _ = lstm()(torch.ones(2, 1, 3))
    assert isinstance(output, np.ndarray)


def test_another_device_is_refused_with_the_call_that_would_do_it():
    class OnGPU:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **_):
            raise AssertionError("nothing may be copied")

    with pytest.raises(TypeError, match=r"x must lie on the device.*rnnkit\.to_numpy\(value\)"):
        lstm()(OnGPU())


@pytest.mark.parametrize("x", [[[[1.0, 2.0, 3.0]]], 3.0, "abc", None])
def test_what_is_no_array_is_refused(x):
    with pytest.raises(TypeError, match=r"x must be an array of backend 'numpy'.*asarray\(\)"):
        lstm()(x)


def test_asarray_copies_and_keeps_integers(backend):
    layer = lstm(backend=backend)
    host = np.ones((2, 3))
    array = layer.asarray(host)
    host[...] = 0.0
    assert np.all(to_numpy(array) == 1.0)
    assert str(array.dtype).endswith("float32")
    assert str(layer.asarray([[1, 2]]).dtype).endswith("int64")
    assert str(layer.asarray(np.ones((2, 2), np.float16)[::-1]).dtype).endswith("float32")


def test_to_numpy():
    assert to_numpy(3.0).shape == ()
    with pytest.raises(TypeError, match="to_numpy takes an array, got str"):
        to_numpy("abc")


def test_a_dtype_must_be_a_float():
    assert lstm(dtype=np.float64).dtype == "float64"
    assert lstm(dtype=np.dtype("float64")).dtype == "float64"
    for dtype in ("int32", "complex64", "quad", None):
        with pytest.raises(TypeError, match="dtype must be one of float16, bfloat16, float32, float64"):
            lstm(dtype=dtype)
    with pytest.raises(TypeError, match="'bfloat16' does not exist in backend 'numpy'"):
        lstm(dtype="bfloat16")


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_pickle_to_a_process_that_chooses_the_backend_anew(tmp_path):
    import pickle

    (tmp_path / "layer.pkl").write_bytes(pickle.dumps(lstm()))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'layer.pkl')!r}, 'rb')).params.flat.sum())"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert abs(float(result.stdout) - float(lstm().params.flat.sum())) < 1e-4


# ------------------------------------------------------------------------------- the device of the arrays


@pytest.fixture
def elsewhere(monkeypatch):
    """Return a backend on which whatever computes fails, but where its device is made the current one.

    CuPy computes and allocates on the current device, not where the arrays are: with "cupy:1" a program's
    current device is another one. Views are made anywhere.
    """
    strict = pytest.importorskip(
        "array_api_strict", reason="needs array-api-strict: pip install 'rnnkit[test]'"
    )
    from array_api_strict._array_object import Array

    depth = 0

    @contextmanager
    def active(self):
        nonlocal depth
        depth += 1
        try:
            yield
        finally:
            depth -= 1

    make, assign = Array._new.__func__, Array.__setitem__

    def new(cls, x, /, device):
        if not depth and not (isinstance(x, np.ndarray) and x.base is not None):
            pytest.fail("something was computed on another device", pytrace=True)
        return make(cls, x, device)

    def setitem(self, key, value, /):
        if not depth:
            pytest.fail("something was written from another device", pytrace=True)
        assign(self, key, value)

    backend = resolve_backend(strict)
    monkeypatch.setattr(Backend, "active", active)
    monkeypatch.setattr(Array, "_new", classmethod(new))
    monkeypatch.setattr(Array, "__setitem__", setitem)
    for name in ("__iadd__", "__isub__", "__imul__", "__itruediv__"):
        monkeypatch.delattr(Array, name)  # then a = a + b, which makes a new array
    return backend


@pytest.mark.parametrize("lengths", [None, [6, 0, 2]], ids=["padded", "ragged"])
@pytest.mark.parametrize("layer", [rnnkit.RNN, rnnkit.GRU, rnnkit.LSTM])
def test_layers_compute_on_their_device(elsewhere, layer, lengths, rng):
    deep = layer(5, 8, num_layers=2, bidirectional=True, dropout=0.2, backend=elsewhere, seed=0)
    x = deep.asarray(rng.standard_normal((6, 3, 5)))
    deep(x, lengths=lengths)
    (output, state), pullback = deep.vjp(x, lengths=lengths, seed=1)
    pullback(output, state)
    one = layer(5, 8, backend=elsewhere, batch_first=True, seed=0)
    one.load_params(one.params)
    (output, state), pullback = one.vjp(
        x, lengths=None if lengths is None else one.asarray([3, 0, 2, 1, 1, 1])
    )
    pullback(output, None)
    _, state = one.step(x[0, ...])
    one.step(x[1, ...], state)
    tokens = one.asarray(rng.integers(0, 5, (6, 3)))
    one(tokens)
    one.to(elsewhere, dtype="float64")
    one.to("numpy").to(elsewhere)


def test_what_is_around_layers_computes_on_its_device(elsewhere, rng):
    embedding = rnnkit.Embedding(7, 4, backend=elsewhere, seed=0)
    linear = rnnkit.Linear(4, 7, backend=elsewhere, seed=0)
    tokens = linear.asarray(rng.integers(0, 7, (6, 3)))
    x, pull_embedding = embedding.vjp(tokens)
    embedding(tokens)
    x, pull_dropout = rnnkit.Dropout(0.4).vjp(x, seed=2)
    linear(x)
    y, pull_linear = linear.vjp(x)
    mask = resolve_backend(elsewhere).asarray(rng.random((6, 3)) < 0.5)
    for options in ({}, {"mask": mask}, {"lengths": [0, 6, 3]}, {"lengths": linear.asarray([0, 6, 3])}):
        rnnkit.softmax_cross_entropy(y, tokens, gradient=False, **options)
        _, d_logits = rnnkit.softmax_cross_entropy(y, tokens, **options)
        _, d_y = rnnkit.mean_squared_error(y, y, **options)
    empty = linear.asarray(np.zeros((0, 3, 7)))
    rnnkit.softmax_cross_entropy(empty, linear.asarray(np.zeros((0, 3), np.int64)))
    rnnkit.mean_squared_error(empty, empty)
    pull_linear(d_y)
    grads = pull_linear(d_logits)
    pull_embedding(pull_dropout(grads.x))
    rnnkit.clip_grad_norm(grads.params, 0.1)
    for optimizer in (rnnkit.SGD(0.1, momentum=0.9, weight_decay=0.1), rnnkit.Adam(weight_decay=0.1)):
        optimizer.step(linear.params, grads.params)
        optimizer.step(linear.params, grads.params, clip_norm=0.1)


@pytest.mark.parametrize("text", [False, True], ids=["sequences", "text"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_models_are_trained_on_their_device(elsewhere, counting, cell, text, tmp_path):
    vocabulary, data = counting
    data = np.concatenate(data) if text else data
    options = {"embedding_dim": 3, "dropout": 0.2} if text else {}
    model = rnnkit.LanguageModel(len(vocabulary), 8, cell, backend=elsewhere, seed=0, **options)
    rnnkit.fit(
        model, data, data, epochs=2, batch_size=4, window=5, clip_norm=1.0, keep_best=True,
        checkpoint=tmp_path / "run", progress=False,
    )  # fmt: skip
    rnnkit.evaluate(model, data, batch_size=4)
    model.generate([0, 1], 3, temperature=1.0, seed=0)
    rnnkit.save(model, tmp_path / "model.safetensors")
    rnnkit.load(tmp_path / "model.safetensors", backend=elsewhere)
