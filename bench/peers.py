"""The peers' side of each case: torch.nn in eager mode, and ONNX Runtime for inference.

Each peer does what its documentation tells a user to do for speed, and gets the same arrays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from rnnkit import to_numpy

from .cases import VOCABULARY, Case, Host, Problem
from .ours import CHECKED_LM_STEPS, LM_LEARNING_RATE
from .timing import Side

PEERS = ("torch", "onnxruntime")
_NEEDS = {"torch": ("torch",), "onnxruntime": ("onnx", "onnxruntime")}
_LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


class Where(NamedTuple):
    """Where torch computes, in its own words, and in which dtype."""

    device: str = "cpu"
    dtype: str = "float32"


HOST = Where()


def missing(peer: str) -> list[str]:
    """Return the packages that a peer needs and that are not installed."""
    return [name for name in _NEEDS[peer] if importlib.util.find_spec(name) is None]


def takes_part(peer: str, case: Case) -> bool:
    """Whether a peer can do a case at all: ONNX Runtime does inference only."""
    return peer == "torch" or case.operation in ("forward", "ragged", "step")


def load(peers: tuple[str, ...]) -> None:
    """Import the peers, so that `timing.threads` reaches them."""
    for peer in peers:
        for name in _NEEDS[peer]:
            importlib.import_module(name)


def side_of(peer: str, problem: Problem, threads: int, where: Where = HOST) -> Side:
    """Return a peer's side of a case.

    Parameters
    ----------
    peer : str
        One of `PEERS`, installed.
    problem : Problem
        A case for which `takes_part` holds.
    threads : int
        For ONNX Runtime's session; torch follows `timing.threads`.
    where : Where
        For torch; ONNX Runtime is a peer on the host alone.
    """
    if peer == "onnxruntime":
        return _onnxruntime(problem, threads)
    call, results, scope = _TORCH[problem.case.operation](problem, where)
    return Side("torch", call, results, scope)


# -------------------------------------------------------------------------------------------- torch

Made = tuple[Callable[[], Any], Callable[[Any], dict[str, Host]], Callable[[], AbstractContextManager[Any]]]


def _tensor(values: Host, where: Where, **options: Any) -> Any:
    """Return host values as a tensor; tokens stay integers."""
    import torch

    dtype = getattr(torch, where.dtype) if values.dtype.kind == "f" else None
    return torch.tensor(values, device=where.device, dtype=dtype, **options)


def _torch_layer(problem: Problem, where: Where) -> Any:
    import torch

    case = problem.case
    layer = getattr(torch.nn, _LAYERS[case.cell])(
        case.I, case.H, problem.layers, bidirectional=problem.directions == 2
    )
    layer = layer.to(device=where.device, dtype=getattr(torch, where.dtype))
    layer.load_state_dict({name: _tensor(value, where) for name, value in problem.params.items()})
    return layer


def _torch_state(problem: Problem, where: Where) -> Any:
    parts = tuple(_tensor(part, where) for part in problem.state)
    return parts if len(parts) == 2 else parts[0]


def _torch_scan(problem: Problem, layer: Any, x: Any, where: Where) -> Callable[[], Any]:
    """Return what runs the layer over the whole batch, packed where it is ragged."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    state, T = _torch_state(problem, where), problem.case.T
    if problem.lengths is None:
        return lambda: layer(x, state)
    lengths = torch.tensor(problem.lengths)  # on the host, where packing wants them

    def ragged() -> Any:
        packed, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
        return pad_packed_sequence(packed, total_length=T)[0], final

    return ragged


def _named(output: Any, state: Any) -> dict[str, Host]:
    parts = state if isinstance(state, tuple) else (state,)
    results = {name: to_numpy(part) for name, part in zip(("h_n", "c_n")[: len(parts)], parts, strict=True)}
    return {"output": to_numpy(output), **results}


def _torch_forward(problem: Problem, where: Where) -> Made:
    import torch

    call = _torch_scan(problem, _torch_layer(problem, where).eval(), _tensor(problem.x, where), where)
    return call, lambda result: _named(*result), torch.inference_mode


def _torch_step(problem: Problem, where: Where) -> Made:
    call, _, scope = _torch_forward(problem, where)
    return call, lambda result: _named(result[0][0], result[1]), scope


