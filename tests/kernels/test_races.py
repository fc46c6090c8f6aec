"""Kernels whose blocks wait for each other have no races; races.h says what that means, and what not."""

from __future__ import annotations

import itertools

import pytest
from host_device import on_host
from test_cuda import in_fences
from test_cuda_training import ONE_STEP, at_odd_address, vectors
from test_kernels import assert_agrees, problem
from test_persistent import both_ways, by_hand, run_both

# (there, back): one block a group; several blocks; the gradients of all gates in chunks. Several warps each.
LAYOUTS = {
    "alone": ({"units": 24, "warps_m": 2}, {"units": 24, "warps_m": 2, "warps_k": 2}),
    "several": ({"units": 8, "warps_k": 2}, {"units": 8, "warps_k": 2}),
    "chunks": ({"units": 16, "warps_m": 2}, {"units": 32, "warps_m": 2, "n_tiles": 2, "chunks": 3}),
    "streamed": (
        {"units": 8, "warps_m": 2, "streamed": 2, "ring": 2},
        {"units": 16, "chunks": 2, "in_shared": 1, "streamed": 2, "ring": 3},
    ),
}
CASES = [
    ("lstm", "bfloat16", 24, "alone"),
    ("lstm", "bfloat16", 24, "several"),
    ("lstm", "bfloat16", 40, "chunks"),
    ("lstm", "float32", 37, "chunks"),
    ("gru", "bfloat16", 24, "several"),
    ("rnn-tanh", "float32", 24, "several"),
    ("gru", "float32", 39, "streamed"),
]


@pytest.fixture
def parts(monkeypatch):
    """Return the modules on the host, by name, whose kernels report races; each launch in another order."""
    module = on_host()
    parts = {name.rpartition(".")[2]: part for name, part in module.parts.items()}
    caches = parts["_loader"].kernel, parts["_loader"]._function, parts["_loader"]._module
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(module.device, "check_races", True)
    monkeypatch.setattr(module.device, "order", "uneven")
    yield parts | {"cuda": module}
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("variant", "dtype", "H", "layout"), CASES)
def test_no_races(parts, monkeypatch, rng, variant, dtype, H, layout):
    plans = parts["_plan"]

    def chosen(cell, backward, dtype, T, B, H):
        scan = plans.Scan(cell, backward, dtype, False, B, H)
        return by_hand(plans, scan, **LAYOUTS[layout][backward])

    monkeypatch.setattr(parts["_persistent"], "chosen", chosen)
    for ragged, reverse in itertools.product(("none", "unsorted"), (False, True)):
        seed = int(rng.integers(1 << 30))
        case = problem(variant, dtype, 4, 11, H, ragged=ragged, reverse=reverse, seed=seed)
        assert_agrees(case, parts["cuda"], dtype)


@pytest.mark.parametrize(("variant", "dtype", "H", "layout"), CASES[1:3])
def test_no_races_of_both_directions(parts, rng, variant, dtype, H, layout):
    scans = [parts["_plan"].Scan(variant, backward, dtype, False, 11, H, 2) for backward in (False, True)]
    layouts = [by_hand(parts["_plan"], scan, **LAYOUTS[layout][scan.backward]) for scan in scans]
    run_both(
        parts["cuda"], layouts, both_ways(variant, dtype, 4, 11, H, "unsorted", int(rng.integers(1 << 30)))
    )


def test_a_race_of_the_real_kernel_is_found(parts, monkeypatch):
    """Without the barrier before a block tells that its step is done."""
    change(parts, monkeypatch, TELLING, TELLING.replace("__syncthreads();", ""))
    with pytest.raises(AssertionError, match="a race: thread"):
        test_no_races(parts, monkeypatch, NoChance(), "lstm", "bfloat16", 24, "several")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_races_in_clipped_adam(parts, monkeypatch, rng, dtype):
    """Of three blocks, the last of which has little to do; by vectors and by single elements."""
    monkeypatch.setenv("RNNKIT_PERSISTENT", "1")
    parts["cuda"].device.launches.clear()
    for move, N in ((in_fences, 4099), (at_odd_address, 1027)):
        ours = [move(array) for array in vectors(rng, N, dtype)]
        parts["cuda"].clipped_adam(*ours, max_norm=0.25, **ONE_STEP)
    assert parts["cuda"].device.launches == ["clipped_adam"] * 2


def test_a_race_in_clipped_adam_is_found(parts, monkeypatch, rng):
    """Without the wait before a block reads what the others have."""
    change(parts, monkeypatch, WAITING, "")
    with pytest.raises(AssertionError, match="a race: thread"):
        test_no_races_in_clipped_adam(parts, monkeypatch, rng, "float32")


def change(parts, monkeypatch, old, new):
    """Have kernels that are compiled from now on read `new` in place of `old`."""
    source = parts["_loader"].source

    def changed(path):
        text = source(path)
        assert text.count(old) == 1
        return text.replace(old, new)

    monkeypatch.setattr(parts["_loader"], "source", changed)


TELLING = """tell_done(unsigned* flags, int block, unsigned count) {
    __syncthreads();
"""


WAITING = "    if (!all_are_done(flags, 0, 1, gridDim.y, 1, reinterpret_cast<unsigned*>(error))) return;\n"


class NoChance:
    """In place of a random generator: a test that shows a race needs no luck."""

    def integers(self, most):
        return 1
