"""Kernels for CuPy arrays: a matrix product and one fused kernel a time step.

Nothing here has been measured on a GPU yet. What shapes the code:

- A launch takes the host some microseconds, in which the device could do many a step. So there are few: 2 a
  step, 4 with a projection, and a few around the loop. Nothing is sliced or allocated in a loop; a kernel
  gets whole arrays and the number t of the step.
- The product with W_hh is added to gates[t] by cuBLAS itself, and on the way back that with d_gates[t] to the
  gradient of h: no buffer in between. A GRU alone needs one, since its reset gate multiplies the product.
- h and c advance in place. With `lengths` a sequence that is over is left alone, whatever is computed for it.
- The activated gates take the place of the incoming ones, and their gradients that of the activated gates.
  A scan and its way back need (G+2)*T*B*H numbers in all: gates, output, and c (in a GRU W_n h + b_n).
- Half precision: h, weights and outputs are stored in it; products and all else are float32, so the way back
  multiplies float32 gradients with weights widened once a scan, as the reference does.
- Around the layers a training step launches 2 kernels for softmax cross-entropy, 3 with a mask or lengths; 2
  for clipping, since every block must know the norm before it scales; and 1 for Adam.

Results are deterministic: no atomics, and cuBLAS repeats itself on the same device. Nothing waits for the
device, and memory comes from CuPy's current allocator.
"""

from __future__ import annotations

from .._case import Case
from . import _loader
from ._around import embedding_backward, matmul
from ._gru import gru_backward, gru_forward
from ._lstm import lstm_backward, lstm_forward
from ._rnn import rnn_backward, rnn_forward
from ._training import adam, clip, softmax_cross_entropy

__all__ = [
    "adam", "clip", "embedding_backward", "gru_backward", "gru_forward", "lstm_backward", "lstm_forward",
    "matmul", "rnn_backward", "rnn_forward", "softmax_cross_entropy", "why_not",
]  # fmt: skip

_WITHOUT_PRODUCTS = ("adam", "clip", "embedding_backward", "softmax_cross_entropy")


def why_not(name: str, case: Case) -> str | None:
    """Say why this module cannot serve `case`: it serves all that it has."""
    return None


def note(name: str, case: Case) -> str | None:
    """Say how float32 products are rounded: in half precision those of the gradients are float32 as well."""
    if case.dtype == "float64" or name in _WITHOUT_PRODUCTS:
        return None
    setting = _loader.precision("float32")
    meaning = "TF32" if setting == "TF32" else "full float32"
    return f"float32 products in {meaning}: CuPy's compute type {setting} (CUPY_TF32=1 means TF32)"
