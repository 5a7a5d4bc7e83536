"""Makes Triton's interpreter compute with bfloat16.

The interpreter holds bfloat16 as bit patterns in uint16. As it comes, it multiplies and compares those integers, and
truncates float32 instead of rounding it. Here operands are widened to float32, which is exact, and results rounded to
the nearest even once, as the hardware does.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def is_bfloat16(value):
    return getattr(value, "dtype", value).scalar == tl.bfloat16


def widened(handle):
    """A bfloat16 handle with the same values in float32; any other as it is."""
    if not is_bfloat16(handle):
        return handle
    return TensorHandle((np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(values):
    """A bfloat16 handle of the values' nearest neighbours, ties to even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), upper), tl.bfloat16)


def install():
    """Replace the interpreter's methods in this process; `gpu.launch.check_dtype` refuses bfloat16 without it."""
    stock = InterpreterBuilder
    cast, dot, binary, unary = stock.cast_impl, stock.create_dot, stock.binary_op, stock.unary_op
    convert = stock.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        if is_bfloat16(src) == is_bfloat16(dst_type):
            return cast(self, src, dst_type)
        return rounded(src.data) if is_bfloat16(dst_type) else cast(self, widened(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        known = is_bfloat16(src) or is_bfloat16(dst_type)
        return cast_impl(self, src, dst_type) if known else convert(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def binary_op(self, lhs, rhs, op):
        result = binary(self, widened(lhs), widened(rhs), op)
        compares = result.data.dtype == bool
        return rounded(result.data) if is_bfloat16(lhs) and not compares else result

    def unary_op(self, arg, op):
        result = unary(self, widened(arg), op)
        return rounded(result.data) if is_bfloat16(arg) else result

    stock.cast_impl, stock.create_dot, stock.binary_op, stock.unary_op = cast_impl, create_dot, binary_op, unary_op
    stock.create_fp_to_fp = create_fp_to_fp
    stock.get_bf16 = lambda self, value: rounded(np.array([value], np.float32))
    stock.exact_bfloat16 = True
