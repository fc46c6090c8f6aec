"""Record torch's results for tests that run without torch: python tests/golden/record.py

Needs torch==2.13.0. Run it again only when a case is added; the files are small and committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_recurrent import as_state, make, random_params, random_state, run_torch, torch_layer

CASES = [
    ("lstm", {"input_size": 3, "hidden_size": 5}, None),
    ("lstm", {"input_size": 3, "hidden_size": 5, "num_layers": 2, "bidirectional": True}, [4, 6, 1]),
    ("lstm", {"input_size": 3, "hidden_size": 5, "proj_size": 2, "bidirectional": True}, [4, 6, 1]),
    ("lstm", {"input_size": 3, "hidden_size": 5, "bias": False, "batch_first": True}, [2, 6, 3]),
    ("gru", {"input_size": 3, "hidden_size": 5}, None),
    ("gru", {"input_size": 3, "hidden_size": 5, "num_layers": 2, "bidirectional": True}, [4, 6, 1]),
    ("rnn", {"input_size": 3, "hidden_size": 5, "num_layers": 2, "bidirectional": True}, [4, 6, 1]),
    ("rnn", {"input_size": 3, "hidden_size": 5, "nonlinearity": "relu"}, None),
]


def main() -> None:
    """Write one file a case."""
    T, B = 6, 3
    for number, (cell, options, lengths) in enumerate(CASES):
        rng = np.random.default_rng(number)
        layer = make(cell, dtype="float64", **options)
        layer.load_params(random_params(layer, rng))
        shape = (B, T) if layer.batch_first else (T, B)
        x, state = rng.standard_normal((*shape, 3)), random_state(layer, B, rng)
        output, _ = layer(x, as_state(layer, state))
        d_output = rng.standard_normal(output.shape)
        d_state = [rng.standard_normal(part.shape) for part in state]
        peer = torch_layer(torch, layer, cell)
        values, grads = run_torch(torch, peer, x, state, lengths, d_output, d_state)
        kinds = ["h", "c"][: len(state)]
        arrays = {"x": x, "d_output": d_output, "output": values[0], "d_x": grads[0]}
        for k, kind in enumerate(kinds):
            arrays |= {f"{kind}_0": state[k], f"d_{kind}_n": d_state[k], f"{kind}_n": values[1 + k]}
            arrays[f"d_{kind}_0"] = grads[1 + k]
        names = [name for name, _ in peer.named_parameters()]
        for name, grad in zip(names, grads[1 + len(kinds) :], strict=True):
            arrays |= {f"p.{name}": layer.params[name], f"d_p.{name}": grad}
        if lengths is not None:
            arrays["lengths"] = np.array(lengths)
        path = Path(__file__).parent / f"{cell}_{number}.npz"
        np.savez_compressed(path, cell=cell, options=repr(options), **arrays)


if __name__ == "__main__":
    main()
