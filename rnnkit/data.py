"""Tokens: vocabularies, the counting language, splits, and batches that lie on the device."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._array import namespace_of
from ._random import permutation, uniform
from ._typing import Array
from .validation import check_size, resolve_seed

EOS = "EOS"
UNK = "<unk>"


class Vocabulary:
    """The tokens of a corpus, numbered from the most frequent on.

    Parameters
    ----------
    sequences : iterable of iterables of str
        The corpus. A string counts as its characters.
    max_size : int, optional
        Keep this many tokens at most, the two special ones included.

    Attributes
    ----------
    tokens : tuple of str
        By falling frequency, ties in alphabetical order; then ``EOS`` if the corpus lacks it, then
        ``<unk>``, which stands for all other tokens.
    """

    def __init__(self, sequences: Iterable[Iterable[str]], *, max_size: int | None = None):
        counts = Counter(token for sequence in sequences for token in sequence)
        counts.pop(UNK, None)
        tokens = sorted(counts, key=lambda token: (-counts[token], token))
        if max_size is not None:
            tokens = tokens[: max(check_size("max_size", max_size, least=3) - 1, 0)]
            if EOS not in tokens:
                tokens = tokens[: max_size - 2]
        if EOS not in tokens:
            tokens.append(EOS)
        self._number([*tokens, UNK])

    @classmethod
    def from_tokens(cls, tokens: Iterable[str]) -> Vocabulary:
        """Return the vocabulary with exactly these tokens in this order, such as a saved model's.

        Raises
        ------
        ValueError
            A token stands twice, or ``EOS`` or ``<unk>`` is missing.
        """
        vocabulary = cls.__new__(cls)
        vocabulary._number(list(tokens))
        return vocabulary

    def _number(self, tokens: list[str]) -> None:
        self.tokens = tuple(tokens)
        self._index = {token: k for k, token in enumerate(self.tokens)}
        if len(self._index) != len(self.tokens) or EOS not in self._index or UNK not in self._index:
            raise ValueError(f"tokens must be distinct and contain {EOS!r} and {UNK!r}")
        self.eos = self._index[EOS]
        self.unk = self._index[UNK]

    def encode(self, sequence: Iterable[str]) -> np.ndarray[Any, Any]:
        """Return the numbers (T,) of tokens; unknown ones become that of ``<unk>``."""
        return np.fromiter((self._index.get(token, self.unk) for token in sequence), np.int64)

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Return the tokens of numbers.

        Raises
        ------
        ValueError
            A number is out of range.
        """
        numbers = [int(number) for number in numbers]
        for number in numbers:
            if not 0 <= number < len(self.tokens):
                raise ValueError(f"numbers must lie in [0, {len(self.tokens)}), got {number}")
        return [self.tokens[number] for number in numbers]

    def one_hot(self, sequence: Iterable[str], dtype: Any = "float32") -> np.ndarray[Any, Any]:
        """Return one-hot vectors (T, V). Layers need none: they take numbers as they are."""
        vectors: np.ndarray[Any, Any] = np.eye(len(self), dtype=dtype)[self.encode(sequence)]
        return vectors

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    def __hash__(self) -> int:
        return hash(self.tokens)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.tokens[:8])) + (", ..." if len(self) > 8 else "")
        return f"Vocabulary({len(self)} tokens: {shown})"


def counting_language(num_sequences: int, max_n: int, seed: int | None = None) -> list[list[str]]:
    """Return sequences a^n b^n EOS with n drawn uniformly from 1 to max_n.

    The simplest language that needs counting: a finite automaton cannot accept it. Who has read the a's
    knows all that follows the first b.

    Parameters
    ----------
    num_sequences, max_n : int
        At least 1.
    seed : int, optional
        Fixes the draw.

    Returns
    -------
    list of list of str

    References
    ----------
    F. A. Gers, J. Schmidhuber, "LSTM recurrent networks learn simple context-free and context-sensitive
    languages", IEEE Transactions on Neural Networks 12 (2001).
    """
    check_size("num_sequences", num_sequences)
    check_size("max_n", max_n)
    draws = uniform(np, num_sequences, resolve_seed(seed), "counting language")
    return [["a"] * n + ["b"] * n + [EOS] for n in (1 + np.floor(draws * max_n).astype(int)).tolist()]


def read_text(path: str | Path, level: str = "char") -> list[str]:
    """Return a UTF-8 text file as tokens.

    Parameters
    ----------
    path : path
    level : {"char", "word"}
        Characters, or words split at white space with a token ``EOS`` at the end of each line.

    Raises
    ------
    OSError, ValueError
        The file cannot be read, is empty or is not UTF-8; or no such level.
    """
    if level not in ("char", "word"):
        raise ValueError(f"level must be 'char' or 'word', got {level!r}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    tokens = (
        list(text) if level == "char" else [w for line in text.splitlines() for w in (*line.split(), EOS)]
    )
    if not tokens:
        raise ValueError(f"{path} is empty")
    return tokens


def split(items: Any, fractions: Sequence[float] = (0.8, 0.1, 0.1)) -> tuple[Any, ...]:
    """Cut a list or an array into consecutive parts.

    Parameters
    ----------
    items : list or array
        Sequences that are in random order already, or one long stream of tokens, where order matters.
    fractions : sequence of float
        The parts' shares; they sum to 1.

    Returns
    -------
    tuple
        As many parts as fractions; each item is in exactly one.

    Raises
    ------
    ValueError
        The fractions are negative or do not sum to 1.
    """
    if not len(fractions) or not min(fractions) >= 0.0 or not abs(sum(fractions) - 1.0) <= 1e-9:
        raise ValueError(f"fractions must be at least 0 and sum to 1, got {tuple(fractions)}")
    ends = [round(len(items) * sum(fractions[: k + 1])) for k in range(len(fractions))]
    return tuple(items[start:end] for start, end in zip([0, *ends], ends, strict=False))


