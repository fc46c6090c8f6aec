"""Every variant of every kernel compiles for each architecture, within its limits, without a GPU or a driver.

resources.csv holds the limits: the registers of a thread, rounded up to the next multiple of 8, by which they
are allotted. Kernels of whole sequences (persistent_*.cu) have a variant for each plan; whole_sequences.csv
holds those of the plans in `WHOLE`. After a change on purpose write both anew, and look at what changed::

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
from host_device import PACKAGE, kernel_source, plans

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = ("float32", "float64", "float16", "bfloat16")
VECTORS = (1, 4)
FILES = sorted(path.stem for path in PACKAGE.glob("*.cu") if not path.stem.startswith("persistent_"))
TABLE = Path(__file__).with_name("resources.csv")

# What a plan is made for, an A100, an H200 and a B200: multiprocessors, and KB of shared memory of a block.
DEVICES = {"sm_80": (108, 163), "sm_90": (132, 227), "sm_100": (148, 227)}
# (cell, dtype, tf32, B, H, directions) there and back: every cell and every product, and for LSTMs in
# bfloat16 one block a group, several groups, as many registers as there are, weights in shared memory too,
# rows that begin at odd places; then weights that are streamed, and both directions at once.
WHOLE = [
    *[(cell, "bfloat16", False, 16, 256, 1) for cell in ("rnn", "gru", "lstm")],
    *[("lstm", dtype, tf32, 16, 256, 1) for dtype, tf32 in (("float16", False), ("float32", True))],
    ("lstm", "float32", False, 16, 256, 1),
    *[
        ("lstm", "bfloat16", False, B, H, 1)
        for B, H in ((1, 64), (64, 128), (64, 192), (64, 512), (64, 1024), (5, 250))
    ],
    *[("lstm", *case, 1) for case in (("bfloat16", False, 1, 3072), ("float32", True, 16, 1024))],
    *[("gru", *case, 1) for case in (("float16", False, 16, 2048), ("float32", False, 4, 1536))],
    *[("lstm", *case, 2) for case in (("bfloat16", False, 64, 512), ("float32", True, 16, 256))],
    *[("gru", *case, 2) for case in (("float16", False, 1, 3072), ("float32", False, 64, 128))],
    ("rnn", "bfloat16", False, 16, 1024, 2),
]
WHOLE_TABLE = Path(__file__).with_name("whole_sequences.csv")
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


def resources(
    file: str, dtype: str, vector: int, architecture: str, more: tuple[tuple[str, int], ...] = ()
) -> dict[str, dict[str, int]]:
    """Compile a file with CuPy's own options and return what the assembler says of each kernel."""
    core, source, log = compiler(), kernel_source(), io.StringIO()
    standard, *macros = source.options(dtype, vector, more)
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


def whole(case, backward, architecture):
    """Compile a kernel of whole sequences in its plan and return its resources; None without a plan."""
    cell, dtype, tf32, B, H, directions = case
    multiprocessors, shared = DEVICES[architecture]
    capability = divmod(int(architecture.removeprefix("sm_")), 10)
    scan = plans().Scan(cell, backward, dtype, tf32, B, H, directions)
    plan = plans().plan(scan, plans().Limits(multiprocessors, shared << 10, 1 << 16, capability))
    if isinstance(plan, str):
        return None
    name = f"{cell}_{'backward' if backward else 'forward'}"
    macros = (*plan.macros(), ("ALIGNED", int(scan.operands * scan.operand_bytes % 16 == 0)))
    found = resources(f"persistent_{name}", dtype, 1, architecture, macros)
    assert list(found) == [f"{name}_persistent"]
    return found[f"{name}_persistent"]


@pytest.fixture(scope="session")
def whole_limits():
    with WHOLE_TABLE.open(newline="") as file:
        return {tuple(row[name] for name in WHOLE_KEY): row for row in csv.DictReader(file)}


WHOLE_KEY = ("cell", "backward", "dtype", "tf32", "B", "H", "directions")


def key_of(case, backward):
    cell, *rest = case
    return tuple(str(value) for value in (cell, backward, *rest))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: "-".join(map(str, case)))
def test_whole_sequences_within_the_limits(whole_limits, case, backward, architecture):
    limit = whole_limits[key_of(case, backward)][architecture]
    used = whole(case, backward, architecture)
    if used is None:
        assert limit == "no plan"
        return
    assert used["stack"] == used["stores"] == used["loads"] == 0, used
    assert used["shared"] == 0, used
    assert used["registers"] <= int(limit), used


def test_every_kernel_of_whole_sequences_is_compiled():
    compiled = {f"persistent_{cell}_{way}" for cell, *_ in WHOLE for way in ("forward", "backward")}
    assert {path.stem for path in PACKAGE.glob("persistent_*.cu")} == compiled


def test_the_table_has_no_kernel_that_is_gone(limits):
    declared = set()
    for file in FILES:
        declared |= set(re.findall(r"__global__ void (\w+)\(", (PACKAGE / f"{file}.cu").read_text()))
    assert {kernel for kernel, *_ in limits} == declared


def rounded(used: dict[str, int]) -> int:
    """Return the registers of a thread as they are allotted."""
    return -(-used["registers"] // 8) * 8


def write_tables() -> None:
    rows = []
    for file, dtype, vector in itertools.product(FILES, DTYPES, VECTORS):
        found = [resources(file, dtype, vector, arch) for arch in ARCHITECTURES]
        for kernel in sorted(found[0]):
            rows.append([kernel, dtype, vector, *(rounded(one[kernel]) for one in found)])
    whole_rows = []
    for case, backward in itertools.product(WHOLE, (False, True)):
        each = [whole(case, backward, arch) for arch in ARCHITECTURES]
        used = ["no plan" if one is None else min(255, rounded(one)) for one in each]
        whole_rows.append([*key_of(case, backward), *used])
    # Only now: a failure leaves the old tables.
    write(TABLE, [["kernel", "dtype", "vector", *ARCHITECTURES], *rows])
    write(WHOLE_TABLE, [[*WHOLE_KEY, *ARCHITECTURES], *whole_rows])


def write(path: Path, rows: list[list[object]]) -> None:
    with path.open("w", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    write_tables()
