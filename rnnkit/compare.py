"""The main job: RNN, LSTM, GRU and torch's LSTM side by side on the counting language."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._array import resolve_backend, to_numpy
from ._random import derive_seed
from ._version import __version__
from .checkpoint import load, replace
from .data import Sequences, Vocabulary, counting_language, split
from .model import CELLS, LanguageModel
from .optim import Adam
from .plotting import Curve, plot_losses
from .training import History, cosine_schedule, evaluate, fit

NUM_FRESH = 1000
LARGEST_N = 1000
_UNFINISHED = "unfinished.json"


def entropy_floor(sequences: Sequence[Sequence[Any]], max_n: int) -> float:
    """Return the least mean loss, in nats a token, that any model can reach on a^n b^n EOS.

    Whatever its n, a sequence carries ln(max_n) nats: the choice of n. The 2n tokens after its first share
    them, so the mean depends on the lengths at hand; for n uniform it is ln(max_n) / (max_n + 1).
    """
    return math.log(max_n) * len(sequences) / sum(len(sequence) - 1 for sequence in sequences)


def predict(model: LanguageModel, sequences: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Return for each sequence the likeliest token after each of its tokens but the last."""
    data = Sequences(sequences, model.asarray)
    predictions: list[np.ndarray[Any, Any]] = []
    for batch in data.batches(256):
        logits, _ = model(batch.inputs, lengths=batch.lengths)
        best = np.argmax(to_numpy(logits), axis=-1)
        lengths = [best.shape[0]] * best.shape[1] if batch.lengths is None else batch.lengths
        predictions += [best[:length, k] for k, length in enumerate(lengths)]
    return predictions


def predictable_accuracy(model: LanguageModel, vocabulary: Vocabulary, sequences: Sequence[Any]) -> float:
    """Return the share of right predictions where the past decides: from the first b on."""
    b = int(vocabulary.encode("b")[0])
    right = total = 0
    for sequence, prediction in zip(sequences, predict(model, sequences), strict=True):
        decided = sequence[:-1] == b
        right += int(np.sum((prediction == sequence[1:])[decided]))
        total += int(np.sum(decided))
    return right / total


def largest_n(model: LanguageModel, vocabulary: Vocabulary, limit: int = LARGEST_N) -> int:
    """Return the largest n, up to `limit`, such that a^k b^k is predicted without a mistake for all k <= n.

    Without a mistake: each b but the last is followed by a predicted b, the last one by EOS, and no a is;
    the criterion of Gers and Schmidhuber (2001).
    """
    done, chunk = 0, 8
    while done < limit:
        numbers = range(done + 1, min(done + chunk, limit) + 1)
        sequences = [vocabulary.encode([*"a" * n, *"b" * n, "EOS"]) for n in numbers]
        for n, sequence, prediction in zip(numbers, sequences, predict(model, sequences), strict=True):
            if np.any(prediction[n:] != sequence[n + 1 :]) or np.any(prediction[:n] == vocabulary.eos):
                return n - 1
        done, chunk = numbers[-1], min(2 * chunk, 64)
    return done


