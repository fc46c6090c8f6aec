"""Training: one step, whole runs that survive being killed, and their history."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._array import accumulation_dtype, namespace_of, to_numpy
from ._random import derive_seed
from ._typing import Array
from .checkpoint import describe, host_params, read, replace, save, write
from .data import Batch, Sequences, Stream
from .losses import softmax_cross_entropy
from .model import LanguageModel
from .optim import Adam, Optimizer
from .plotting import Curve, plot_losses
from .stack import State
from .validation import check_number, check_size, resolve_seed

# A run is written down at the end of each epoch, and within one when this many seconds have passed.
SECONDS_BETWEEN_CHECKPOINTS = 60.0
_CHECKPOINT = "checkpoint.safetensors"


@dataclass
class History:
    """What a run recorded, one number an epoch in each list.

    Attributes
    ----------
    train_loss, validation_loss : list of float
        Mean nats a token; the training loss is the mean over the epoch, while the model changed.
    learning_rate : list of float
    seconds : list of float
        Of training, without validation.
    tokens_per_second : list of float
    best_epoch : int
        The epoch, from 1, of the least validation loss (training loss without validation); 0 before any.
    """

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def epochs(self) -> int:
        """How many epochs were completed."""
        return len(self.train_loss)

    @property
    def watched(self) -> list[float]:
        """The losses that decide about the best epoch and early stopping."""
        return self.validation_loss or self.train_loss

    def plot(self, path: str | Path | None = None, *, floor: float | None = None, title: str = "") -> Any:
        """Draw the loss curves with matplotlib; return the figure, and write it to `path` if given."""
        name = "validation" if self.validation_loss else "training"
        curves = {name: Curve(self.train_loss, self.validation_loss)}
        return plot_losses(curves, path, floor=floor, title=title)


class Evaluation(NamedTuple):
    """How well a model predicts.

    Attributes
    ----------
    loss : float
        Mean nats a token.
    accuracy : float
        Share of the tokens that were the likeliest prediction.
    num_tokens : int
        How many tokens that is.
    """

    loss: float
    accuracy: float
    num_tokens: int


def train_step(
    model: LanguageModel, optimizer: Optimizer, batch: Batch, state: State = None, *,
    clip_norm: float | None = None, seed: int | None = None,
) -> tuple[Array, State]:  # fmt: skip
    """Run forward, backward and one step of the optimiser.

    Parameters
    ----------
    model : LanguageModel
        Changed in place.
    optimizer : Optimizer
    batch : Batch
    state : optional
        The initial state, from the step before where the batch goes on from it.
    clip_norm : float, optional
        Largest norm of the gradient.
    seed : int, optional
        Of the dropout masks.

    Returns
    -------
    loss : array ()
        Before the step, mean nats a token. On the device: reading it waits for the step.
    state
        The final state.
    """
    (logits, state), pullback = model.vjp(batch.inputs, state, lengths=batch.lengths, seed=seed)
    loss, d_logits = _loss(model, logits, batch)
    grads = pullback(d_logits).params
    if clip_norm is None:
        optimizer.step(model.params, grads)  # which may be a user's own, that does not clip
    else:
        optimizer.step(model.params, grads, clip_norm=clip_norm)
    return loss, state


def evaluate(model: LanguageModel, data: Any, *, batch_size: int = 64, window: int = 128) -> Evaluation:
    """Return loss and accuracy of a model on data, without changing it.

    Parameters
    ----------
    model : LanguageModel
    data : list of integer arrays, or one integer array
        Separate sequences, or one long text, as in `fit`.
    batch_size, window : int
        As in `fit`; they do not change the result on separate sequences.

    Returns
    -------
    Evaluation
    """
    batch_size, window = check_size("batch_size", batch_size), check_size("window", window)
    with model._backend.active():
        return _evaluate(model, device_data(data, model, batch_size, window, "data"), batch_size)


def fit(
    model: LanguageModel, train: Any, validation: Any = None, *, epochs: int, batch_size: int,
    optimizer: Optimizer | None = None, clip_norm: float | None = None, window: int = 64,
    schedule: Callable[[int], float] | None = None, patience: int | None = None, keep_best: bool = False,
    seed: int = 0, checkpoint: str | Path | None = None, progress: bool = True, name: str = "train",
) -> History:  # fmt: skip
    """Train a language model to predict each next token.

    Parameters
    ----------
    model : LanguageModel
        Changed in place.
    train, validation : list of integer arrays, or one integer array (N,)
        Separate sequences, shuffled and padded into batches; or one long text, read in `batch_size`
        parallel columns, `window` steps at a time, the state carried on.
    epochs, batch_size : int
    optimizer : Optimizer, optional
        By default ``Adam(1e-3)``.
    clip_norm : float, optional
        Largest norm of the gradient.
    window : int
        Time steps of a batch of a long text.
    schedule : callable, optional
        From the epoch, 0 at first, to a factor of the optimiser's learning rate; such as
        `cosine_schedule`.
    patience : int, optional
        Stop when so many epochs in a row brought no better validation loss.
    keep_best : bool
        End with the parameters of the best epoch instead of the last one's.
    seed : int
        Fixes order and dropout.
    checkpoint : path, optional
        A folder. The run is written there after each epoch and at least once a minute or so; the same
        call after a crash goes on where the run stopped, whatever parameters `model` has by then, and ends
        with the same numbers as if it had never stopped. A finished run leaves ``last.safetensors``,
        ``best.safetensors`` and ``history.json``.
    progress : bool
        Whether to show a bar with the loss and tokens a second.
    name : str
        The bar's label.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        An argument is out of range; the data have a wrong form; the folder holds an unfinished run of
        other settings.
    FloatingPointError
        A loss or a parameter became NaN or infinite. The model keeps the parameters of that moment; the
        folder keeps the last good state.
    """
    epochs, batch_size = check_size("epochs", epochs), check_size("batch_size", batch_size)
    window, seed = check_size("window", window), resolve_seed(seed)
    patience = None if patience is None else check_size("patience", patience)
    if clip_norm is not None:
        clip_norm = check_number("clip_norm", clip_norm)
        if not clip_norm > 0.0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    optimizer = optimizer if optimizer is not None else Adam(1e-3)
    train_data = device_data(train, model, batch_size, window, "train")
    val_data = None
    if validation is not None:
        val_data = device_data(validation, model, batch_size, window, "validation")
    settings = {
        "epochs": epochs, "batch_size": batch_size, "optimizer": repr(optimizer), "clip_norm": clip_norm,
        "window": window, "patience": patience, "seed": seed,
        "schedule": None if schedule is None else [float(schedule(epoch)) for epoch in range(epochs)],
        "train": train_data.fingerprint, "validation": None if val_data is None else val_data.fingerprint,
    }  # fmt: skip
    run = _Run(model, optimizer, settings, None if checkpoint is None else Path(checkpoint))
    steps = epochs * train_data.num_batches(batch_size)
    try:
        with model._backend.active(), _bar(progress, steps, name) as bar:
            bar.update(run.epoch * train_data.num_batches(batch_size) + run.batch)
            for epoch in range(run.epoch, epochs):
                if patience is not None and run.history.epochs - run.history.best_epoch >= patience:
                    break
                optimizer.lr = run.base_lr * (1.0 if schedule is None else float(schedule(epoch)))
                _train_epoch(run, train_data, batch_size, clip_norm, seed, bar)
                loss = None if val_data is None else _evaluate(model, val_data, batch_size).loss
                run.end_epoch(loss)
    finally:
        optimizer.lr = run.base_lr  # also after an interruption: the caller may go on with it
    with model._backend.active():
        return run.finish(keep_best)


def cosine_schedule(epochs: int, *, warmup: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """Return a schedule for `fit`: linear warm-up, then half a cosine from 1 down to `final`.

    Parameters
    ----------
    epochs, warmup : int
        All epochs, and how many of them warm up.
    final : float
        The factor that the last epoch comes close to.

    References
    ----------
    I. Loshchilov, F. Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR (2017).
    """
    check_size("epochs", epochs)

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / warmup
        done = min(1.0, (epoch - warmup) / max(1, epochs - warmup))
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


# ------------------------------------------------------------------------------------------- a run


class _Run:
    """The state of a run: all that must outlive a crash, and how it is written down and read back."""

    def __init__(
        self, model: LanguageModel, optimizer: Optimizer, settings: dict[str, Any], folder: Path | None
    ):
        self.model, self.optimizer, self.folder = model, optimizer, folder
        self.settings = json.loads(json.dumps(settings))
        self.history = History()
        self.base_lr = optimizer.lr
        self.batch = 0  # batches of the current epoch that are done
        self.state: State = None
        self.loss_sum: Array | None = None  # nats of the current epoch, on the device
        self.tokens = 0
        self.seconds = 0.0
        self.saved_at = time.monotonic()
        self.best: np.ndarray[Any, Any] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / _CHECKPOINT).exists():
                self._resume(folder / _CHECKPOINT)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.history.epochs

    def add(self, loss: Array, batch: Batch, state: State) -> None:
        """Count a batch that is done."""
        nats = loss * batch.num_tokens
        self.loss_sum = nats if self.loss_sum is None else self.loss_sum + nats
        self.tokens += batch.num_tokens
        self.batch += 1
        self.state = state

    def mean_loss(self) -> float:
        """Return the mean loss of the epoch so far; this waits for the device."""
        return float(to_numpy(self.loss_sum)) / self.tokens if self.loss_sum is not None else math.nan

    def check_finite(self, validation_loss: float | None = None) -> None:
        """Raise FloatingPointError if training has gone astray, so that nothing of it is written down."""
        losses = {"loss": self.mean_loss(), "validation loss": validation_loss or 0.0}
        for name, value in losses.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} became {value} in epoch {self.epoch + 1}: "
                    "a smaller learning rate or clip_norm may help"
                )
        flat = self.model.params.flat
        xp = namespace_of(flat)
        if not bool(xp.all(xp.isfinite(flat))):
            raise FloatingPointError(
                f"a parameter became NaN or infinite in epoch {self.epoch + 1}: "
                "a smaller learning rate or clip_norm may help"
            )

    def end_epoch(self, validation_loss: float | None) -> None:
        """Record the epoch and write everything down."""
        history = self.history
        self.check_finite(validation_loss)
        history.train_loss.append(self.mean_loss())
        if validation_loss is not None:
            history.validation_loss.append(validation_loss)
        history.learning_rate.append(self.optimizer.lr)
        history.seconds.append(self.seconds)
        history.tokens_per_second.append(self.tokens / max(self.seconds, 1e-9))
        if history.best_epoch == 0 or history.watched[-1] < history.watched[history.best_epoch - 1]:
            history.best_epoch = history.epochs
            self.best = np.array(to_numpy(self.model.params.flat))
        self.batch, self.state, self.loss_sum, self.tokens, self.seconds = 0, None, None, 0, 0.0
        self.save()

    def save(self) -> None:
        """Write down all that is needed to go on from here."""
        self.saved_at = time.monotonic()
        if self.folder is None:
            return
        arrays = {f"model.{name}": value for name, value in host_params(self.model).items()}
        for name, value in self.optimizer.state.items():
            arrays[f"optimizer.{name}"] = np.ascontiguousarray(to_numpy(value))
        if self.best is not None:
            arrays["best"] = self.best
        for k, part in enumerate(_state_parts(self.state)):
            arrays[f"state.{k}"] = np.ascontiguousarray(to_numpy(part))
        if self.loss_sum is not None:
            arrays["loss_sum"] = np.array(to_numpy(self.loss_sum), np.float64).reshape(1)
        run = {
            "settings": self.settings, "history": asdict(self.history), "batch": self.batch,
            "tokens": self.tokens, "seconds": self.seconds, "steps": self.optimizer.steps,
            "base_lr": self.base_lr,
        }  # fmt: skip
        write(self.folder / _CHECKPOINT, arrays, {**describe(self.model), "run": json.dumps(run)})

    def _resume(self, path: Path) -> None:
        arrays, metadata = read(path)
        run = json.loads(metadata.get("run", "{}"))
        mine = {**describe(self.model), **self.settings}
        theirs = {**metadata, **run.get("settings", {})}
        different = [key for key in mine if key != "version" and mine[key] != theirs.get(key)]
        if different:
            raise ValueError(
                f"{path} is an unfinished run with other settings ({', '.join(different)}): "
                "finish it with the same call, delete it, or choose another folder"
            )
        model, optimizer = self.model, self.optimizer
        try:
            model.load_params(_with_prefix(arrays, "model."))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        vectors = _with_prefix(arrays, "optimizer.")
        # In half precision the optimiser's vectors, the sum of the losses and c are float32.
        to_device, wide = model._backend.asarray, accumulation_dtype(model.dtype)
        optimizer.state = {name: to_device(value, wide) for name, value in vectors.items()}
        optimizer.steps = run["steps"]
        self.base_lr = run["base_lr"]
        self.history = History(**run["history"])
        self.batch, self.tokens, self.seconds = run["batch"], run["tokens"], run["seconds"]
        self.best = arrays.get("best")
        dtypes = {"state.0": model.dtype, "state.1": wide}
        parts = [to_device(arrays[name], dtype) for name, dtype in dtypes.items() if name in arrays]
        self.state = None if not parts else parts[0] if len(parts) == 1 else tuple(parts)
        if "loss_sum" in arrays:
            self.loss_sum = to_device(arrays["loss_sum"], wide)[0, ...]

    def finish(self, keep_best: bool) -> History:
        """Leave the models and the history in the folder in place of the checkpoint."""
        if self.folder is not None:
            save(self.model, self.folder / "last.safetensors")
        if self.best is not None and (keep_best or self.folder is not None):
            last = np.array(to_numpy(self.model.params.flat))
            self.model.params.flat[...] = self.model.asarray(self.best)
            if self.folder is not None:
                save(self.model, self.folder / "best.safetensors")
            if not keep_best:
                self.model.params.flat[...] = self.model.asarray(last)
        if self.folder is not None:
            replace(self.folder / "history.json", json.dumps(asdict(self.history), indent=1).encode())
            (self.folder / _CHECKPOINT).unlink(missing_ok=True)
        return self.history


def _train_epoch(
    run: _Run, data: Any, batch_size: int, clip_norm: float | None, seed: int, bar: Any
) -> None:  # fmt: skip
    skip, label, shown = run.batch, f"epoch {run.epoch}", time.monotonic()
    for k, batch in enumerate(data.batches(batch_size, seed, label)):
        if k < skip:
            continue
        begin = time.perf_counter()
        state = run.state if batch.goes_on else None
        loss, state = train_step(
            run.model, run.optimizer, batch, state,
            clip_norm=clip_norm, seed=derive_seed(seed, f"{label} batch {k}"),
        )  # fmt: skip
        run.add(loss, batch, state)
        run.seconds += time.perf_counter() - begin
        bar.update(1)
        if time.monotonic() - shown > 0.25:  # reading the loss waits for a GPU: not at every step
            shown = time.monotonic()
            bar.set_postfix_str(f"epoch {run.epoch + 1}, loss {run.mean_loss():.4f}", refresh=False)
        if time.monotonic() - run.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            run.check_finite()
            run.save()
    begin = time.perf_counter()
    mean = run.mean_loss()
    run.seconds += time.perf_counter() - begin  # what a GPU had still to do
    rate = run.tokens / max(run.seconds, 1e-9)
    bar.set_postfix_str(f"epoch {run.epoch + 1}, loss {mean:.4f}, {rate:,.0f} tokens/s", refresh=False)


def _evaluate(model: LanguageModel, data: Any, batch_size: int) -> Evaluation:
    nats = correct = None
    tokens, state = 0, None
    for batch in data.batches(batch_size):
        logits, state = model(batch.inputs, state if batch.goes_on else None, lengths=batch.lengths)
        loss, _ = _loss(model, logits, batch, gradient=False)
        xp = namespace_of(logits)
        hits = xp.argmax(logits, axis=-1) == batch.targets
        if batch.lengths is not None:
            t = xp.arange(hits.shape[0], dtype=xp.int64, device=hits.device)
            hits = hits & (t[:, None] < model.asarray(batch.lengths)[None, :])
        hits = xp.sum(xp.astype(hits, xp.int64))
        nats = loss * batch.num_tokens if nats is None else nats + loss * batch.num_tokens
        correct = hits if correct is None else correct + hits
        tokens += batch.num_tokens
    return Evaluation(float(to_numpy(nats)) / tokens, float(to_numpy(correct)) / tokens, tokens)


def _loss(
    model: LanguageModel, logits: Array, batch: Batch, gradient: bool = True
) -> tuple[Array, Array | None]:
    lengths = None if batch.lengths is None else model.asarray(batch.lengths)
    return softmax_cross_entropy(logits, batch.targets, lengths=lengths, gradient=gradient)


def device_data(
    data: Any, model: LanguageModel, batch_size: int, window: int, name: str
) -> Sequences | Stream:
    """Move data to the model's device: an integer array is one long text, a list separate sequences.

    Raises
    ------
    ValueError
        They have a wrong form, are too few, or have a token that the model does not know. `name` says in
        the message whose fault it is.
    """
    if isinstance(data, (Sequences, Stream)):
        return data
    result: Sequences | Stream
    try:
        if isinstance(data, (list, tuple)) and (not data or not isinstance(data[0], (int, np.integer))):
            result = Sequences(data, model.asarray)
        else:
            host = to_numpy(data) if hasattr(data, "__dlpack__") else data
            result = Stream(host, batch_size, window, model.asarray)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    low, high = result.token_range
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: tokens must lie in [0, vocab_size={model.vocab_size}), got {wrong}")
    return result


def _with_prefix(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _state_parts(state: State) -> Iterable[Array]:
    if state is None:
        return ()
    parts: Sequence[Array] = state if isinstance(state, tuple) else (state,)
    return parts


def _bar(progress: bool, total: int, name: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=name, disable=not progress, unit="batch", dynamic_ncols=True, leave=True)
