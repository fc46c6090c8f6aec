"""Who imports whom, what `import rnnkit` loads, and what it offers."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rnnkit

PACKAGE = Path(rnnkit.__file__).parent

# Each rank imports only from earlier ranks; names in one rank do not import each other.
RANKS = [
    {"_version", "_typing"},
    {"_cuda"},
    {"_array"},
    {"_random"},
    {"kernels"},
    {"validation"},
    {"parameters", "sequence"},
    {"direction"},
    {"stack", "layers", "losses", "optim"},
    {"recurrent"},
    {"model"},
    {"data"},
    {"checkpoint", "plotting"},
    {"training"},
    {"_torch_peer"},
    {"compare"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
GPU_AND_COMPILERS = {"cupy", "cupy_backends", "cupyx", "torch", "numba", "jax", "cuda", "triton"}
# The one file that compiles and launches for CuPy; all else there is written against the arrays' namespace.
MAY_IMPORT_CUPY = {"kernels/cuda/_loader.py"}
# The peer of the comparison uses torch as a framework, which is its purpose.
MAY_IMPORT_TORCH = {"_torch_peer"}


def module_files():
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    """Return the name that has a rank: a file's, or `kernels` for all in that package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path):
    """Yield (level, module, names) of every import statement, also those in functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ranks(path):
    importer = module_name(path)
    assert importer in RANK, f"{importer} has no rank: give it one here and in CONTRIBUTING.md"
    inside_kernels = importer == "kernels"
    for level, module, names in imports(path):
        if level == 0:
            root = module.partition(".")[0]
            assert root != "rnnkit", f"{path.name} imports {module} by its absolute name"
            if root in GPU_AND_COMPILERS:
                assert inside_kernels or importer in MAY_IMPORT_TORCH, f"{path.name} imports {module}"
            if root.startswith("cupy"):
                where = path.relative_to(PACKAGE).as_posix()
                assert where in MAY_IMPORT_CUPY, f"{path.name} imports {module}"
            if root == "array_api_compat":
                assert importer == "_array", f"{path.name} imports array_api_compat"
            if root == "matplotlib":
                assert importer == "plotting", f"{path.name} imports matplotlib"
            continue
        depth = len(path.relative_to(PACKAGE).parts)
        if level < depth:
            continue  # within the package kernels
        imported = [module.partition(".")[0]] if module else names
        for name in imported:
            assert RANK[name] < RANK[importer], f"{importer} must not import {name}"


def modules_after(code):
    code += "; import sys; print(' '.join(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(result.stdout.split())


def loaded_after(code):
    return {name.partition(".")[0] for name in modules_after(code)}


def test_import_loads_no_array_library_but_numpy():
    loaded = loaded_after("import rnnkit; [getattr(rnnkit, name) for name in rnnkit.__all__]")
    assert "numpy" in loaded
    heavy = {
        "torch",
        "cupy",
        "numba",
        "scipy",
        "matplotlib",
        "array_api_compat",
        "safetensors",
        "tqdm",
        "jax",
    }
    assert not loaded & heavy


def test_a_numpy_layer_loads_no_compatibility_layer():
    loaded = loaded_after(
        "import numpy, rnnkit; rnnkit.LSTM(3, 4)(numpy.zeros((2, 1, 3), 'f4'), lengths=[1])"
    )
    assert not loaded & {"torch", "cupy", "matplotlib", "array_api_compat"}


def test_public_names():
    assert rnnkit.__all__ == sorted(rnnkit.__all__, key=lambda name: (name != name.upper(), name))
    assert set(rnnkit.__all__) == {
        "GRU", "LSTM", "RNN", "SGD", "Adam", "BackendUnavailableError", "Dropout", "Embedding", "Evaluation",
        "Gradients", "History", "LanguageModel", "Linear", "ParameterDict", "Vocabulary", "__version__",
        "clip_grad_norm", "cosine_schedule", "counting_language", "evaluate", "fit", "load",
        "mean_squared_error", "next_token_pair", "read_text", "save", "softmax_cross_entropy", "split",
        "to_numpy", "train_step",
    }  # fmt: skip
    for name in rnnkit.__all__:
        value = getattr(rnnkit, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


def test_modules_load_when_their_names_are_used():
    assert "rnnkit.recurrent" not in modules_after("import rnnkit")
    loaded = modules_after("import rnnkit; rnnkit.LSTM(3, 4)")
    assert "rnnkit.recurrent" in loaded
    assert "rnnkit.training" not in loaded
    assert set(rnnkit.__all__) <= set(dir(rnnkit))
    with pytest.raises(AttributeError, match="module 'rnnkit' has no attribute 'lstm'"):
        rnnkit.lstm  # noqa: B018


def test_docstring_examples():
    import doctest

    for name in ("recurrent", "model"):
        result = doctest.testmod(importlib.import_module(f"rnnkit.{name}"))
        assert result.attempted
        assert not result.failed
