"""Backends: how they are chosen, what they take, and how they say no."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest

import rnnkit
from rnnkit import to_numpy
from rnnkit._array import resolve_backend


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


def fake_cupy(monkeypatch, *, available, count=1):
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.cuda = types.SimpleNamespace(
        is_available=lambda: available,
        runtime=types.SimpleNamespace(getDeviceCount=lambda: count),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def test_cupy_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(rnnkit.BackendUnavailableError, match=r'pip install "rnnkit\[cuda13\]"'):
        lstm(backend="cupy")


def test_cupy_without_a_device(monkeypatch):
    fake_cupy(monkeypatch, available=False)
    with pytest.raises(rnnkit.BackendUnavailableError, match=r"needs an NVIDIA GPU.*nvidia-smi"):
        lstm(backend="cupy")


def test_cupy_device_that_is_not_there(monkeypatch):
    fake_cupy(monkeypatch, available=True, count=2)
    with pytest.raises(rnnkit.BackendUnavailableError, match=r"cupy:2.*finds 2"):
        lstm(backend="cupy:2")


def test_torch_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(rnnkit.BackendUnavailableError, match="pip install torch"):
        lstm(backend="torch")


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
