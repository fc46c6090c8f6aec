"""Vectors of floats inside numba functions: what LLVM must not be left to guess.

numba's loops vectorise when LLVM can prove that few arrays do not overlap, and fall back to scalar code
without a word when it cannot: a factor of ten. A `Vector` is one LLVM vector value with + - * / and a few
functions, so the scans say what they mean, on any processor that LLVM knows. A vector is as long as two
registers: two independent chains hide half of the latency of everything that is done with it.

`dot_block` is the one hot loop, a register-blocked matrix product on weights that were packed once a call.
BLAS packs them again at every time step (its small-matrix path that does not exists on AVX-512 alone),
and one of its calls costs a microsecond; here are the rates that led to it, for h (b, H) times weight_hh
(H, 4H) in float32, one thread of a Zen 3 (AVX2), GFLOP/s of OpenBLAS / of `dot_block`:

    b             1      4      8     16     32     64
    H=64      15/28  21/48  27/51  58/89  64/94
    H=256     25/32  22/67  29/63  24/87  66/88  75/96
    H=1024    19/19         28/38         63/70  73/80
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model


def _register_file() -> tuple[int, int]:
    """Return the bytes of a vector register and how many there are, on this machine."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 32
    if features.get("avx"):
        return 32, 16
    arm = llvm.get_default_triple().startswith(("aarch64", "arm64"))
    return 16, 32 if arm else 16


REGISTER_BYTES, REGISTERS = _register_file()
# Rows of the register block: two accumulators each, two registers of weights, one of h, and one to spare.
ROWS = 6 if REGISTERS == 16 else 12


