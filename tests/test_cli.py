"""The command line, through a subprocess, and the README's promises about it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import rnnkit
from rnnkit import cli
from rnnkit._array import resolve_backend

ROOT = Path(__file__).parents[1]
HAS_MATPLOTLIB = __import__("importlib.util").util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(
    not HAS_MATPLOTLIB, reason="matplotlib is not installed: pip install 'rnnkit[plot]'"
)


def run(*args, cwd=None, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "rnnkit", *map(str, args)],
        capture_output=True, text=True, timeout=300, cwd=cwd, env=env,
    )  # fmt: skip


QUICK = ("--hidden-size", 6, "--num-sequences", 30, "--max-n", 4, "--epochs", 5, "--no-progress")


@needs_matplotlib
def test_compare_writes_what_it_promises(tmp_path):
    result = run("compare", *QUICK, "--no-torch", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("RNN", "LSTM", "GRU", "floor", "largest", "input", "target", "prediction"):
        assert text in result.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["models"]) == {"RNN", "LSTM", "GRU"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for cell in ("rnn", "lstm", "gru"):
        model = rnnkit.load(tmp_path / cell / "best.safetensors")
        assert model.tokens == ("a", "b", "EOS", "<unk>")
    assert not (tmp_path / "unfinished.json").exists()


@needs_matplotlib
@pytest.mark.oracle
@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-6), ("float32", 1e-2)])
def test_our_lstm_and_torchs_give_the_same_curve(torch, tmp_path, dtype, limit):
    result = run(
        "compare",
        *QUICK[:-3],
        "--epochs",
        40,
        "--no-progress",
        "--cells",
        "lstm",
        "--dtype",
        dtype,
        "--out",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["largest_validation_difference_to_torch"] <= limit
    assert set(metrics["models"]) == {"LSTM", "torch LSTM"}


@needs_matplotlib
def test_a_killed_comparison_goes_on(tmp_path):
    args = [*QUICK, "--no-torch"]
    whole = run("compare", *args, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "rnnkit", "compare", *map(str, args), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "rnn" / "history.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = (tmp_path / "cut" / "rnn" / "history.json").read_bytes()
    if (tmp_path / "cut" / "unfinished.json").exists():  # unless it was faster than the signal
        other = run("compare", *args, "--max-n", 5, "--out", tmp_path / "cut")
        assert other.returncode == 2
        assert "unfinished comparison with other settings" in other.stderr
    rest = run("compare", *args, "--out", tmp_path / "cut")
    assert rest.returncode == 0, rest.stderr
    if (tmp_path / "cut" / "rnn" / "history.json").read_bytes() != finished:
        pytest.fail("a finished model was trained again")
    losses = []
    for folder in ("whole", "cut"):
        models = json.loads((tmp_path / folder / "metrics.json").read_text())["models"]
        losses.append({name: model["loss"] for name, model in models.items()})
    assert losses[0] == losses[1]


def test_train_and_generate_on_the_counting_language(tmp_path):
    result = run(
        "train", "--cell", "lstm", "--hidden-size", 10, "--epochs", 60, "--lr", 0.02, "--batch-size", 8,
        "--max-n", 3, "--no-progress", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "test" in result.stdout
    generated = run("generate", tmp_path / "run" / "best.safetensors", "--prompt", "aab")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout == "aabbEOS\n"


def test_train_and_generate_on_a_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 60)
    for level, prompt in (("char", "the "), ("word", "the cat")):
        out = tmp_path / level
        result = run(
            "train", "--data", text, "--level", level, "--embedding-dim", 8, "--hidden-size", 24,
            "--epochs", 30,
            "--lr", 0.02, "--batch-size", 4, "--window", 16, "--cell", "gru", "--no-progress", "--out", out,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        generated = run(
            "generate",
            out / "best.safetensors",
            "--prompt",
            prompt,
            "--length",
            10,
            "--temperature",
            0.5,
            "--seed",
            1,
        )
        assert generated.returncode == 0, generated.stderr
        assert generated.stdout.startswith(prompt)


def test_info_shows_versions_backends_and_kernels():
    result = run("info")
    assert result.returncode == 0, result.stderr
    for text in (f"rnnkit {rnnkit.__version__}", "numpy", "cupy", "backends:", "lstm_forward"):
        assert text in result.stdout


def test_info_shows_what_cupy_has(monkeypatch, capsys):
    def resolve(name):
        if name != "cupy":
            raise rnnkit.BackendUnavailableError("not here")
        return SimpleNamespace(device="<CUDA Device 0>")

    resolved = resolve_backend("numpy")
    monkeypatch.setattr(cli, "resolve_backend", lambda name: resolve(name) if name else resolved)
    monkeypatch.setattr(cli, "describe_cupy", lambda: ["device 0: a GPU", "CUDA 13.0"])
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "  cupy: available, device <CUDA Device 0>\n    device 0: a GPU\n    CUDA 13.0\n" in shown
    assert shown.count("a GPU") == 1


@pytest.mark.parametrize("command", ["", "compare", "train", "generate", "info"])
def test_help_has_examples(command):
    result = run(*command.split(), "--help")
    assert result.returncode == 0
    if command:
        assert f"examples:\n  rnnkit {command}" in result.stdout
    else:
        assert "compare" in result.stdout


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ((), 2, "required"),
        (("dance",), 2, "invalid choice: 'dance'"),
        (("compare", "--hidden-size", "0"), 2, "--hidden-size: must be at least 1, got 0"),
        (("compare", "--hidden-size", "x"), 2, "must be a whole number, got 'x'"),
        (("compare", "--lr", "0"), 2, "--lr: must be above 0, got 0"),
        (("compare", "--lr", "nan"), 2, "--lr: must be above 0, got nan"),
        (("compare", "--cells", "rnn,foo"), 2, "must be some of rnn,lstm,gru, got 'rnn,foo'"),
        (("compare", "--num-sequences", "3"), 2, "num_sequences=3 leaves a split empty"),
        (("compare", "--backend", "abacus"), 2, "got 'abacus'"),
        (("compare", "--dtype", "float8"), 2, "invalid choice: 'float8'"),
        (("train", "--dropout", "1.5"), 2, "must be at least 0 and at most 1, got 1.5"),
        (("train", "--data", "missing.txt"), 2, "missing.txt"),
        (("generate", "missing.safetensors", "--prompt", "a"), 2, "missing.safetensors is not there"),
        (("generate", "text", "--prompt", "a"), 2, "text is no whole safetensors file"),
        (("info", "--backend", "cupy"), 1, "cupy"),
    ],
)
def test_errors_are_one_line(args, status, message, tmp_path):
    (tmp_path / "text").write_text("no model")
    if "cupy" in args:
        try:
            rnnkit.LSTM(1, 1, backend="cupy")
        except rnnkit.BackendUnavailableError:
            pass
        else:
            pytest.skip("here is a GPU, so this is no error")
    result = run(*args, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("rnnkit")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr


def test_interrupt_is_quiet(tmp_path):
    # A shell starts what goes to its background with SIGINT ignored, and that is inherited.
    code = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("rnnkit", run_name="__main__")
"""
    args = ("train", "--epochs", "100000", "--no-progress", "--out", str(tmp_path))
    command = [sys.executable, "-c", code, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "stopped; the same command goes on where it stopped" in stderr
    assert "Traceback" not in stderr


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_commands_and_examples():
    commands = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)\n```", readme(), re.S)
    assert [name for name, _ in commands] == ["main", "test"]
    assert "rnnkit compare" in commands[0][1]
    assert "pytest" in commands[1][1]
    ci = (ROOT / ".ci" / "run").read_text()
    assert "command: " in ci


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", (ROOT / "README.md").read_text()))))
def test_readme_python_runs(number, tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", readme(), re.S)[number]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md, example {number + 1}", "exec"), {})


def test_readme_names_every_subcommand():
    text = run("--help").stdout
    for command in re.findall(r"^    (\w+) ", text, re.M):
        assert f"rnnkit {command}" in readme(), f"README.md does not mention rnnkit {command}"


def test_warmup_compiles_or_says_what_to_install(capsys, monkeypatch):
    numba = pytest.importorskip("rnnkit.kernels.numba")
    calls = []
    monkeypatch.setattr(numba, "warmup", lambda: calls.append("compiled"))
    monkeypatch.setattr(numba, "_missing", None)
    assert cli.main(["warmup"]) == 0
    assert calls == ["compiled"]
    assert "on disk" in capsys.readouterr().out
    monkeypatch.setattr(numba, "_missing", 'needs numba: pip install "rnnkit[cpu]"')
    assert cli.main(["warmup"]) == 1
    assert 'pip install "rnnkit[cpu]"' in capsys.readouterr().err