def next_token_pair(sequence: Any) -> tuple[Any, Any]:
    """Return what a language model reads and what it shall predict: all but the last, all but the first."""
    return sequence[:-1], sequence[1:]


class Batch(NamedTuple):
    """Some sequences, or windows of a stream.

    Attributes
    ----------
    inputs, targets : array (T, B) of int64
        On the model's device.
    lengths : numpy.ndarray (B,) or None
        How many targets of each sequence count; None where all do. On the host.
    goes_on : bool
        Whether this batch continues the one before, whose final state is its initial state.
    num_tokens : int
        How many targets count.
    """

    inputs: Array
    targets: Array
    lengths: np.ndarray[Any, Any] | None
    goes_on: bool
    num_tokens: int


def _fingerprint(*arrays: np.ndarray[Any, Any]) -> str:
    """Return a short name for data, by which an unfinished run knows them again."""
    digest = hashlib.blake2s(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class Sequences:
    """Separate sequences of different lengths, moved to the device once; a batch is padded when it is made.

    Parameters
    ----------
    sequences : list of integer arrays
        Each of two tokens or more.
    asarray : callable
        Moves a host array to the device: a layer's `asarray`.

    Attributes
    ----------
    fingerprint : str
        The same for the same data.
    token_range : (int, int)
        The least and the greatest token.
    """

    def __init__(self, sequences: Sequence[Any], asarray: Callable[[Any], Array]):
        if len(sequences) == 0:
            raise ValueError("there must be at least one sequence, got none")
        arrays = [np.asarray(sequence) for sequence in sequences]
        for k, array in enumerate(arrays):
            if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) < 2:
                raise ValueError(
                    f"sequences must be 1-D integer arrays of at least two tokens, "
                    f"got shape {array.shape} and dtype {array.dtype} at position {k}"
                )
        self.lengths = np.array([len(array) - 1 for array in arrays])
        tokens = np.concatenate([array.astype(np.int64) for array in arrays])
        self._tokens, self._asarray = asarray(tokens), asarray
        self._starts = np.cumsum(self.lengths + 1) - (self.lengths + 1)
        self.fingerprint = _fingerprint(tokens, self.lengths)
        self.token_range = min(int(a.min()) for a in arrays), max(int(a.max()) for a in arrays)

    def batches(self, batch_size: int, seed: int | None = None, label: str = "") -> Iterator[Batch]:
        """Yield all sequences once, in random order if there is a seed."""
        N = len(self.lengths)
        order = np.arange(N) if seed is None else permutation(N, seed, f"batches {label}")
        for start in range(0, N, batch_size):
            chosen = order[start : start + batch_size]
            lengths = self.lengths[chosen]
            T, xp = int(lengths.max()), namespace_of(self._tokens)
            # Behind its end a sequence's last token stands again: some index must, and nobody reads it.
            index = self._starts[chosen] + np.minimum(np.arange(T + 1)[:, None], lengths)
            columns = xp.take(self._tokens, self._asarray(index.reshape(-1)), axis=0)
            columns = xp.reshape(columns, index.shape)
            inputs, targets = columns[:T, :], columns[1 : T + 1, :]
            ragged = None if lengths.min() == lengths.max() else lengths
            yield Batch(inputs, targets, ragged, False, int(lengths.sum()))

    def num_batches(self, batch_size: int) -> int:
        """Return how many batches there are."""
        return -(-len(self.lengths) // batch_size)


class Stream:
    """One long text, cut into `batch_size` columns that are read in parallel, a window at a time.

    Parameters
    ----------
    tokens : integer array (N,)
    batch_size, window : int
        Columns, and time steps of a batch. The final state of a window is the initial state of the next
        (truncated backpropagation through time, Williams and Peng 1990). Up to `batch_size` tokens at the
        end that fill no row are left out.
    asarray : callable
        Moves a host array to the device: a layer's `asarray`.
    """

    def __init__(self, tokens: Any, batch_size: int, window: int, asarray: Callable[[Any], Array]):
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"a stream must be a 1-D integer array, got shape {tokens.shape}, {tokens.dtype}"
            )
        rows = (len(tokens) - 1) // batch_size
        if rows < 1:
            raise ValueError(f"a stream needs more than batch_size={batch_size} tokens, got {len(tokens)}")
        # Each column has one token more than it predicts: the first of the next column.
        columns = [tokens[k * rows : (k + 1) * rows + 1] for k in range(batch_size)]
        self._tokens = asarray(np.stack(columns, axis=1).astype(np.int64))
        self._rows, self._window = rows, window
        self.fingerprint = _fingerprint(tokens.astype(np.int64))
        self.token_range = int(tokens.min()), int(tokens.max())

    def batches(self, batch_size: int, seed: int | None = None, label: str = "") -> Iterator[Batch]:
        """Yield the windows in order; a stream has only one, whatever the seed."""
        for start in range(0, self._rows, self._window):
            end = min(start + self._window, self._rows)
            inputs, targets = self._tokens[start:end, :], self._tokens[start + 1 : end + 1, :]
            yield Batch(inputs, targets, None, start > 0, int(inputs.shape[0] * inputs.shape[1]))

    def num_batches(self, batch_size: int) -> int:
        """Return how many windows there are."""
        return -(-self._rows // self._window)
