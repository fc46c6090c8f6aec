"""The text of a kernel file and the compiler options that make a variant of it; needs no GPU library."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent

Macros = tuple[tuple[str, int], ...]

# The types of common.cuh for a dtype: what is stored, what is computed in.
_TYPES = {
    "float32": ("float", "float"),
    "float64": ("double", "double"),
    "float16": ("float16", "float"),
    "bfloat16": ("bfloat16", "float"),
}
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def source(path: Path) -> str:
    """Return the text of a file with what it includes from here, since NVRTC is given no search path.

    CuPy's cache on disk knows a kernel by its text: what is included must be part of it.
    """
    return _INCLUDE.sub(lambda line: (FOLDER / line[1]).read_text(), path.read_text())


def options(dtype: str, vector: int = 1, macros: Macros = ()) -> tuple[str, ...]:
    """Return the compiler options of a variant; common.cuh, or the file itself, says what they mean."""
    store, real = _TYPES[dtype]
    more = (f"-D{name}={value}" for name, value in macros)
    return "-std=c++17", f"-DSTORE={store}", f"-DREAL={real}", f"-DVECTOR={vector}", *more
