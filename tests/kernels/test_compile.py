"""Every variant of every kernel compiles for each architecture, within its limits, without a GPU or a driver.

resources.csv holds the limits: the registers of a thread, rounded up to the next multiple of 8, by which they
are allotted. After a change on purpose write it anew, and look at what changed::

    PYTHONPATH=tests python tests/kernels/test_compile.py
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from pathlib import Path

import pytest
from host_device import PACKAGE, kernel_source

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = ("float32", "float64", "float16", "bfloat16")
VECTORS = (1, 4)
FILES = sorted(path.stem for path in PACKAGE.glob("*.cu"))
TABLE = Path(__file__).with_name("resources.csv")
REPORT = re.compile(
    r"'(?P<kernel>\w+)' for .*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


@pytest.fixture(scope="session")
def limits():
    """Return the limits: registers by kernel, dtype, vector and architecture."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["kernel"], row["dtype"], int(row["vector"]), arch): int(row[arch])
        for row in rows
        for arch in ARCHITECTURES
    }


def compiler():
    """Return `cuda.core`, or skip where it is not installed; in CI, which must have it, fail."""
    if os.environ.get("RNNKIT_REQUIRE_ORACLE") == "1":
        import cuda.core
    else:
        pytest.importorskip("cuda.core", reason="cuda.core is not installed: pip install 'rnnkit[dev]'")
        pytest.importorskip("cuda.bindings.nvrtc")
        import cuda.core
    return cuda.core


def resources(file: str, dtype: str, vector: int, architecture: str) -> dict[str, dict[str, int]]:
    """Compile a file with CuPy's own options and return what the assembler says of each kernel."""
    core, source, log = compiler(), kernel_source(), io.StringIO()
    standard, *macros = source.options(dtype, vector)
    options = core.ProgramOptions(
        arch=architecture, std=standard.removeprefix("-std="), ftz=True, ptxas_options="-v",
        define_macro=[tuple(macro.removeprefix("-D").split("=")) for macro in macros],
    )  # fmt: skip
    core.Program(source.source(PACKAGE / f"{file}.cu"), "c++", options).compile("cubin", logs=log)
    report = log.getvalue()
    assert "warning" not in report, report
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        match = REPORT.match(part)
        assert match, part
        kernel, *_ = match.groups()
        found[kernel] = {key: int(value or 0) for key, value in match.groupdict().items() if key != "kernel"}
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", FILES)
def test_within_the_limits(limits, file, dtype, architecture):
    for vector in VECTORS:
        found = resources(file, dtype, vector, architecture)
        declared = re.findall(r"__global__ void (\w+)\(", (PACKAGE / f"{file}.cu").read_text())
        assert sorted(found) == sorted(declared)
        for kernel, used in found.items():
            variant = kernel, dtype, vector, architecture
            assert used["stack"] == used["stores"] == used["loads"] == 0, f"{variant}: {used}"
            # All shared memory is dynamic (common.cuh), so that its size is a matter of the launch.
            assert used["shared"] == 0, f"{variant}: {used}"
            assert variant in limits, f"{variant} has no limit: write the table anew"
            assert used["registers"] <= limits[variant], f"{variant}: {used}, limit {limits[variant]}"


def test_the_table_has_no_kernel_that_is_gone(limits):
    declared = set()
    for file in FILES:
        declared |= set(re.findall(r"__global__ void (\w+)\(", (PACKAGE / f"{file}.cu").read_text()))
    assert {kernel for kernel, *_ in limits} == declared


def write_table() -> None:
    rows = []
    for file, dtype, vector in itertools.product(FILES, DTYPES, VECTORS):
        found = [resources(file, dtype, vector, arch) for arch in ARCHITECTURES]
        for kernel in sorted(found[0]):
            rows.append([kernel, dtype, vector, *(-(-one[kernel]["registers"] // 8) * 8 for one in found)])
    with TABLE.open("w", newline="") as table:  # only now: a failure leaves the old table
        writer = csv.writer(table, lineterminator="\n")
        writer.writerows([["kernel", "dtype", "vector", *ARCHITECTURES], *rows])


if __name__ == "__main__":
    write_table()
