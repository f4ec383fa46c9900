"""What numba lacks: typed pointers from addresses, bfloat16 as shifted bits, a fast exponential.

``load`` and ``store`` follow the pointer's type: uint16 holds bfloat16, others hold themselves.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

BF16 = types.CPointer(types.uint16)
F32 = types.CPointer(types.float32)
I64 = types.CPointer(types.int64)
F64 = types.CPointer(types.float64)
I8 = types.CPointer(types.int8)
ARGUMENTS = types.void(I64)

#: Without "nnan" and "ninf": a NaN in the stream must stay one.
FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}
_jit = njit(fastmath=FAST, error_model="numpy")  # LLVM inlines these; numba's inlining warns


def _pointer(pointee, llvm):
    @intrinsic
    def cast(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], llvm.as_pointer())

        return types.CPointer(pointee)(types.int64), codegen

    return cast


bf16_at = _pointer(types.uint16, ir.IntType(16))
f32_at = _pointer(types.float32, ir.FloatType())
f64_at = _pointer(types.float64, ir.DoubleType())
i64_at = _pointer(types.int64, ir.IntType(64))
i8_at = _pointer(types.int8, ir.IntType(8))


@intrinsic
def like(typingctx, address, pointer):
    """The pointer at ``address`` of the same type as ``pointer``."""
    by_type = {types.uint16: ir.IntType(16), types.int8: ir.IntType(8)}
    llvm = by_type.get(pointer.dtype, ir.FloatType())

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], llvm.as_pointer())

    return pointer(types.int64, pointer), codegen


@intrinsic
def float_of(typingctx, bits):
    """float32 with these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of(typingctx, value):
    """The 32 bits of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def double_of(typingctx, bits):
    """float64 with these 64 bits: how real numbers travel among a kernel's integers."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def call_int(typingctx, address):
    """Call ``int f(void)`` at an address."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(args[0], function.as_pointer()), [])

    return types.int32(types.int64), codegen


@intrinsic
def call_void(typingctx, address):
    """Call ``void f(void)`` at an address."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic
def prefetch(typingctx, pointer, index):
    """Begin to load the cache line of an element; any address will do."""

    def codegen(context, builder, signature, args):
        place = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [place.type],
            ir.FunctionType(ir.VoidType(), [place.type, word, word, word]),
        )
        builder.call(function, [place, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(pointer, types.int64), codegen


def load(pointer, index):
    """float32 at ``index``."""
    raise NotImplementedError


def store(pointer, index, value):
    """Write a float32, rounded to nearest even where the memory is bfloat16."""
    raise NotImplementedError


def rounded(pointer, value):
    """``value`` as it would come back from memory of the pointer's type."""
    raise NotImplementedError


def element_bytes(pointer):
    """Size of what the pointer points to."""
    raise NotImplementedError


@overload(element_bytes)
def _element_bytes(pointer):
    if pointer.dtype == types.uint16:
        return lambda pointer: 2
    if pointer.dtype == types.int8:
        return lambda pointer: 1
    return lambda pointer: 4


@overload(load)
def _load(pointer, index):
    if pointer.dtype == types.uint16:

        def widened(pointer, index):
            return float_of(np.uint32(np.uint32(pointer[index]) << np.uint32(16)))

        return widened
    if pointer.dtype == types.int8:
        return lambda pointer, index: np.float32(pointer[index])
    return lambda pointer, index: pointer[index]


@_jit
def bf16_bits(value):
    """bfloat16 bits of a float32, rounded to nearest even."""
    bits = bits_of(value)
    up = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint32(up >> np.uint32(16))


@overload(store)
def _store(pointer, index, value):
    if pointer.dtype == types.uint16:

        def put(pointer, index, value):
            pointer[index] = np.uint16(bf16_bits(value))

        return put

    def put32(pointer, index, value):
        pointer[index] = value

    return put32


@overload(rounded)
def _rounded(pointer, value):
    if pointer.dtype == types.uint16:
        return lambda pointer, value: float_of(np.uint32(bf16_bits(value) << np.uint32(16)))
    return lambda pointer, value: value


@_jit
def exp(x):
    """e^x of a float32 within 2 units in the last place; vectorises, unlike the C library's."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    scale = float_of(np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)))
    return p * scale


@_jit
def sigmoid(x):
    """1 / (1 + e^-x) of a float32."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@_jit
def team(d):
    """(thread number, threads) out of a kernel's arguments."""
    if d[0] == 0:
        return np.int64(0), np.int64(1)
    return np.int64(call_int(d[0])), np.int64(call_int(d[1]))


@_jit
def barrier(d, threads):
    """Wait for all threads of the team."""
    if threads > 1:
        call_void(d[2])
