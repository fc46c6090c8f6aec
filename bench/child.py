"""What `bench.startup` runs in a fresh process: ``child.py MEASURE SIDE DIRECTORY``.

A script for itself, which imports nothing of this package: that would be timed, and weighed, as well.
DIRECTORY holds the case; the parent's clock stops at the line "done", and the memory comes after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def memory() -> tuple[int, int]:
    """Return the bytes that are resident now, and the most that ever were."""
    try:
        # Not the rusage: on Linux that counts the parent's memory from before exec.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["VmRSS"].split()[0]) * 1024, int(sizes["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most


def _case(directory: Path) -> tuple[Any, dict[str, Any]]:
    import numpy as np

    with np.load(directory / "params.npz") as params:
        return np.load(directory / "x.npy"), dict(params)


def imported(side: str, directory: Path) -> None:
    """Import NumPy, and rnnkit on top of it."""
    import numpy  # noqa: F401

    if side == "rnnkit":
        import rnnkit  # noqa: F401
    print("done", flush=True)
    print(json.dumps({"resident": memory()[0]}))


def predict(side: str, directory: Path) -> None:
    """Load the parameters and run one sequence."""
    if side == "rnnkit":
        import rnnkit

        x, params = _case(directory)
        lstm = rnnkit.LSTM(x.shape[2], params["weight_hh_l0"].shape[1], backend="numpy", seed=0)
        lstm.load_params(params)
        output = lstm(x)[0]
    elif side == "torch":
        import torch

        x, params = _case(directory)
        torch_lstm = torch.nn.LSTM(x.shape[2], params["weight_hh_l0"].shape[1])
        torch_lstm.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
        with torch.inference_mode():
            output = torch_lstm(torch.from_numpy(x))[0].numpy()
    else:
        import numpy as np
        import onnxruntime

        x = np.load(directory / "x.npy")
        session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
        zeros = np.zeros((1, x.shape[1], int((directory / "hidden_size").read_text())), np.float32)
        output = session.run(None, {"x": x, "h_0": zeros, "c_0": zeros})[0][:, 0]
    print("done", flush=True)
    resident = memory()[0]
    import numpy as np

    np.save(directory / "output.npy", output)
    print(json.dumps({"resident": resident}))


def train(side: str, directory: Path) -> None:
    """Print the peak memory of a training step above what was there before its inputs."""
    import numpy as np

    x, params = _case(directory)
    (T, B, I), H = x.shape, params["weight_hh_l0"].shape[1]
    del x
    step = _rnnkit_step(params, I, H) if side == "rnnkit" else _torch_step(params, I, H)
    random = np.random.default_rng(0)

    def inputs(T: int, B: int) -> tuple[Any, Any]:
        return tuple(random.standard_normal((T, B, size), dtype=np.float32) for size in (I, H))  # type: ignore[return-value]

    step(*inputs(2, 2))  # loads and compiles what there is to load and compile
    before, most_before = memory()
    step(*inputs(T, B))
    most = memory()[1]
    # Without a higher peak than that of loading, the step's own cannot be seen.
    print("done", flush=True)
    print(json.dumps({"resident": most - before if most > most_before else None}))


def _rnnkit_step(params: dict[str, Any], I: int, H: int) -> Any:
    import rnnkit

    lstm = rnnkit.LSTM(I, H, backend="numpy", seed=0)
    lstm.load_params(params)

    def step(x: Any, d_output: Any) -> Any:
        (output, state), pullback = lstm.vjp(x)
        return output, state, pullback(d_output)

    return step


def _torch_step(params: dict[str, Any], I: int, H: int) -> Any:
    import torch

    lstm = torch.nn.LSTM(I, H)
    lstm.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})

    def step(x: Any, d_output: Any) -> Any:
        x = torch.from_numpy(x).requires_grad_()
        output, state = lstm(x)
        grads = torch.autograd.grad(output, (x, *lstm.parameters()), torch.from_numpy(d_output))
        return output, state, grads

    return step


if __name__ == "__main__":
    measure, side, directory = sys.argv[1:]
    {"import": imported, "predict": predict, "train": train}[measure](side, Path(directory))