def compare(
    *, out: str | Path = "runs/compare", cells: Sequence[str] = ("rnn", "lstm", "gru"), hidden_size: int,
    num_sequences: int, max_n: int, epochs: int, batch_size: int, learning_rate: float, eps: float,
    clip_norm: float, forget_bias: float | None, seed: int, backend: Any = None, dtype: str = "float32",
    torch_peer: bool | None = None, restart: bool = False, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Train the models, write pictures, metrics and models into `out`, and return the metrics.

    The same call after a crash goes on where it stopped; `torch_peer` None means where torch is installed.
    """
    if torch_peer is None:
        torch_peer = "lstm" in cells and importlib.util.find_spec("torch") is not None
    settings = {
        "cells": list(cells), "hidden_size": hidden_size, "num_sequences": num_sequences, "max_n": max_n,
        "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "eps": eps,
        "clip_norm": clip_norm, "forget_bias": forget_bias, "seed": seed, "dtype": dtype, "torch": torch_peer,
    }  # fmt: skip
    if torch_peer and "lstm" not in cells:
        raise ValueError(
            f"torch's LSTM needs ours beside it: cells must contain 'lstm', got {','.join(cells)}"
        )
    # All that can be refused is refused before anything on disk is touched.
    resolve_backend(backend).dtype(dtype)
    folder = Path(out)
    _check_folder(folder, settings, restart)
    sequences = counting_language(num_sequences, max_n, seed)
    vocabulary = Vocabulary(sequences)
    encoded = [vocabulary.encode(sequence) for sequence in sequences]
    parts = dict(zip(("train", "validation", "test"), split(encoded), strict=True))
    if not all(parts.values()):
        raise ValueError(f"num_sequences={num_sequences} leaves a split empty: at least 10 are needed")
    fresh = counting_language(NUM_FRESH, max_n, derive_seed(seed, "fresh"))
    parts["fresh"] = [vocabulary.encode(sequence) for sequence in fresh]
    floors = {name: entropy_floor(part, max_n) for name, part in parts.items()}

    _open(folder, settings, restart)
    models: dict[str, LanguageModel] = {}
    histories: dict[str, History] = {}
    training: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "clip_norm": clip_norm, "seed": seed,
        "schedule": cosine_schedule(epochs, final=0.01), "progress": progress,
    }  # fmt: skip
    for cell in cells:
        special: dict[str, Any] = {"forget_bias": forget_bias} if cell == "lstm" else {}
        model = LanguageModel(
            len(vocabulary), hidden_size, cell, tokens=vocabulary.tokens, backend=backend, dtype=dtype,
            seed=seed, **special,
        )  # fmt: skip
        name = cell.upper()
        if cell == "lstm" and torch_peer:
            initial = model.to()
        done = folder / cell / "history.json"
        if done.exists():
            histories[name] = History(**json.loads(done.read_text()))
            models[name] = load(folder / cell / "last.safetensors", backend=backend)
            continue
        histories[name] = fit(
            model, parts["train"], parts["validation"], optimizer=Adam(learning_rate, eps=eps),
            checkpoint=folder / cell, name=f"{name:10s}", **training,
        )  # fmt: skip
        models[name] = model
    difference = None
    if torch_peer:
        from ._torch_peer import fit_torch

        name = "torch LSTM"
        histories[name], models[name] = fit_torch(
            initial, parts["train"], parts["validation"], learning_rate=learning_rate, eps=eps, name=name,
            **training,
        )  # fmt: skip
        ours, theirs = histories["LSTM"].validation_loss, histories[name].validation_loss
        difference = float(np.max(np.abs(np.subtract(ours, theirs))))

    metrics = {
        "settings": {**settings, "backend": models[next(iter(models))].backend},
        "version": __version__,
        "entropy_floor": math.log(max_n) / (max_n + 1),
        "entropy_floors": floors,
        "models": {
            name: _measure(model, histories[name], vocabulary, parts, floors)
            for name, model in models.items()
        },
        "largest_validation_difference_to_torch": difference,
    }
    curves = {name: Curve(history.train_loss, history.validation_loss) for name, history in histories.items()}
    title = rf"$a^n b^n$, n = 1..{max_n}: {len(parts['train'])} training sequences, hidden size {hidden_size}"
    plot_losses(curves, folder / "loss.png", floor=floors["validation"], title=title)
    replace(folder / "metrics.json", json.dumps(metrics, indent=1).encode())
    (folder / _UNFINISHED).unlink(missing_ok=True)
    example = parts["test"][0]
    shown = "LSTM" if "LSTM" in models else next(iter(models))
    metrics["example"] = {
        "model": shown,
        "input": vocabulary.decode(example[:-1]),
        "target": vocabulary.decode(example[1:]),
        "prediction": vocabulary.decode(predict(models[shown], [example])[0]),
    }
    return metrics


def table(metrics: dict[str, Any]) -> str:
    """Return the metrics as a table for a terminal."""
    head = (
        "",
        "train",
        "validation",
        "test",
        "fresh",
        "x floor",
        "accuracy",
        "epochs to",
        "largest",
        "seconds",
    )
    unit = ("", "loss", "loss", "loss", "loss", "(fresh)", "(test)", "1.1 floor", "n", "an epoch")
    rows: list[tuple[str, ...]] = [head, unit]
    for name, model in metrics["models"].items():
        loss = model["loss"]
        rows.append(
            (
                name,
                *(f"{loss[part]:.4f}" for part in ("train", "validation", "test", "fresh")),
                f"{loss['fresh'] / metrics['entropy_floors']['fresh']:.3f}",
                f"{100 * model['predictable_accuracy']['test']:.1f} %",
                str(model["epochs_to_floor"] or "never"),
                f"{model['largest_n']}" + ("+" if model["largest_n"] == LARGEST_N else ""),
                f"{model['seconds_per_epoch']:.3f}",
            )
        )
    floors = metrics["entropy_floors"]
    parts = ("train", "validation", "test", "fresh")
    rows.append(("floor", *(f"{floors[part]:.4f}" for part in parts), "1.000", "", "", "", ""))
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _measure(
    model: LanguageModel, history: History, vocabulary: Vocabulary, parts: dict[str, Any],
    floors: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    reached = [k for k, loss in enumerate(history.validation_loss, 1) if loss <= 1.1 * floors["validation"]]
    return {
        "loss": {name: evaluate(model, part).loss for name, part in parts.items()},
        "predictable_accuracy": {
            name: predictable_accuracy(model, vocabulary, parts[name]) for name in ("test", "fresh")
        },
        "epochs_to_floor": reached[0] if reached else None,
        "largest_n": largest_n(model, vocabulary),
        "num_params": model.num_params,
        "seconds_per_epoch": sum(history.seconds) / history.epochs,
        "history": {"train_loss": history.train_loss, "validation_loss": history.validation_loss},
    }


def _unfinished(folder: Path) -> Any:
    """Return the settings of the unfinished comparison in the folder, or None if there is none."""
    try:
        return json.loads((folder / _UNFINISHED).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return "unreadable"


def _check_folder(folder: Path, settings: dict[str, Any], restart: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, and {folder} is a file")
    if not restart and _unfinished(folder) not in (None, settings):
        raise ValueError(
            f"{folder} holds an unfinished comparison with other settings: "
            "repeat it with the same settings, discard it with --restart, or choose another --out"
        )


def _open(folder: Path, settings: dict[str, Any], restart: bool) -> None:
    """Make the folder ready: go on with the unfinished comparison that is there, else begin anew."""
    if not restart and _unfinished(folder) is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Only what a comparison writes goes; whatever else lies in the folder stays.
    files = ("checkpoint.safetensors", "last.safetensors", "best.safetensors", "history.json")
    for cell in CELLS:
        for name in files:
            (folder / cell / name).unlink(missing_ok=True)
    for name in ("metrics.json", "loss.png"):
        (folder / name).unlink(missing_ok=True)
    replace(folder / _UNFINISHED, json.dumps(settings).encode())
