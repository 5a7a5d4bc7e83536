"""The steps of the attention kernel."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


@triton.jit
def _attend_block(
    query, key, value, bias_row, in_keys, peak, total, acc, scale_log2, shift,
    HAS_BIAS: tl.constexpr, SCALE_FIRST: tl.constexpr, MASKED: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: query [BM, D], key and value [BN, D], peak and total [BM], acc [BM, D].

    s = scale * log2(e) * q.k + log2(e) * bias,  p = 2^(s - peak)

    Scale and bias are one multiply-add per element. SCALE_FIRST is needed with a bias, or with a scale that is not
    positive. Without it the maximum is taken over the plain products, and scale and peak are one multiply-add.
    SHIFTED: all keys of the block have the same bias, `shift`. It is added once a row, to the maximum and so to what is
    subtracted, and costs nothing per element.
    """
    s = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BM, BN]
    if SCALE_FIRST:
        s = s * scale_log2
    if HAS_BIAS:
        s += bias_row[None, :]
    if MASKED:
        s = tl.where(in_keys[None, :], s, float("-inf"))
    highest = tl.max(s, axis=1)  # [BM]
    if not SCALE_FIRST:
        highest = highest * scale_log2
        s = s * scale_log2
    if SHIFTED:
        highest += shift
    new_peak = tl.maximum(peak, highest)
    # While all keys so far are hidden, the peak is -inf, and -inf - -inf would be NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if HAS_BIAS else new_peak
    shrink = tl.exp2(peak - base)  # [BM]
    if SHIFTED:
        base -= shift
    p = tl.exp2(s - base[:, None])  # [BM, BN]
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return new_peak, total, acc


@triton.jit
def _store_rows(
    out, lse, peak, total, acc, sample, head, first, q_stop, queries, heads,
    DIM: tl.constexpr, DIM_P2: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """out = acc / total,  lse = ln(2^peak * total)

    Writes rows first:q_stop of one head. A row that saw no key is 0, and its lse -inf.
    """
    d = tl.arange(0, DIM_P2)  # [D]
    m = first + tl.arange(0, BLOCK_M)  # [BM]
    sample, in_rows = tl.cast(sample, tl.int64), m < q_stop
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    rows = ((sample * queries + m) * heads + head)[:, None] * DIM + d[None, :]  # [BM, D]
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=in_rows[:, None] & (d < DIM)[None, :])
    if HAS_LSE:
        tl.store(lse + (sample * heads + head) * queries + m, (peak + tl.log2(total)) / LOG2_E, mask=in_rows)
