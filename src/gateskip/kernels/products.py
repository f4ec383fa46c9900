"""Products of a weight's rows with a float32 vector, for other kernels to inline."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gateskip.kernels.numeric import FAST, element_bytes, f32_at, load, prefetch

__all__ = ["dot", "four_dots", "matrix", "matvec"]

_inner: Any = njit(fastmath=FAST, error_model="numpy")


AHEAD = 2  # rows; the processor's own prefetching stops at every page


@_inner
def _fetch(w, at, n):
    """Begin to load a row of a weight."""
    for i in range(0, n, 64 // element_bytes(w)):
        prefetch(w, at + i)


@_inner
def dot(w, at, x, n):
    """Row of a weight times a float32 vector."""
    total = np.float32(0.0)
    for i in range(n):
        total += load(w, at + i) * x[i]
    return total


@_inner
def four_dots(w, at, step, x, n):
    """Four rows of a weight, ``step`` apart, times a vector: four streams load faster than one."""
    a = b = c = e = np.float32(0.0)
    second, third, fourth = at + step, at + 2 * step, at + 3 * step
    for i in range(n):
        v = x[i]
        a += load(w, at + i) * v
        b += load(w, second + i) * v
        c += load(w, third + i) * v
        e += load(w, fourth + i) * v
    return a, b, c, e


@_inner
def matvec(w, first, rows, x, n, y, to):
    """y[to:] = rows of a weight from ``first`` on, times a vector, in float32."""
    quarter = rows // 4
    for i in range(quarter):
        y[to + i], y[to + quarter + i], y[to + 2 * quarter + i], y[to + 3 * quarter + i] = (
            four_dots(w, (first + i) * n, quarter * n, x, n)
        )
    for i in range(4 * quarter, rows):
        y[to + i] = dot(w, (first + i) * n, x, n)


@_inner
def _four_by_four(w, at, step, x, p, q, r, s, n):
    """Four rows of a weight times four vectors: what is loaded is used four times."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0.0)
    c0 = c1 = c2 = c3 = e0 = e1 = e2 = e3 = np.float32(0.0)
    second, third, fourth = at + step, at + 2 * step, at + 3 * step
    for i in range(n):
        j, k, m, o = load(w, at + i), load(w, second + i), load(w, third + i), load(w, fourth + i)
        v = x[p + i]
        a0 += j * v
        b0 += k * v
        c0 += m * v
        e0 += o * v
        v = x[q + i]
        a1 += j * v
        b1 += k * v
        c1 += m * v
        e1 += o * v
        v = x[r + i]
        a2 += j * v
        b2 += k * v
        c2 += m * v
        e2 += o * v
        v = x[s + i]
        a3 += j * v
        b3 += k * v
        c3 += m * v
        e3 += o * v
    return (a0, b0, c0, e0), (a1, b1, c1, e1), (a2, b2, c2, e2), (a3, b3, c3, e3)


@_inner
def _four_by_two(w, at, step, x, p, q, n):
    """Four rows of a weight times two vectors."""
    a0 = a1 = b0 = b1 = c0 = c1 = e0 = e1 = np.float32(0.0)
    second, third, fourth = at + step, at + 2 * step, at + 3 * step
    for i in range(n):
        j, k, m, o = load(w, at + i), load(w, second + i), load(w, third + i), load(w, fourth + i)
        v = x[p + i]
        a0 += j * v
        b0 += k * v
        c0 += m * v
        e0 += o * v
        v = x[q + i]
        a1 += j * v
        b1 += k * v
        c1 += m * v
        e1 += o * v
    return (a0, b0, c0, e0), (a1, b1, c1, e1)


@_inner
def _put(y, to, quarter, four):
    y[to], y[to + quarter], y[to + 2 * quarter], y[to + 3 * quarter] = four


@_inner
def _four_by_one(w, at, step, x, p, n):
    a = b = c = e = np.float32(0.0)
    second, third, fourth = at + step, at + 2 * step, at + 3 * step
    for i in range(n):
        v = x[p + i]
        a += load(w, at + i) * v
        b += load(w, second + i) * v
        c += load(w, third + i) * v
        e += load(w, fourth + i) * v
    return a, b, c, e


@_inner
def matrix(w, scale, first, rows, x, n, chosen, count, y, stride, blocked):
    """y[k, :rows] = rows of a weight from ``first`` on, times the vectors ``x[chosen[k]]``.

    Args:
        scale: address of a float32 factor for each of the weight's rows, or 0.
        x: vectors of length n, one after the other. stride: from one result to the next in y.
        blocked: several vectors at a time. Faster from about eight on, but then a vector's sums
            depend on how many there are; without it they are those of the vector alone, to the bit.
    """
    quarter = rows // 4
    step = quarter * n
    for i in range(quarter):
        at = (first + i) * n
        if i + AHEAD < quarter:
            for k in range(4):
                _fetch(w, at + AHEAD * n + k * step, n)
        k = 0
        while blocked and k + 4 <= count:
            p, q, r, s = _four_by_four(
                w, at, step, x, chosen[k] * n, chosen[k + 1] * n, chosen[k + 2] * n,
                chosen[k + 3] * n, n,
            )  # fmt: skip
            _put(y, k * stride + i, quarter, p)
            _put(y, (k + 1) * stride + i, quarter, q)
            _put(y, (k + 2) * stride + i, quarter, r)
            _put(y, (k + 3) * stride + i, quarter, s)
            k += 4
        if blocked and k + 2 <= count:
            p, q = _four_by_two(w, at, step, x, chosen[k] * n, chosen[k + 1] * n, n)
            _put(y, k * stride + i, quarter, p)
            _put(y, (k + 1) * stride + i, quarter, q)
            k += 2
        while k < count:
            _put(y, k * stride + i, quarter, _four_by_one(w, at, step, x, chosen[k] * n, n))
            k += 1
    for i in range(4 * quarter, rows):
        for k in range(count):
            total = np.float32(0.0)
            at, to = (first + i) * n, chosen[k] * n
            for j in range(n):
                total += load(w, at + j) * x[to + j]
            y[k * stride + i] = total
    if scale != 0:
        factor = f32_at(scale)
        for k in range(count):
            for i in range(rows):
                y[k * stride + i] *= factor[first + i]
