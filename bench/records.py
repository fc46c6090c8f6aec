"""What a benchmark writes down, and the file it is kept in.

A file is a JSON object::

    {"schema": 1, "kind": "grid" | "growth" | "startup", "command": str, "date": "2025-01-31",
     "effort": {"seconds": float, "rounds": int}, "records": [record, ...]}

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
"""

from __future__ import annotations

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
FIELDS = {"grid": _CASE, "growth": _CASE, "startup": _STARTUP}
STATUSES = ("ok", "wrong", "unsupported", "peer wrong")


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
    """Write a file, checked."""
    document = {
        "schema": SCHEMA, "kind": kind, "command": command, "date": date, "effort": effort._asdict(),
        "records": list(records),
    }  # fmt: skip
    check(document)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


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
    names = ("rnnkit", "numpy", "scipy", "numba", "torch", "onnxruntime")
    found = {"python": platform.python_version()}
    for name in names:
        if importlib.util.find_spec(name):
            found[name] = _version(name)
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library["user_api"] == "blas" and "numpy" in library["filepath"]:
            parts = (library["internal_api"], library["version"], library.get("architecture"))
            found["blas"] = " ".join(part for part in parts if part)
    return found


def _version(name: str) -> str:
    if name == "rnnkit":  # from the source that runs, which need not be the one installed
        import rnnkit

        return rnnkit.__version__
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
