"""Products of a weight's rows with a float32 vector, for other kernels to inline."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gateskip.kernels.numeric import FAST, load

__all__ = ["dot", "matvec"]

_inner: Any = njit(fastmath=FAST, error_model="numpy")


@_inner
def dot(w, at, x, n):
    """Row of a weight times a float32 vector."""
    total = np.float32(0.0)
    for i in range(n):
        total += load(w, at + i) * x[i]
    return total


@_inner
def _four_dots(w, at, step, x, n):
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
            _four_dots(w, (first + i) * n, quarter * n, x, n)
        )
    for i in range(4 * quarter, rows):
        y[to + i] = dot(w, (first + i) * n, x, n)
