"""torch's own LSTM, trained by torch's autograd and optimiser exactly as `fit` trains ours.

Only `rnnkit.compare` uses it, to show that both learn alike. It is the one place that imports torch as a
framework and not as an array library.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ._array import to_numpy
from .data import Batch, Sequences
from .model import LanguageModel
from .training import History


class _Peer(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, model: LanguageModel):
        super().__init__()
        self.vocab_size = model.vocab_size
        self.rnn = torch.nn.LSTM(model.vocab_size, model.rnn.hidden_size, model.rnn.num_layers)
        self.linear = torch.nn.Linear(model.rnn.hidden_size, model.vocab_size)
        self.to(getattr(torch, model.dtype))
        self.load_state_dict({name: torch.tensor(to_numpy(value)) for name, value in model.params.items()})

    def loss(self, batch: Batch) -> torch.Tensor:
        inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        one_hot = torch.nn.functional.one_hot(inputs, self.vocab_size).to(self.linear.weight.dtype)
        logits = self.linear(self.rnn(one_hot)[0])
        if batch.lengths is not None:
            past_end = torch.arange(len(targets))[:, None] >= torch.from_numpy(batch.lengths)[None, :]
            targets = targets.masked_fill(past_end, -100)  # what cross_entropy leaves out
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def fit_torch(
    initial: LanguageModel, train: Any, validation: Any, *, epochs: int, batch_size: int,
    learning_rate: float, eps: float, clip_norm: float, schedule: Callable[[int], float], seed: int,
    progress: bool, name: str,
) -> tuple[History, LanguageModel]:  # fmt: skip
    """Train torch's LSTM from the same initial weights on the same batches; return it as our model."""
    peer = _Peer(initial)
    optimizer = torch.optim.Adam(peer.parameters(), lr=learning_rate, eps=eps)
    host = np.asarray
    train_data, val_data = Sequences(train, host), Sequences(validation, host)
    history = History()
    with tqdm(total=epochs * train_data.num_batches(batch_size), desc=name, unit="batch",
              disable=not progress, dynamic_ncols=True) as bar:  # fmt: skip
        for epoch in range(epochs):
            begin, nats, tokens = time.perf_counter(), 0.0, 0
            optimizer.param_groups[0]["lr"] = learning_rate * schedule(epoch)
            for batch in train_data.batches(batch_size, seed, f"epoch {epoch}"):
                optimizer.zero_grad()
                loss = peer.loss(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(peer.parameters(), clip_norm)
                optimizer.step()
                nats += loss.item() * batch.num_tokens
                tokens += batch.num_tokens
                bar.update(1)
            history.seconds.append(time.perf_counter() - begin)
            history.train_loss.append(nats / tokens)
            with torch.no_grad():
                batches = list(val_data.batches(batch_size))
                total = sum(peer.loss(batch).item() * batch.num_tokens for batch in batches)
            history.validation_loss.append(total / sum(batch.num_tokens for batch in batches))
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {history.train_loss[-1]:.4f}", refresh=False)
    model = initial.to()
    model.load_params({key: value.detach() for key, value in peer.named_parameters()})
    return history, model
