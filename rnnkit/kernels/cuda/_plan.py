"""How a scan is laid out on a device when its whole time loop is one launch; needs no GPU library.

A *group* of sequences is served by one or more blocks, each of which owns some hidden units, all gates of
them, and keeps their recurrent weights in registers for the whole sequence. persistent.cuh holds the kernel's
side of this; here is decided how many units, sequences and warps, within what a device has.

Everything that is said about time is an estimate, since no device has been measured: `step_times` is
there for `bench.gpu` to be confirmed or refuted, and meanwhile to choose among the layouts that are possible.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
LEAST_CAPABILITY = (8, 0)
PRODUCTS = ("half", "tf32", "fma")  # by their numbers in persistent.cuh


class Limits(NamedTuple):
    """What a device has.

    Attributes
    ----------
    multiprocessors : int
    shared_per_block : int
        Bytes of shared memory that a block may ask for.
    registers_per_multiprocessor : int
        Of 32 bits.
    capability : (int, int)
        The compute capability, such as (9, 0).
    """

    multiprocessors: int
    shared_per_block: int
    registers_per_multiprocessor: int
    capability: tuple[int, int]


class Scan(NamedTuple):
    """What is to be computed: a cell's scan in one direction.

    Attributes
    ----------
    cell : str
        "rnn", "lstm" or "gru".
    backward : bool
    dtype : str
        Of h and the weights.
    tf32 : bool
        Whether float32 products may be rounded to TF32.
    B, H : int
        Sequences and hidden units.
    directions : int
        2 for those of a layer side by side.
    """

    cell: str
    backward: bool
    dtype: str
    tf32: bool
    B: int
    H: int
    directions: int = 1

    @property
    def gates(self) -> int:
        """Return how many gates the cell has."""
        return GATES[self.cell]

    @property
    def operands(self) -> int:
        """Return how many numbers of a sequence a step multiplies: h, or the gradients of all gates."""
        return self.gates * self.H if self.backward else self.H

    @property
    def product(self) -> str:
        """Return how a step multiplies.

        The gradients of float16 gates would leave float16's range without a scaled loss; in TF32 they keep
        as many digits and float32's range, and the weights are exact.
        """
        if self.dtype == "bfloat16" or (self.dtype == "float16" and not self.backward):
            return "half"
        return "tf32" if self.tf32 or self.dtype == "float16" else "fma"

    @property
    def operand_bytes(self) -> int:
        """Return the size of a number that blocks exchange."""
        return 2 if self.product == "half" else 4


class Plan(NamedTuple):
    """A layout; the names are those of the macros in persistent.cuh, which explains them.

    `at_once` is how many groups of each direction a launch has at most.
    """

    product: str
    units: int
    n_tiles: int
    tiles_m: int
    warps_m: int
    warps_k: int
    windows: int
    chunks: int
    grid: bool
    in_shared: int = 0
    streamed: int = 0
    ring: int = 0
    directions: int = 1
    at_once: int = 1

    @property
    def sequences(self) -> int:
        """Return how many sequences a group has."""
        return 8 * self.n_tiles

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return 32 * self.warps_m * self.warps_k

    @property
    def rows(self) -> int:
        """Return the rows of a block's product."""
        return 16 * self.tiles_m * self.warps_m

    @property
    def pitch(self) -> int:
        """Return the bytes from one sequence to the next of what is multiplied, in shared memory."""
        return 64 * (self.warps_k * self.windows | 1)

    @property
    def shared(self) -> int:
        """Return a block's shared memory in bytes, which persistent.cuh divides up."""
        operand = self.sequences * self.pitch * min(2, self.chunks)
        sums = 4 * self.warps_k * self.sequences * (self.rows + 4)
        ring = self.window_bytes * self.ring
        return operand + self.weights_in_shared + ring + sums + 8 * self.sequences

    @property
    def window_bytes(self) -> int:
        """Return the bytes of a block's weights in a window of each warp."""
        return 32 * self.threads * self.tiles_m

    @property
    def weights_in_shared(self) -> int:
        """Return the bytes of weights that did not fit in the registers of a block."""
        return self.window_bytes * self.in_shared * self.chunks

    @property
    def weights_streamed(self) -> int:
        """Return the bytes of weights that a block reads anew at each step."""
        return self.window_bytes * self.streamed * self.chunks

    def blocks(self, H: int) -> int:
        """Return the blocks of a group."""
        return -(-H // self.units)

    def groups(self, B: int) -> int:
        """Return how many groups B sequences make."""
        return -(-B // self.sequences)

    def launches(self, B: int) -> int:
        """Return in how many launches B sequences go."""
        return -(-self.groups(B) // self.at_once)

    def registers(self, gates: int, capability: tuple[int, int]) -> int:
        """Return an estimate of a thread's registers; test_compile.py sees to it that none is spilled."""
        weights = 8 * self.tiles_m * (self.windows - self.in_shared - self.streamed) * self.chunks
        sums = self.tiles_m * self.n_tiles * (16 if self.product == "fma" else 4)
        items = -(-self.units * self.sequences // self.threads) * (gates + 3)
        more = _MORE if capability >= (10, 0) or self.product == "fma" else _MORE_BEFORE_100
        others = more.base
        others += more.from_shared if self.in_shared or self.streamed else 0
        others += more.streaming + more.each_tile * self.tiles_m if self.streamed else 0
        others += more.second_direction if self.directions == 2 else 0
        return weights + sums + items + others

    def macros(self) -> tuple[tuple[str, int], ...]:
        """Return the macros of this variant of a kernel."""
        return (
            ("PRODUCT", PRODUCTS.index(self.product)), ("UNITS", self.units), ("N_TILES", self.n_tiles),
            ("TILES_M", self.tiles_m), ("WARPS_M", self.warps_m), ("WARPS_K", self.warps_k),
            ("WINDOWS", self.windows), ("CHUNKS", self.chunks), ("IN_SHARED", self.in_shared),
            ("STREAMED", self.streamed), ("RING", self.ring), ("GRID", int(self.grid)),
            ("DIRECTIONS", self.directions),
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- choice


class More(NamedTuple):
    """Registers for addresses, the pieces of what is multiplied and the loops; with what may come on top."""

    base: int
    from_shared: int
    streaming: int
    each_tile: int
    second_direction: int


# What sm_100 needs, and products without tensor cores anywhere; then what is enough for tensor cores on sm_80
# and sm_90. From compiling some hundred layouts: the most that was used, and nothing spilled.
_MORE = More(72, 20, 24, 6, 26)
_MORE_BEFORE_100 = More(50, 24, 12, 2, 4)
_MOST_REGISTERS = 255  # of a thread: the architecture's
_MOST_BLOCKS = 65535  # along the axis y of a grid, which the kernels use
_IN_FLIGHT = 48 << 10  # bytes of streamed weights that a block asks for ahead
_WARPS = 8  # a quarter of the registers of a multiprocessor each, at 255 a thread: all of them
_UNITS = (4, 8, 16, 32, 48, 64, 96, 128, 160, 192)
_N_TILES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4, 8)


def plan(scan: Scan, limits: Limits) -> Plan | str:
    """Return the layout with the least estimated time of a step, or why there is none."""
    if scan.dtype == "float64":
        return "float64 has no tensor cores to gain from"
    if limits.capability < LEAST_CAPABILITY:
        return "needs compute capability {}.{}".format(*LEAST_CAPABILITY)
    if not scan.B:
        return "no sequences"
    if scan.B * scan.gates * scan.H >= 1 << 31:
        return "a step has more numbers than the kernels count"
    fitting = [layout for layout in _layouts(scan, limits) if _fits(layout, scan, limits)]
    if not fitting:
        return f"{scan.H} hidden units are too many for the registers and shared memory"
    seconds, best = min((sum(step_times(layout, scan, limits).values()), layout) for layout in fitting)
    alone = step_alone(scan)
    if seconds > _WORTH * alone:
        return f"an estimated {1e6 * seconds:.0f} us a step, and {1e6 * alone:.0f} step by step"
    return best


def _layouts(scan: Scan, limits: Limits) -> list[Plan]:
    """Return all layouts that are worth a thought, whether they fit or not."""
    needed = -(-scan.operands * scan.operand_bytes // 64)
    found = set()
    for units, n_tiles, warps_m, chunks in itertools.product(_UNITS, _N_TILES, (1, 2, 4, 8), _CHUNKS):
        tiles = -(-units * (1 if scan.backward else scan.gates) // 16)
        warps_k = min(_WARPS // warps_m, -(-needed // chunks))
        smaller = units >= 2 * scan.H and units > _UNITS[0]
        if smaller or warps_m > tiles or (n_tiles > 1 and 4 * n_tiles >= scan.B):
            continue  # half of the units, of the warps or of the sequences would have nothing to do
        grid = units < scan.H
        windows = -(-needed // (warps_k * chunks))
        if chunks > 1 and (not grid or warps_k * windows * (chunks - 1) >= needed):
            continue
        tiles_m = -(-tiles // warps_m)
        layout = Plan(
            scan.product, units, n_tiles, tiles_m, warps_m, warps_k, windows, chunks, grid,
            directions=scan.directions,
        )  # fmt: skip
        blocks = scan.directions * (layout.blocks(scan.H) if grid else 1)
        # One block alone may also wait until another one is over.
        at_once = (limits.multiprocessors if grid else _MOST_BLOCKS) // blocks
        found.add(_with_weights(layout._replace(at_once=at_once), scan, limits))
    return sorted(found)


def _with_weights(layout: Plan, scan: Scan, limits: Limits) -> Plan:
    """Return the layout with a place for those weights that do not fit in the registers."""
    most = _most_registers(layout, limits)
    if layout.registers(scan.gates, limits.capability) <= most:
        return layout

    def outside(one: Plan) -> int:
        """Return how many windows of a chunk cannot be in registers, from the layout with one elsewhere."""
        excess = one.registers(scan.gates, limits.capability) - most
        return 1 + max(0, -(-excess // (8 * one.tiles_m * one.chunks)))

    shared = layout._replace(in_shared=outside(layout._replace(in_shared=1)))
    if shared.shared <= limits.shared_per_block:
        return shared
    windows = outside(layout._replace(streamed=1))
    slots = max(2, -(-_IN_FLIGHT // layout.window_bytes))
    room = limits.shared_per_block - layout._replace(ring=slots).shared
    in_shared = max(0, min(windows - 1, room // (layout.window_bytes * layout.chunks)))
    streamed = windows - in_shared
    return layout._replace(in_shared=in_shared, streamed=streamed, ring=min(slots, streamed * layout.chunks))


def _most_registers(layout: Plan, limits: Limits) -> int:
    """Return how many registers a thread may have."""
    return min(_MOST_REGISTERS, limits.registers_per_multiprocessor // layout.threads)


def _fits(layout: Plan, scan: Scan, limits: Limits) -> bool:
    return (
        layout.at_once > 0
        and layout.in_shared + layout.streamed < layout.windows
        and layout.registers(scan.gates, limits.capability) <= _most_registers(layout, limits)
        and layout.shared <= limits.shared_per_block
    )


# ---------------------------------------------------------------------------- the time of a step

# Estimates for an H100 or H200, to be replaced by what bench.gpu measures.
_CLOCK = 1.7e9
_EXCHANGE = 1.6e-6  # from the stores of one block to the loads of another: release, its flag, acquire
_LATENCY = 0.7e-6  # of a load from the L2 cache
_L2 = 5.5e12  # bytes a second, all multiprocessors together
_L2_ONE = 64.0  # bytes a clock to one of them
_L2_HOLDS = 3e7  # bytes
_SHARED = 128.0  # bytes a clock of shared memory
_MEMORY = 4.0e12  # bytes a second
_BARRIER = 30.0  # clocks of __syncthreads
# Multiplications a clock and multiprocessor: of mma.sync some 0.6 of what the tensor cores can do.
_RATE = {"half": 1200.0, "tf32": 600.0, "fma": 100.0}
_CELL = 250.0  # clocks of a thread for the arithmetic of one hidden unit of one sequence: some tanh in a row


# What is not one launch has two a step, by the host, which is slower at that than a device at most steps.
_STEP_ALONE = 14e-6
_WORTH = 0.9  # of that time a launch of all steps may take: both are estimates
_RATE_ALONE = {"half": 3.0e14, "tf32": 1.5e14, "fma": 3.0e13}  # multiplications a second


def step_alone(scan: Scan) -> float:
    """Return an estimate of the seconds of a step that is not in one launch with the others, however large.

    Low rather than high: a product whose weights come from memory, or that is bound by arithmetic.
    """
    weights = scan.gates * scan.H * scan.H
    arithmetic = weights * scan.B / _RATE_ALONE[scan.product]
    seconds = max(_STEP_ALONE, weights * scan.operand_bytes / _MEMORY, arithmetic)
    return scan.directions * seconds


def step_times(layout: Plan, scan: Scan, limits: Limits) -> dict[str, float]:
    """Return an estimate of the seconds that each part of a time step takes, one after the other.

    "exchange" is the wait of blocks for each other and for the first of what they exchanged; "operand" the
    transport of the rest to shared memory; "product" reads it from there, and streamed weights from wherever
    they are, and multiplies; "sums" adds up what the warps have; "cells" is the arithmetic of the gates;
    "memory" what gates and states need of the device's memory beyond the time of all others. That is of both
    directions where there are two, and of as many steps as there are launches.
    """
    blocks, N = layout.blocks(scan.H) * layout.directions, layout.sequences
    groups = min(layout.groups(scan.B), layout.at_once)
    at_once = min(blocks * groups, max(1, limits.multiprocessors))
    operand = N * scan.operands * scan.operand_bytes
    reads = (layout.warps_m * operand + layout.weights_in_shared + layout.weights_streamed) / _SHARED
    # All groups read the same weights, most of them after another one did.
    cached = min(1.0, _L2_HOLDS / max(1, layout.weights_streamed * blocks))
    stream = max(
        layout.weights_streamed / _L2_ONE,
        at_once * layout.weights_streamed / _L2 * _CLOCK,
        (1.0 - cached) * blocks * layout.weights_streamed / _MEMORY * _CLOCK,
    )
    multiply = layout.rows * N * scan.operands / _RATE[layout.product]
    sums = 2 * 4 * layout.warps_k * N * layout.rows / _SHARED
    items = -(-layout.units * N // layout.threads)
    times = {
        "exchange": _EXCHANGE + _LATENCY * layout.chunks**0.5 if layout.grid else 0.0,
        "operand": max(operand / (_L2_ONE * _CLOCK), at_once * operand / _L2) if layout.grid else 0.0,
        "product": max(reads, multiply, stream) / _CLOCK,
        "sums": (sums + 4 * _BARRIER) / _CLOCK,
        "cells": items * _CELL / _CLOCK,
    }
    rounds = -(-blocks * groups // at_once) * layout.launches(scan.B)
    times = {part: seconds * rounds for part, seconds in times.items()}
    # Gates there and back, c or its like, and the output or its gradient.
    moved = scan.directions * scan.B * scan.H * (4 * (2 * scan.gates + 2) + 4) / _MEMORY
    return times | {"memory": max(0.0, moved - sum(times.values()))}