class Vector(types.Type):  # type: ignore[misc]
    """numba's type of a vector of `lanes` floats."""

    def __init__(self, dtype: Any):
        self.dtype = dtype
        self.lanes = 2 * REGISTER_BYTES // (dtype.bitwidth // 8)
        super().__init__(name=f"Vector({dtype} x {self.lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        """LLVM's type of the same."""
        element = ir.FloatType() if self.dtype == types.float32 else ir.DoubleType()
        return ir.VectorType(element, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, vector.llvm)


# ------------------------------------------------------------------------------------------ operators


def _splat(builder: Any, vector: Vector, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector.llvm, ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(one, ir.Constant(vector.llvm, ir.Undefined), zeros)


def _as_vector(context: Any, builder: Any, vector: Vector, kind: Any, value: Any) -> Any:
    if isinstance(kind, Vector):
        return value
    return _splat(builder, vector, context.cast(builder, value, kind, vector.dtype))


def _define_operator(function: Any, instruction: str) -> None:
    @infer_global(function)
    class _Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            vectors = [a for a in args if isinstance(a, Vector)]
            if len(args) == 2 and vectors and all(isinstance(a, (Vector, types.Number)) for a in args):
                return signature(vectors[0], *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = zip(sig.args, args, strict=True)
        a, b = (_as_vector(context, builder, sig.return_type, kind, value) for kind, value in pair)
        return getattr(builder, instruction)(a, b)

    for left, right in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(function, left, right)(lower)


for _function, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _define_operator(_function, _instruction)


def _call(builder: Any, name: str, vector: Vector, *args: Any) -> Any:
    """Call the LLVM intrinsic of that name for this vector type."""
    suffix = f"v{vector.lanes}f{vector.dtype.bitwidth}"
    kind = ir.FunctionType(vector.llvm, [vector.llvm] * len(args))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}")
    return builder.call(function, args)


# ------------------------------------------------------------------------------------ loads and stores


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [at])


def _load(builder: Any, vector: Vector, address: Any) -> Any:
    pointer = builder.bitcast(address, vector.llvm.as_pointer())
    return builder.load(pointer, align=vector.dtype.bitwidth // 8)


def _store(builder: Any, vector: Vector, value: Any, address: Any) -> None:
    pointer = builder.bitcast(address, vector.llvm.as_pointer())
    builder.store(value, pointer, align=vector.dtype.bitwidth // 8)


def _first_lanes(builder: Any, vector: Vector, count: Any) -> Any:
    """Return a mask whose first `count` lanes are true."""
    index = ir.VectorType(ir.IntType(32), vector.lanes)
    numbers = ir.Constant(index, list(range(vector.lanes)))
    count = builder.trunc(count, ir.IntType(32))
    undefined = ir.Constant(index, ir.Undefined)
    one = builder.insert_element(undefined, count, ir.IntType(32)(0))
    counts = builder.shuffle_vector(one, undefined, ir.Constant(index, [0] * vector.lanes))
    return builder.icmp_signed("<", numbers, counts)


def _masked(builder: Any, vector: Vector, name: str, result: Any, *args: Any) -> Any:
    """Call LLVM's masked load or store, which touches no memory where the mask is false."""
    suffix = f"v{vector.lanes}f{vector.dtype.bitwidth}"
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.{name}.{suffix}.p0{suffix}")
    return builder.call(function, args)


def _masked_load(builder: Any, vector: Vector, address: Any, count: Any) -> Any:
    pointer = builder.bitcast(address, vector.llvm.as_pointer())
    mask, align = _first_lanes(builder, vector, count), ir.IntType(32)(vector.dtype.bitwidth // 8)
    return _masked(builder, vector, "load", vector.llvm, pointer, align, mask, ir.Constant(vector.llvm, None))


def _masked_store(builder: Any, vector: Vector, value: Any, address: Any, count: Any) -> None:
    pointer = builder.bitcast(address, vector.llvm.as_pointer())
    mask, align = _first_lanes(builder, vector, count), ir.IntType(32)(vector.dtype.bitwidth // 8)
    _masked(builder, vector, "store", ir.VoidType(), value, pointer, align, mask)


@intrinsic  # type: ignore[untyped-decorator]
def lanes(typing: Any, array: Any) -> Any:
    """Return how many elements of this array make a vector: a constant for the compiler."""
    size = Vector(array.dtype).lanes

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.IntType(64)(size)

    return types.int64(array), lower


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, at: Any) -> Any:
    """Return the vector that begins at array[at]."""
    vector = Vector(array.dtype)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, vector, _address(context, builder, sig.args[0], *args))

    return vector(array, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Put the vector to array[at] and behind."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store(builder, value, args[2], _address(context, builder, sig.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), lower


@intrinsic  # type: ignore[untyped-decorator]
def load_part(typing: Any, array: Any, at: Any, count: Any) -> Any:
    """Return the vector that begins at array[at]; only `count` elements are read, the others are zero."""
    vector = Vector(array.dtype)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], args[0], args[1])
        result = cgutils.alloca_once(builder, vector.llvm)
        full = builder.icmp_signed(">=", args[2], ir.IntType(64)(vector.lanes))
        with builder.if_else(full, likely=True) as (whole, part):
            with whole:
                builder.store(_load(builder, vector, address), result)
            with part:
                builder.store(_masked_load(builder, vector, address, args[2]), result)
        return builder.load(result)

    return vector(array, types.int64, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def store_part(typing: Any, array: Any, at: Any, value: Any, count: Any) -> Any:
    """Put the first `count` elements of the vector to array[at] and behind."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], args[0], args[1])
        full = builder.icmp_signed(">=", args[3], ir.IntType(64)(value.lanes))
        with builder.if_else(full, likely=True) as (whole, part):
            with whole:
                _store(builder, value, args[2], address)
            with part:
                _masked_store(builder, value, args[2], address, args[3])
        return context.get_dummy_value()

    return types.void(array, types.int64, value, types.int64), lower


@intrinsic  # type: ignore[untyped-decorator]
def transpose(typing: Any, source: Any, at: Any, stride: Any, target: Any, to: Any) -> Any:
    """Put the transpose of a square, whose rows begin `stride` apart at source[at], to target[to] and behind.

    By four squares of half the size, as many rows as fit the registers, each by log2(rows) rounds of merging:
    in round k row r takes every lane from rows r and r + rows / 2 in turns.
    """
    lanes_ = Vector(source.dtype).lanes
    N, element = lanes_ // 2, Vector(source.dtype).llvm.element

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source_, at_, stride_, target_, to_ = args
        half, index, i64 = ir.VectorType(element, N), ir.VectorType(ir.IntType(32), N), ir.IntType(64)
        align = element.get_abi_size(context.target_data)
        masks = [ir.Constant(index, [h * N // 2 + k // 2 + (k % 2) * N for k in range(N)]) for h in (0, 1)]

        def place(kind: Any, array: Any, start: Any, stride: Any, row: int, column: int) -> Any:
            offset = builder.add(builder.mul(stride, i64(row)), i64(column))
            address = _address(context, builder, kind, array, builder.add(start, offset))
            return builder.bitcast(address, half.as_pointer())

        for top, left in ((0, 0), (0, N), (N, 0), (N, N)):
            rows = [
                builder.load(place(source, source_, at_, stride_, top + r, left), align=align)
                for r in range(N)
            ]
            for _ in range(N.bit_length() - 1):
                rows = [
                    builder.shuffle_vector(rows[r // 2], rows[r // 2 + N // 2], masks[r % 2])
                    for r in range(N)
                ]
            for r in range(N):
                builder.store(rows[r], place(target, target_, to_, i64(lanes_), left + r, top), align=align)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(source, i64, i64, target, i64), lower


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of array[at], which must exist, to be brought near."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i32, address = ir.IntType(32), _address(context, builder, sig.args[0], *args)
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), lower


# ------------------------------------------------------------------------------------------- functions

# tanh in float32 as an odd rational function on [-7.9, 7.9], where it is 1 to the last bit: Eigen's
# coefficients (Eigen/src/Core/MathFunctionsImpl.h, generic_fast_tanh_float), highest power first.
_CLAMP = 7.99881172180175781
_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

# tanh in float64 from expm1(y) = 2^n expm1(r) + (2^n - 1), y = n ln 2 + r, |r| <= ln(2) / 2, where 13
# terms of the series leave 1e-17. ln 2 in two parts, the first with zeros at its end: n times it is exact.
_LN2 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)
_LOG2_E = 1.4426950408889634
_TERMS = 13
# 1.5 * 2^52: adding it rounds to an integer, which then stands in the low bits.
_ROUND = 6755399441055744.0


@intrinsic  # type: ignore[untyped-decorator]
def tanh(typing: Any, x: Any) -> Any:
    """Return tanh of each element; NaN stays NaN."""
    emit = _tanh32 if x.dtype == types.float32 else _tanh64

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, x, args[0])

    return x(x), lower


def _constant(vector: Vector, value: float) -> Any:
    return ir.Constant(vector.llvm, [value] * vector.lanes)


def _polynomial(builder: Any, vector: Vector, x: Any, coefficients: tuple[float, ...]) -> Any:
    total = _constant(vector, coefficients[0])
    for value in coefficients[1:]:
        total = _call(builder, "fmuladd", vector, total, x, _constant(vector, value))
    return total


def _tanh32(builder: Any, vector: Vector, x: Any) -> Any:
    # Ordered comparisons are false for NaN, so that it passes both; minimum instructions would swallow it.
    for compare, limit in ((">", _CLAMP), ("<", -_CLAMP)):
        beyond = builder.fcmp_ordered(compare, x, _constant(vector, limit))
        x = builder.select(beyond, _constant(vector, limit), x)
    square = builder.fmul(x, x)
    p, q = (_polynomial(builder, vector, square, which) for which in (_P, _Q))
    return builder.fdiv(builder.fmul(x, p), q)


def _tanh64(builder: Any, vector: Vector, x: Any) -> Any:
    # With e = expm1(-2|x|): tanh|x| = -e / (2 + e), without cancellation anywhere.
    y = builder.fmul(_call(builder, "fabs", vector, x), _constant(vector, -2.0))
    low = builder.fcmp_ordered("<", y, _constant(vector, -80.0))
    y = builder.select(low, _constant(vector, -80.0), y)
    shifted = _call(builder, "fmuladd", vector, y, _constant(vector, _LOG2_E), _constant(vector, _ROUND))
    n = builder.fsub(shifted, _constant(vector, _ROUND))
    r = _call(builder, "fmuladd", vector, n, _constant(vector, -_LN2[0]), y)
    r = _call(builder, "fmuladd", vector, n, _constant(vector, -_LN2[1]), r)
    series, factorial = [1.0], 1.0
    for k in range(2, _TERMS + 1):
        factorial *= k
        series.insert(0, 1.0 / factorial)
    small = builder.fmul(r, _polynomial(builder, vector, r, tuple(series)))
    integers = ir.VectorType(ir.IntType(64), vector.lanes)
    bits = builder.add(builder.bitcast(shifted, integers), ir.Constant(integers, [1023] * vector.lanes))
    power = builder.bitcast(builder.shl(bits, ir.Constant(integers, [52] * vector.lanes)), vector.llvm)
    e = builder.fadd(builder.fmul(power, small), builder.fsub(power, _constant(vector, 1.0)))
    result = builder.fdiv(builder.fneg(e), builder.fadd(e, _constant(vector, 2.0)))
    return _call(builder, "copysign", vector, result, x)


@intrinsic  # type: ignore[untyped-decorator]
def relu(typing: Any, x: Any) -> Any:
    """Return x where it is not negative, NaN included, and 0 elsewhere."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(x.llvm, None)
        return builder.select(builder.fcmp_ordered("<", args[0], zero), zero, args[0])

    return x(x), lower


@intrinsic  # type: ignore[untyped-decorator]
def where_positive(typing: Any, condition: Any, value: Any) -> Any:
    """Return `value` where `condition` > 0, and 0 elsewhere (also where the condition is NaN)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(value.llvm, None)
        return builder.select(builder.fcmp_ordered(">", args[0], zero), args[1], zero)

    return value(condition, value), lower


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once where the processor can."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "fmuladd", a, *args)

    return a(a, b, c), lower


@intrinsic  # type: ignore[untyped-decorator]
def total(typing: Any, x: Any) -> Any:
    """Return the sum of the elements, by halves: first each with the one half a vector away."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, count = args[0], x.lanes
        while count > 1:
            count //= 2
            kind = ir.VectorType(ir.IntType(32), count)
            halves = [ir.Constant(kind, list(range(at, at + count))) for at in (0, count)]
            undefined = ir.Constant(value.type, ir.Undefined)
            value = builder.fadd(*(builder.shuffle_vector(value, undefined, half) for half in halves))
        return builder.extract_element(value, ir.IntType(32)(0))

    return x.dtype(x), lower


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def dot_block(
    typing: Any, rows: Any, panels: Any, a: Any, a_at: Any, a_stride: Any, w: Any, w_at: Any, w_stride: Any,
    count: Any, z: Any, z_at: Any, z_stride: Any, fresh: Any,
) -> Any:  # fmt: skip
    """Multiply up to ROWS rows with `panels` (a literal) panels of weights, all sums in registers.

    For r < rows, p < panels: z[z_at + p * z_stride + r * lanes :] = sum over k < count of
    a[a_at + r * a_stride + k] * w[w_at + p * w_stride + k * lanes :], plus what was in z unless `fresh`.
    The order of the sum does not depend on `rows` or `panels`: a row gives the same bits in any company.
    """
    vector, P = Vector(w.dtype), panels.literal_value
    i64 = types.int64

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def address(argument: int, at: Any) -> Any:
            return _address(context, builder, sig.args[argument], args[argument], at)

        block = _DotBlock(builder, vector, address, *args[3:5], *args[6:9], *args[10:])
        if isinstance(rows, types.IntegerLiteral):
            block.emit(rows.literal_value, P)
            return context.get_dummy_value()
        done = builder.append_basic_block("done")
        choice = builder.switch(args[0], done)
        for count_of_rows in range(1, ROWS + 1):
            case = builder.append_basic_block(f"rows.{count_of_rows}")
            choice.add_case(ir.IntType(64)(count_of_rows), case)
            builder.position_at_end(case)
            block.emit(count_of_rows, P)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    row_type = rows if isinstance(rows, types.IntegerLiteral) else i64
    return types.void(row_type, panels, a, i64, i64, w, i64, i64, i64, z, i64, i64, types.boolean), lower


class _DotBlock:
    """Emits the code of `dot_block` for a given number of rows and panels."""

    def __init__(
        self, builder: Any, vector: Vector, address: Any, a_at: Any, a_stride: Any, w_at: Any, w_stride: Any,
        count: Any, z_at: Any, z_stride: Any, fresh: Any,
    ):  # fmt: skip
        self.builder, self.vector, self.address = builder, vector, address
        self.a_at, self.a_stride, self.w_at, self.w_stride = a_at, a_stride, w_at, w_stride
        self.count, self.z_at, self.z_stride, self.fresh = count, z_at, z_stride, fresh

    def emit(self, rows: int, panels: int) -> None:
        builder, vector = self.builder, self.vector
        a = [self.address(2, self._shifted(self.a_at, self.a_stride, r)) for r in range(rows)]
        w = [self.address(5, self._shifted(self.w_at, self.w_stride, p)) for p in range(panels)]
        z = {}
        for p in range(panels):
            place = self._shifted(self.z_at, self.z_stride, p)
            for r in range(rows):
                z[r, p] = self.address(9, builder.add(place, ir.IntType(64)(r * vector.lanes)))
        sums = {key: cgutils.alloca_once(builder, vector.llvm) for key in z}  # LLVM makes them registers
        with builder.if_else(self.fresh) as (zero, carry):
            with zero:
                for total in sums.values():
                    builder.store(ir.Constant(vector.llvm, None), total)
            with carry:
                for key, total in sums.items():
                    builder.store(_load(builder, vector, z[key]), total)
        with cgutils.for_range(builder, self.count) as loop:
            start = builder.mul(loop.index, ir.IntType(64)(vector.lanes))
            weights = [_load(builder, vector, builder.gep(panel, [start])) for panel in w]
            for r in range(rows):
                element = _splat(builder, vector, builder.load(builder.gep(a[r], [loop.index])))
                for p in range(panels):
                    total = builder.load(sums[r, p])
                    total = _call(builder, "fmuladd", vector, element, weights[p], total)
                    builder.store(total, sums[r, p])
        for key, total in sums.items():
            _store(builder, vector, builder.load(total), z[key])

    def _shifted(self, at: Any, stride: Any, times: int) -> Any:
        return self.builder.add(at, self.builder.mul(stride, ir.IntType(64)(times)))
