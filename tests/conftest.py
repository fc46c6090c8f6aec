"""Fixtures: every test that takes `backend` runs on each array library that is here."""

from __future__ import annotations

import importlib.util
import os
import tempfile

import numpy as np
import pytest

import rnnkit
from rnnkit._array import BackendUnavailableError, resolve_backend

REQUIRE_ORACLE = os.environ.get("RNNKIT_REQUIRE_ORACLE") == "1"
HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_configure(config):
    """Give all processes of a run one folder for what the CUDA kernels are compiled to for the host."""
    if "RNNKIT_HOST_DEVICE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="rnnkit-host-device-")
        os.environ["RNNKIT_HOST_DEVICE"] = folder.name
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: os.environ.pop("RNNKIT_HOST_DEVICE"))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("oracle") and not HAS_TORCH and not REQUIRE_ORACLE:
            item.add_marker(pytest.mark.skip(reason="torch is not installed: pip install 'rnnkit[oracle]'"))


def _array_api_strict():
    if not REQUIRE_ORACLE:
        pytest.importorskip("array_api_strict", reason="needs array-api-strict: pip install 'rnnkit[test]'")
    import array_api_strict

    return array_api_strict


BACKENDS = [
    pytest.param("numpy", id="numpy"),
    pytest.param(_array_api_strict, id="array_api_strict"),
    pytest.param("torch", id="torch", marks=pytest.mark.oracle),
    pytest.param("cupy", id="cupy", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """An argument for `backend=`, for each array library."""
    value = request.param() if callable(request.param) else request.param
    try:
        resolve_backend(value)
    except BackendUnavailableError as error:
        if REQUIRE_ORACLE and value == "torch":
            raise
        pytest.skip(str(error))
    return value


@pytest.fixture
def rng(request):
    """A random generator with a fresh seed, which a failing test shows; RNNKIT_TEST_SEED repeats it."""
    seed = int(os.environ.get("RNNKIT_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"RNNKIT_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def torch():
    """The numerical reference."""
    if not HAS_TORCH and not REQUIRE_ORACLE:
        pytest.skip("torch is not installed: pip install 'rnnkit[oracle]'")
    import torch

    return torch


@pytest.fixture
def counting():
    """Return a small counting language: the vocabulary and the encoded sequences."""
    sequences = rnnkit.counting_language(20, 5, seed=1)
    vocabulary = rnnkit.Vocabulary(sequences)
    return vocabulary, [vocabulary.encode(sequence) for sequence in sequences]