def _torch_train(problem: Problem, where: Where) -> Made:
    import torch

    layer, x = _torch_layer(problem, where), _tensor(problem.x, where, requires_grad=True)
    scan = _torch_scan(problem, layer, x, where)
    assert problem.d_output is not None
    d_output = _tensor(problem.d_output, where)
    names, params = zip(*layer.named_parameters(), strict=True)

    def call() -> Any:
        output, final = scan()
        return output, final, torch.autograd.grad(output, (x, *params), d_output)

    def results(result: Any) -> dict[str, Host]:
        output, final, grads = result
        gradients = {f"d_{name}": to_numpy(d) for name, d in zip(("x", *names), grads, strict=True)}
        return {**_named(output, final), **gradients}

    return call, results, nullcontext


def _torch_lm(problem: Problem, where: Where) -> Made:
    import torch

    case = problem.case
    parts = torch.nn.ModuleDict({
        "embedding": torch.nn.Embedding(VOCABULARY, case.I),
        "rnn": getattr(torch.nn, _LAYERS[case.cell])(case.I, case.H),
        "linear": torch.nn.Linear(case.H, VOCABULARY),
    }).to(device=where.device, dtype=getattr(torch, where.dtype))  # fmt: skip
    parts.load_state_dict({name: _tensor(value, where) for name, value in problem.params.items()})
    optimizer = torch.optim.Adam(parts.parameters(), LM_LEARNING_RATE)
    assert problem.targets is not None
    tokens, targets = _tensor(problem.x, where), _tensor(problem.targets, where)
    state = _torch_state(problem, where)

    def call() -> Any:
        optimizer.zero_grad()
        logits = parts["linear"](parts["rnn"](parts["embedding"](tokens), state)[0])
        loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))
        loss.backward()
        optimizer.step()
        return loss

    def results(loss: Any) -> dict[str, Host]:
        named = {f"d_{name}": to_numpy(p.grad.clone()) for name, p in parts.named_parameters()}
        losses = [loss] + [call() for _ in range(CHECKED_LM_STEPS - 1)]
        return {"losses": np.array([value.item() for value in losses]), **named}

    return call, results, nullcontext


_TORCH: dict[str, Callable[[Problem, Where], Made]] = {
    "forward": _torch_forward, "step": _torch_step, "ragged": _torch_forward, "train": _torch_train,
    "lm": _torch_lm,
}  # fmt: skip


# ------------------------------------------------------------------------------------- ONNX Runtime


# The place of each of ONNX's gates among rnnkit's: i, o, f, c of i, f, g, o; z, r, h of r, z, n.
_ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def onnx_model(problem: Problem) -> bytes:
    """Return an ONNX model of a case's layer: x and the initial state in, output and final state out."""
    from onnx import TensorProto, helper, numpy_helper

    case, order = problem.case, _ONNX_GATES[problem.case.cell]

    def reordered(name: str) -> Host:
        gates = np.split(problem.params[name], len(order))
        return np.concatenate([gates[k] for k in order])[None]

    bias = np.concatenate([reordered("bias_ih_l0"), reordered("bias_hh_l0")], axis=1)
    weights = {"W": reordered("weight_ih_l0"), "R": reordered("weight_hh_l0"), "bias": bias}
    states = ("h", "c")[: len(problem.state)]
    ragged = [] if problem.lengths is None else ["lengths"]
    # The reset gate after the matrix product: the formula of torch, cuDNN and rnnkit.
    special: dict[str, Any] = {"linear_before_reset": 1} if case.cell == "gru" else {}
    node = helper.make_node(
        _LAYERS[case.cell].upper(),
        inputs=["x", *weights, "lengths" if ragged else "", *(f"{name}_0" for name in states)],
        outputs=["output", *(f"{name}_n" for name in states)],
        hidden_size=case.H,
        **special,
    )

    def value(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [node], case.cell,
        inputs=[value("x", "T", "B", case.I), *(value(f"{name}_0", 1, "B", case.H) for name in states),
                *(value(name, "B", kind=TensorProto.INT32) for name in ragged)],
        outputs=[value("output", "T", 1, "B", case.H),
                 *(value(f"{name}_n", 1, "B", case.H) for name in states)],
        initializer=[numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    # The oldest versions that have these operators as they are today: any runtime since 2021 loads them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=7)
    return bytes(model.SerializeToString())


def _onnxruntime(problem: Problem, threads: int) -> Side:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
    feeds = {"x": problem.x, **{f"{name}_0": part for name, part in zip("hc", problem.state, strict=False)}}
    if problem.lengths is not None:
        feeds["lengths"] = problem.lengths.astype(np.int32)
    step = problem.case.operation == "step"

    def results(values: list[Host]) -> dict[str, Host]:
        output = values[0][:, 0]
        named = dict(zip(("h_n", "c_n"), values[1:], strict=False))
        return {"output": output[0] if step else output, **named}

    return Side("onnxruntime", lambda: session.run(None, feeds), results)
