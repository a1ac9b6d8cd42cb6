"""Scalars that numba compiles to vector code.

- ``kernel``: what compiles the functions of the modules beside this one.
- ``exp``: of a number up to 0, in the number's type.
- ``widen``, ``narrow``: bfloat16, held as int16, to float32 and back.
- ``weighted_rows``: sixteen columns of sums of weighted rows, the inner loop of every attention.
- ``prefetch``: ask for memory that will be read soon.
- ``FAST``: the freedoms of arithmetic that the kernels take.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np import arrayobj

FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered, which vector code needs; infinities and nan keep their meaning."""

_OWN = Path(__file__).stat()


def kernel(function: Any) -> Any:
    """Compile on first use, without Python's lock, and keep the code on disk where there is a place for it.

    Numba takes kept code for fresh as long as the function's own file is unchanged; here this file has a say as well.
    """
    compile = functools.partial(njit, nogil=True, fastmath=FAST, error_model="numpy")
    try:
        compiled: Any = compile(cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return compile()(function)
    kept = compiled._cache._cache_file
    kept._source_stamp = (kept._source_stamp, _OWN.st_mtime, _OWN.st_size)
    return compiled


WIDTH = 16
"""Numbers of a run: one vector of fp32 with AVX-512, two with AVX2."""

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SMALLEST = np.float32(-87.0)


def _bitcast(source: Any, target: Any, kind: Any) -> Any:
    def declare(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], kind)

        return target(source), generate

    return intrinsic(declare)


_as_float = _bitcast(types.int32, types.float32, ir.FloatType())
_as_int = _bitcast(types.float32, types.int32, ir.IntType(32))


def exp(x: float) -> float:
    """Return e to the power of ``x <= 0``: float32 within 2 ulp and 0 below -87, float64 as the C library has it."""
    return math.exp(x)


@overload(exp, inline="always", strict=False)
def _exp(x: Any) -> Any:
    if x == types.float32:
        # Cephes' expf: a polynomial on [-ln 2 / 2, ln 2 / 2], scaled by a power of two.
        def single(x: Any) -> Any:
            bounded = x if x > _SMALLEST else _SMALLEST
            n = np.floor(bounded * _LOG2E + np.float32(0.5))
            # By way of an integer: FAST would join the two products, whose difference is the point.
            whole = np.int32(n)
            r = bounded - n * _LN2_HIGH - np.float32(whole) * _LN2_LOW
            p = np.float32(1.9875691500e-4)
            p = p * r + np.float32(1.3981999507e-3)
            p = p * r + np.float32(8.3334519073e-3)
            p = p * r + np.float32(4.1665795894e-2)
            p = p * r + np.float32(1.6666665459e-1)
            p = p * r + np.float32(5.0000001201e-1)
            p = p * r * r + r + np.float32(1.0)
            found = p * _as_float((whole + np.int32(127)) << np.int32(23))
            return found if x >= _SMALLEST else (np.float32(0.0) if x < _SMALLEST else x)

        return single

    def double(x: Any) -> Any:
        return math.exp(x)

    return double


def widen(x: float) -> float:
    """Return the number that ``x`` stands for: int16 holds a bfloat16."""
    return x


@overload(widen, inline="always", strict=False)
def _widen(x: Any) -> Any:
    if x == types.int16:
        return lambda x: _as_float(np.int32(x) << np.int32(16))
    return lambda x: x


def narrow(x: float, like: Any) -> Any:
    """Return ``x`` as an element of ``like`` holds it; rounded to nearest even for bfloat16."""
    return x


@overload(narrow, inline="always", strict=False)
def _narrow(x: Any, like: Any) -> Any:
    if like.dtype == types.int16:

        def rounded(x: Any, like: Any) -> Any:
            bits = _as_int(np.float32(x))
            return np.int16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))

        return rounded
    return lambda x, like: x


def _weighted(number: int) -> Any:
    """The intrinsic of ``weighted_rows`` for so many sums at once: each row is loaded once for all of them."""

    def declare(
        context: Any,
        out: Any,
        at: Any,
        out_stride: Any,
        weights: Any,
        first: Any,
        weight_stride: Any,
        rows: Any,
        begin: Any,
        count: Any,
        stride: Any,
        kept: Any,
    ) -> Any:
        integer = types.int64
        integers = (integer, integer)
        kinds = (out, *integers, weights, *integers, rows, integer, *integers, out.dtype)
        return types.void(*kinds), functools.partial(_generate, number)

    return intrinsic(declare)


