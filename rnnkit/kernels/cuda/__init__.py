"""Kernels for CuPy arrays: a matrix product and one fused kernel a time step, or a scan in one launch.

Nothing here has been measured on a GPU yet. What shapes the code of the steps (of whole scans, which are off
unless ``RNNKIT_PERSISTENT=1`` asks for them, persistent.cuh says it):

- A launch takes the host some microseconds, in which the device could do many a step. So there are few: 2 a
  step, 4 with a projection, and a few around the loop. Nothing is sliced or allocated in a loop; a kernel
  gets whole arrays and the number t of the step, and only t is looked at again at each launch.
- The product with W_hh is added to gates[t] by cuBLAS itself, and on the way back that with d_gates[t] to the
  gradient of h: no buffer in between. A GRU alone needs one, since its reset gate multiplies the product.
- h and c advance in place. With `lengths` a sequence that is over is left alone, whatever is computed for it.
- The activated gates take the place of the incoming ones, and their gradients that of the activated gates.
  A scan and its way back need (G+2)*T*B*H numbers in all: gates, output, and c (in a GRU W_n h + b_n).
- Half precision: h, weights and outputs are stored in it; products and all else are float32, so the way back
  multiplies float32 gradients with weights widened once a scan, as the reference does.
- Around the layers a training step launches 2 kernels for softmax cross-entropy, 3 with a mask or lengths; 2
  for clipping, since every block must know the norm before it scales; and 1 for Adam. Where blocks may wait
  for each other, as in whole scans, one kernel clips and takes the step of Adam, and reads the gradient once
  more instead of writing it.

Results are deterministic: no atomics, and cuBLAS repeats itself on the same device. Nothing waits for the
device, and memory comes from CuPy's current allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .._case import Case
from . import _loader, _persistent
from ._around import embedding_backward, matmul
from ._gru import gru_backward, gru_backwards, gru_forward, gru_forwards
from ._lstm import lstm_backward, lstm_backwards, lstm_forward, lstm_forwards
from ._plan import Plan, Scan
from ._plan import step_times as _step_times
from ._rnn import rnn_backward, rnn_backwards, rnn_forward, rnn_forwards
from ._source import FOLDER
from ._training import adam, clip, clipped_adam, softmax_cross_entropy

__all__ = [
    "adam", "both", "clip", "clipped_adam", "embedding_backward", "gru_backward", "gru_forward",
    "lstm_backward", "lstm_forward", "matmul", "rnn_backward", "rnn_forward", "softmax_cross_entropy",
    "step_times", "whole_sequence", "why_not",
]  # fmt: skip

# Of which `note` says the largest that fits.
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_WITHOUT_PRODUCTS = ("adam", "clip", "embedding_backward", "softmax_cross_entropy")
_BOTH: dict[str, Callable[..., Any]] = {
    "rnn_forward": rnn_forwards, "lstm_forward": lstm_forwards, "gru_forward": gru_forwards,
    "rnn_backward": rnn_backwards, "lstm_backward": lstm_backwards, "gru_backward": gru_backwards,
}  # fmt: skip


def why_not(name: str, case: Case) -> str | None:
    """Say why this module cannot serve `case`: it serves all that it has."""
    return None


def both(name: str, case: Case, T: int, B: int) -> Callable[..., Any] | None:
    """Return what runs a scan of B sequences in both directions side by side; None where nothing is gained.

    One after the other would leave most of a device idle twice: a step is spent waiting, not computing.
    """
    if case.proj_size:
        return None
    backward = name.endswith("_backward")
    layout = _persistent.chosen(case.cell, backward, case.dtype, T, B, case.hidden_size, 2)
    return None if layout is None else partial(_BOTH[name], layout)


def whole_sequence(name: str, case: Case, B: int, directions: int = 1) -> Plan | str:
    """Return how a scan of B sequences is laid out in one launch on the current device, or why it is not.

    That is what ``RNNKIT_PERSISTENT=1`` would do; this does not ask whether it is set. Two directions may
    still be a launch each.
    """
    if not (FOLDER / f"persistent_{name}.cu").exists():
        return f"there is no such kernel for {name}"
    if case.proj_size:
        return "not with a projection"
    backward = name.endswith("_backward")
    return _persistent.layout_of(case.cell, backward, case.dtype, B, case.hidden_size, directions)


def step_times(name: str, case: Case, B: int, directions: int = 1) -> dict[str, float]:
    """Return estimated seconds of the parts of a step, of all directions; none where it is not one launch."""
    layout, tf32 = whole_sequence(name, case, B, directions), _loader.precision("float32") == "TF32"
    if isinstance(layout, str):
        return {}
    backward = name.endswith("_backward")
    scan = Scan(case.cell, backward, case.dtype, tf32, B, case.hidden_size, layout.directions)
    times = _step_times(layout, scan, _loader.limits())
    return {part: seconds * directions / layout.directions for part, seconds in times.items()}


def note(name: str, case: Case) -> str | None:
    """Say how float32 products are rounded, and whether a scan is one launch.

    In half precision the products of the gradients are float32 as well.
    """
    parts = []
    if case.dtype != "float64" and name not in _WITHOUT_PRODUCTS:
        setting = _loader.precision("float32")
        meaning = "TF32" if setting == "TF32" else "full float32"
        parts.append(f"float32 products in {meaning}: CuPy's compute type {setting} (CUPY_TF32=1 means TF32)")
    if name.removesuffix("_forward").removesuffix("_backward") in ("rnn", "lstm", "gru"):
        parts.append(_launches(name, case))
    return "; ".join(parts) or None


def _launches(name: str, case: Case) -> str:
    """Say whether a scan is one launch, for how many sequences, and one for both directions; or why not."""
    if not _persistent.enabled():
        return "step by step (RNNKIT_PERSISTENT=1 takes one launch a sequence; never tried on a device)"
    alone = {B: whole_sequence(name, case, B) for B in _BATCHES}
    fitting = [B for B, layout in alone.items() if isinstance(layout, Plan)]
    pairs = {B: whole_sequence(name, case, B, 2) for B in _BATCHES}
    both = [B for B, layout in pairs.items() if isinstance(layout, Plan) and layout.directions == 2]
    said = [f"for {_many(fitting)}"] if fitting else []
    said += [f"for both directions of a layer at once for {_many(both)}"] if both else []
    refused = [layout for layout in alone.values() if isinstance(layout, str)]
    rest = [f"{'else ' if said else ''}step by step: {refused[0]}"] if refused else []
    launch = [f"one launch a sequence (RNNKIT_PERSISTENT=1) {', '.join(said)}"] if said else []
    return "; ".join(launch + rest)


def _many(batches: list[int]) -> str:
    return f"up to {batches[-1]} sequences" if batches[-1] < _BATCHES[-1] else "any number of sequences"
