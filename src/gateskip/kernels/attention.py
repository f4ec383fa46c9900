"""What attention's backward pass does between its matrix products, in one pass over each row.

Shapes: N matrices of scores, L queries times G heads of a group as rows, S keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit
from torch import Tensor

from gateskip.kernels import real
from gateskip.kernels.numeric import (
    ARGUMENTS,
    FAST,
    bf16_at,
    double_of,
    exp,
    f32_at,
    i64_at,
    like,
    load,
    store,
    team,
)
from gateskip.kernels.pool import Kernel, integers

__all__ = ["softmax_slope_"]

_jit: Any = njit(fastmath=FAST, error_model="numpy", cache=True)
#: A largest value is only taken off; a NaN reaches the result by the exponential.
_jit_max: Any = njit(fastmath=FAST | {"nnan"}, error_model="numpy", cache=True)
_kernel: Any = cfunc(ARGUMENTS, cache=True)


@_jit_max
def _largest(s, base, count):
    largest = load(s, base)
    for i in range(1, count):
        x = load(s, base + i)
        largest = x if x > largest else largest
    return largest


@_jit
def _slope(d, kind):
    thread, threads = team(d)
    s, dp, last = like(d[3], kind), like(d[4], kind), i64_at(d[5])
    rows, keys, per, heads, per_batch, stride = d[6], d[7], d[8], d[9], d[10], d[11]
    scale = np.float32(double_of(d[12]))
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        matrix, place = row // per, row % per
        seen = min(last[matrix // per_batch * stride + place // heads] + 1, keys)
        base = row * keys
        largest = _largest(s, base, seen)
        total = np.float32(0.0)
        mean = np.float32(0.0)
        for i in range(seen):
            e = exp((load(s, base + i) - largest) * scale)
            total += e
            mean += e * load(dp, base + i)
            store(s, base + i, e)
        one = np.float32(1.0) / total
        mean *= one
        for i in range(seen):
            p = load(s, base + i) * one
            store(dp, base + i, p * (load(dp, base + i) - mean) * scale)
            store(s, base + i, p)
        for i in range(seen, keys):
            store(s, base + i, np.float32(0.0))
            store(dp, base + i, np.float32(0.0))


@_kernel
def _slope_bf16(d):
    _slope(d, bf16_at(0))


@_kernel
def _slope_f32(d):
    _slope(d, f32_at(0))


SLOPE = Kernel(_slope_bf16, _slope_f32)


def softmax_slope_(
    s_NRS: Tensor, dp_NRS: Tensor, last_BL: Tensor, *, heads: int, kv_heads: int, scale: float
) -> None:
    """p = softmax(scale·s) over visible keys into ``s``; scale·p ⊙ (dp − Σ p·dp) into ``dp``.

    Args:
        s_NRS: products of queries and keys, contiguous; N = B·``kv_heads``, R = L·``heads``.
        dp_NRS: gradient of p, contiguous.
        last_BL: int64, last visible key of each query; rows contiguous, any stride between them.
        heads: query heads of a group. scale: of the scores.
    """
    assert last_BL.stride(1) == 1
    count, rows, keys = s_NRS.shape
    arguments = integers(
        s_NRS.data_ptr(), dp_NRS.data_ptr(), last_BL.data_ptr(), count * rows, keys, rows, heads,
        kv_heads, last_BL.stride(0), real(scale),
    )  # fmt: skip
    SLOPE(s_NRS.dtype, arguments, work=max(count * rows // 8, 1))