def _generate(number: int, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    kinds = signature.args
    out, weights, rows = (arrayobj.make_array(kinds[i])(context, builder, arguments[i]).data for i in (0, 3, 6))
    at, out_stride, first, weight_stride = (arguments[i] for i in (1, 2, 4, 5))
    begin, count, stride, kept = arguments[7:]
    scalar = context.get_value_type(kinds[0].dtype)
    vector = ir.VectorType(scalar, WIDTH)
    zeros = ir.Constant(vector, [0.0] * WIDTH)
    align = kinds[0].dtype.bitwidth // 8
    flags = ("contract", "reassoc", "nsz")

    def integer(value: int) -> Any:
        return ir.Constant(count.type, value)

    def pointer(data: Any, index: Any, kind: Any) -> Any:
        return builder.bitcast(builder.gep(data, [index]), ir.VectorType(kind, WIDTH).as_pointer())

    def spread(value: Any) -> Any:
        undefined = ir.Constant(vector, ir.Undefined)
        single = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))

    def row(index: Any) -> Any:
        place = builder.add(begin, builder.mul(index, stride))
        if kinds[6].dtype != types.int16:
            return builder.load(pointer(rows, place, scalar), align=align)
        wide = ir.VectorType(ir.IntType(32), WIDTH)
        bits = builder.zext(builder.load(pointer(rows, place, ir.IntType(16)), align=2), wide)
        return builder.bitcast(builder.shl(bits, ir.Constant(wide, [16] * WIDTH)), vector)

    # As many chains of sums as hide the latency of one.
    unrolled = max(1, 4 // number)
    sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(number)] for _ in range(unrolled)]

    def add(totals: Any, index: Any) -> None:
        values = row(index)
        for query, total in enumerate(totals):
            place = builder.add(builder.add(first, builder.mul(weight_stride, integer(query))), index)
            weight = spread(builder.load(builder.gep(weights, [place])))
            builder.store(builder.fadd(builder.load(total), builder.fmul(weight, values, flags), flags), total)

    whole = builder.sdiv(count, integer(unrolled))
    with cgutils.for_range(builder, whole) as loop:
        base = builder.mul(loop.index, integer(unrolled))
        for i, totals in enumerate(sums):
            add(totals, builder.add(base, integer(i)))
    with cgutils.for_range_slice(builder, builder.mul(whole, integer(unrolled)), count, integer(1)) as (index, _):
        add(sums[0], index)
    fresh = builder.fcmp_ordered("==", kept, ir.Constant(scalar, 0.0))
    for query in range(number):
        target = pointer(out, builder.add(at, builder.mul(out_stride, integer(query))), scalar)
        old = builder.fmul(spread(kept), builder.load(target, align=align), flags)
        found = builder.select(fresh, zeros, old)
        for totals in sums:
            found = builder.fadd(found, builder.load(totals[query]), flags)
        builder.store(found, target, align=align)
    return context.get_dummy_value()


_weighted_1, _weighted_2, _weighted_4 = _weighted(1), _weighted(2), _weighted(4)


@njit(cache=True, nogil=True, inline="always")
def weighted_rows(
    out: Any,
    at: int,
    out_stride: int,
    weights: Any,
    first: int,
    weight_stride: int,
    number: int,
    rows: Any,
    begin: int,
    count: int,
    stride: int,
    kept: Any,
) -> None:
    """Add the same rows to ``number`` runs of sixteen numbers, each with weights of its own.

    For every n < ``number`` and i < 16, with a = at + n x out_stride and w = first + n x weight_stride: out[a + i] =
    kept x out[a + i] + sum over j < count of weights[w + j] x rows[begin + j x stride + i].

    Numba's own loops over arrays check for overlaps before every sixteen numbers and go through memory after every
    row; here the sums stay in registers. Indices count the elements of contiguous arrays from their beginning.

    Args:
        out: array of a floating type.
        at: first number of the first run.
        out_stride: from one run to the next.
        weights: array of the type of ``out``.
        first: first weight of the first run.
        weight_stride: from one run's to the next one's.
        number: runs.
        rows: array of that type, or of int16 that holds bfloat16.
        begin: first number of the first row.
        count: rows.
        stride: from one row to the next.
        kept: factor on what ``out`` holds, of its type; with 0 that may be anything.
    """
    for n in range(0, number // 4 * 4, 4):
        o, w = at + n * out_stride, first + n * weight_stride
        _weighted_4(out, o, out_stride, weights, w, weight_stride, rows, begin, count, stride, kept)
    if number & 2:
        n = number // 4 * 4
        o, w = at + n * out_stride, first + n * weight_stride
        _weighted_2(out, o, out_stride, weights, w, weight_stride, rows, begin, count, stride, kept)
    if number & 1:
        n = number - 1
        o, w = at + n * out_stride, first + n * weight_stride
        _weighted_1(out, o, out_stride, weights, w, weight_stride, rows, begin, count, stride, kept)


@intrinsic
def prefetch(context: Any, array: Any, begin: Any, count: Any) -> Any:
    """Ask for the elements ``begin`` to ``begin + count`` of a contiguous array; they need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        data = arrayobj.make_array(kind)(context, builder, arguments[0]).data
        begin, count = arguments[1], arguments[2]
        line = ir.Constant(count.type, 64 // (kind.dtype.bitwidth // 8))
        with cgutils.for_range_slice(builder, begin, builder.add(begin, count), line) as (index, _):
            place = builder.bitcast(builder.gep(data, [index]), byte)
            builder.call(hint, [place, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate
