"""Counters that threads share in compiled code, and how to wait for one without the interpreter's lock."""

from __future__ import annotations

import os
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._pieces import compiled

POSSIBLE = os.name == "posix"  # to wait without keeping others from the processor
FOREVER = -1
_LOOKS = 4000  # at a counter before the processor is offered to other threads


def _counter(context: Any, builder: Any, kind: Any, counters: Any, at: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, counters).data, [at])


@intrinsic  # type: ignore[untyped-decorator]
def add(typing: Any, counters: Any, at: Any, value: Any) -> Any:
    """Add to a counter, as one indivisible act; return what it was before."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        counter = _counter(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", counter, args[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def read(typing: Any, counters: Any, at: Any) -> Any:
    """Return a counter, and with it see what its writers wrote before."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_counter(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(counters, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def write(typing: Any, counters: Any, at: Any, value: Any) -> Any:
    """Set a counter; who reads it sees all that was written before."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _counter(context, builder, sig.args[0], *args[:2]), "release", 8)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def _yield_processor(typing: Any) -> Any:
    """Let other threads run, where there is POSIX's sched_yield."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if POSSIBLE:
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), lower


@compiled
def wait(counters: Any, at: int, least: int, offers: int) -> Any:
    """Wait until a counter is at least that high or negative, and return it.

    At most for so many offers of the processor, about 4 microseconds each where nobody takes it.
    """
    while True:
        for _ in range(_LOOKS):
            value = read(counters, at)
            if value >= least or value < 0:
                return value
        _yield_processor()
        offers -= 1
        if offers == 0:
            return value


@compiled
def add_and_wait(counters: Any, value: int, others: Any, least: int, offers: int) -> None:
    """Add to counters[0], then wait until others[0] is at least that high."""
    add(counters, 0, value)
    wait(others, 0, least, offers)
