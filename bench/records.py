"""What a benchmark writes down, and the file it is kept in.

A file is a JSON object::

    {"schema": 1, "kind": "grid" | "growth" | "startup" | "gpu" | "gpu limits", "command": str,
     "date": "2025-01-31", "effort": {"seconds": float, "rounds": int}, "records": [record, ...]}

`kind` is the program, `command` how to run it again, `effort` how long each case was timed (see
`timing.Effort`). All times are in seconds, all rates in FLOP/s, all sizes in bytes.

A record of "grid" and "growth" is one case, with one kernel against one peer:

    backend, kernel     rnnkit's side: "numpy"; "numba", "numpy", "reference", ...
    default             whether rnnkit takes this kernel by itself
    operation, cell     "forward", "train", "step", "ragged", "lm"; "lstm", "gru", "rnn"
    T, B, I, H, dtype   time steps, batch, input and hidden size; "float32"
    density             share of the T*B steps that count; below 1 in a ragged batch
    threads             what both sides were allowed
    status              "ok"; "wrong": the results are off, so nothing was timed; "unsupported": the
                        kernel does not serve the case; "peer wrong": only the peer was not timed
    reason              why, when the status is not "ok"; else ""
    max_error           against the reference in float64: of outputs the largest absolute error, of
                        gradients the relative norm of the error; the larger of the two. Null where it is
                        not a finite number, or nothing ran
    seconds, spread     median; distance of the quartiles over the median
    p99                 99th percentile, where there were 1000 calls to tell it from
    padded_seconds      of "ragged": the same kernel on the same batch without lengths
    peer                "torch", "onnxruntime", or null where none takes part
    peer_seconds, peer_spread
    ratio               peer_seconds / seconds: above 1 rnnkit is faster
    ceiling             rate of a large square matrix product in the same turns
    fraction_of_ceiling rate of the case's matrix products over that
    busy_cores          how many cores other processes kept busy just before; null where unknown
    versions            of Python and all that took part, by name
    processor           its name and the number of cores

What was not measured is null. A record of "startup" has `measure` ("first prediction", "import" or
"training memory"), `side`, `seconds` and `spread` or null, `resident` and `needed` (bytes or null),
`max_error`, `status`, `reason`, `versions`, `processor`; see `bench.startup`.

A record of "gpu" is one cell, with one kernel against one form of the peer. It has the fields of a case
from `backend` to `spread`, but for threads, p99 and padded_seconds, and:

    stage               which question the cell answers; see `bench.gpu.plan`
    level               of the kernel: 0 for the reference, one more for each faster module
    tf32                whether float32 products could use TF32, on both sides
    ragged              whether the batch had lengths
    layers, directions  of the layer
    status              "failed" too: it raised an error, such as for want of memory
    least               the shortest call
    peer, graphed       "torch", and whether replayed as a CUDA graph; null where no peer takes part
    peer_seconds, peer_least, peer_spread, peer_error, ratio
                        the peer is timed also where the kernel is not
    model               of whole sequences in one launch: for each scan by its kernel's name, the estimated
                        seconds of the parts of a step of a layer, with its directions; else empty
    device, driver, cuda, versions, processor

A record of "gpu limits" is what the machine does at best: `measure`, `detail`, `seconds`, `least`, `spread`
(of one barrier, one launch, one copy, one product), `rate` and its `unit` where there is such a thing, and
`status`, `reason` and the machine as above.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .timing import Effort, cores

SCHEMA = 1
Record = dict[str, Any]

_TEXT, _SIZE, _NUMBER, _OPTIONAL = (str,), (int,), (float, int), (float, int, type(None))
_COMMON: dict[str, tuple[type, ...]] = {
    "status": _TEXT, "reason": _TEXT, "max_error": _OPTIONAL, "seconds": _OPTIONAL, "spread": _OPTIONAL,
    "versions": (dict,), "processor": _TEXT,
}  # fmt: skip
_CASE: dict[str, tuple[type, ...]] = {
    "backend": _TEXT, "kernel": _TEXT, "default": (bool,), "operation": _TEXT, "cell": _TEXT, "T": _SIZE,
    "B": _SIZE, "I": _SIZE, "H": _SIZE, "dtype": _TEXT, "density": _NUMBER, "threads": _SIZE,
    "p99": _OPTIONAL, "padded_seconds": _OPTIONAL, "peer": (str, type(None)), "peer_seconds": _OPTIONAL,
    "peer_spread": _OPTIONAL, "ratio": _OPTIONAL, "ceiling": _OPTIONAL, "fraction_of_ceiling": _OPTIONAL,
    "busy_cores": _OPTIONAL,
    **_COMMON,
}  # fmt: skip
_STARTUP: dict[str, tuple[type, ...]] = {
    "measure": _TEXT, "side": _TEXT, "resident": _OPTIONAL, "needed": _OPTIONAL, **_COMMON,
}  # fmt: skip
_DEVICE: dict[str, tuple[type, ...]] = {
    "device": _TEXT, "driver": _TEXT, "cuda": _TEXT, "versions": (dict,), "processor": _TEXT,
}  # fmt: skip
_GPU: dict[str, tuple[type, ...]] = {
    "stage": _TEXT, "backend": _TEXT, "kernel": _TEXT, "level": _SIZE, "default": (bool,),
    "operation": _TEXT, "cell": _TEXT, "T": _SIZE, "B": _SIZE, "I": _SIZE, "H": _SIZE, "dtype": _TEXT,
    "tf32": (bool,), "ragged": (bool,), "layers": _SIZE, "directions": _SIZE, "density": _NUMBER,
    "status": _TEXT, "reason": _TEXT,
    "max_error": _OPTIONAL, "seconds": _OPTIONAL, "least": _OPTIONAL, "spread": _OPTIONAL,
    "peer": (str, type(None)), "graphed": (bool,), "peer_seconds": _OPTIONAL, "peer_least": _OPTIONAL,
    "peer_spread": _OPTIONAL, "peer_error": _OPTIONAL, "ratio": _OPTIONAL, "model": (dict,), **_DEVICE,
}  # fmt: skip
_LIMIT: dict[str, tuple[type, ...]] = {
    "measure": _TEXT, "detail": _TEXT, "seconds": _OPTIONAL, "least": _OPTIONAL, "spread": _OPTIONAL,
    "rate": _OPTIONAL, "unit": _TEXT, "status": _TEXT, "reason": _TEXT, **_DEVICE,
}  # fmt: skip
FIELDS = {"grid": _CASE, "growth": _CASE, "startup": _STARTUP, "gpu": _GPU, "gpu limits": _LIMIT}
STATUSES = ("ok", "wrong", "unsupported", "peer wrong", "failed")


def check(document: Any) -> None:
    """Raise ValueError unless `document` is what the top of this module describes."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"not a benchmark file of schema {SCHEMA}")
    fields = FIELDS.get(document.get("kind", ""))
    if fields is None or not isinstance(document.get("records"), list):
        raise ValueError(f"kind must be one of {', '.join(FIELDS)} and records a list")
    for k, record in enumerate(document["records"]):
        if record.keys() != fields.keys():
            raise ValueError(f"record {k} has other fields: {sorted(record.keys() ^ fields.keys())}")
        for name, types in fields.items():
            if not isinstance(record[name], types):
                raise ValueError(f"record {k}: {name} is {record[name]!r}")
        if record["status"] not in STATUSES:
            raise ValueError(f"record {k}: status is {record['status']!r}")


def save(path: Path, kind: str, command: str, date: str, effort: Effort, records: Iterable[Record]) -> None:
    """Write a file, checked; whoever is killed meanwhile leaves the old one."""
    document = {
        "schema": SCHEMA, "kind": kind, "command": command, "date": date, "effort": effort._asdict(),
        "records": list(records),
    }  # fmt: skip
    check(document)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a file.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is not a benchmark file.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check(document)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return document


def finite(value: float) -> float | None:
    """Return the value, or None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of every package that may take part, and NumPy's BLAS."""
    found = versions_of(("rnnkit", "numpy", "scipy", "numba", "torch", "onnxruntime"))
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library["user_api"] == "blas" and "numpy" in library["filepath"]:
            parts = (library["internal_api"], library["version"], library.get("architecture"))
            found["blas"] = " ".join(part for part in parts if part)
    return found


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    return found | {name: _version(name) for name in names if importlib.util.find_spec(name)}


def _version(name: str) -> str:
    if name in ("rnnkit", "cupy"):  # of the source that runs; CuPy's wheels have the CUDA in their name
        return str(importlib.import_module(name).__version__)
    return importlib.metadata.version(name)


def processor() -> str:
    """Return the processor's name and how many cores there are for this process."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {cores()} cores"
