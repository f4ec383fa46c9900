"""Head kernels of prefill: rotate into place, gather back.

Shapes: R rows, A heads, D head width.
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
    f32_at,
    i64_at,
    like,
    load,
    rounded,
    store,
    team,
)
from gateskip.kernels.pool import Kernel, integers

__all__ = ["gather_heads", "rotate_heads"]

_jit: Any = njit(fastmath=FAST, error_model="numpy", cache=True)
_kernel: Any = cfunc(ARGUMENTS, cache=True)


@_jit
def _rotate(d, kind):
    thread, threads = team(d)
    x, out, cos, sin = like(d[3], kind), like(d[4], kind), like(d[5], kind), like(d[6], kind)
    source, place, token = i64_at(d[7]), i64_at(d[8]), i64_at(d[9])
    rows, heads, width, stride, period = d[10], d[11], d[12], d[13], d[14]
    gamma, eps, normed = like(d[15], kind), np.float32(double_of(d[16])), d[15] != 0
    half = width // 2
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        at = (source[row] if d[7] != 0 else row) * heads * width
        table = (token[row] % period) * width
        for head in range(heads):
            base = at + head * width
            to = place[row] + head * stride
            inverse = np.float32(1.0)
            if normed:
                square = np.float32(0.0)
                for i in range(width):
                    v = load(x, base + i)
                    square += v * v
                inverse = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
            for i in range(half):
                a, b = load(x, base + i), load(x, base + half + i)
                if normed:
                    a = rounded(x, rounded(x, a * inverse) * load(gamma, i))
                    b = rounded(x, rounded(x, b * inverse) * load(gamma, half + i))
                store(out, to + i, a * load(cos, table + i) - b * load(sin, table + i))
                store(
                    out,
                    to + half + i,
                    b * load(cos, table + half + i) + a * load(sin, table + half + i),
                )


@_kernel
def _rotate_bf16(d):
    _rotate(d, bf16_at(0))


@_kernel
def _rotate_f32(d):
    _rotate(d, f32_at(0))


@_jit
def _gather(d, kind):
    thread, threads = team(d)
    x, out, target = like(d[3], kind), like(d[4], kind), i64_at(d[5])
    batch, length, heads, width = d[6], d[7], d[8], d[9]
    stride_b, stride_a, stride_l = d[10], d[11], d[12]
    cells = batch * length
    for cell in range(cells * thread // threads, cells * (thread + 1) // threads):
        row = target[cell]
        if row >= 0:
            b, place = cell // length, cell % length
            for head in range(heads):
                at = b * stride_b + head * stride_a + place * stride_l
                to = (row * heads + head) * width
                for i in range(width):
                    out[to + i] = x[at + i]


@_kernel
def _gather_bf16(d):
    _gather(d, bf16_at(0))


@_kernel
def _gather_f32(d):
    _gather(d, f32_at(0))


ROTATE = Kernel(_rotate_bf16, _rotate_f32)
GATHER = Kernel(_gather_bf16, _gather_f32)
ROWS_PER_THREAD = 8


def rotate_heads(
    x_NE: Tensor,
    out: Tensor,
    tables: tuple[Tensor, Tensor],
    *,
    source_R: Tensor | None,
    place_R: Tensor,
    token_R: Tensor,
    heads: int,
    stride: int,
    norm: tuple[Tensor, float] | None = None,
) -> None:
    """Rotary position embedding (by halves) of projected heads, written where they are needed.

    Args:
        x_NE: projections ``[N, A·D]``. out: contiguous, of x's dtype.
        tables: cos and sin ``[P, D]``; the row of token n is n % P.
        source_R: row of x for every output row (None: in order).
        place_R: offset of the row's first head in ``out``. token_R: flat token index of the row.
        heads: A; from one head to the next it is ``stride`` in ``out``.
        norm: (weight, eps) of an RMS norm over each head.
    """
    cos, sin = tables
    rows, width = place_R.shape[0], x_NE.shape[1] // heads
    gamma, eps = (0, 0.0) if norm is None else (norm[0].data_ptr(), norm[1])
    arguments = integers(
        x_NE.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        0 if source_R is None else source_R.data_ptr(), place_R.data_ptr(), token_R.data_ptr(),
        rows, heads, width, stride, cos.shape[0], gamma, real(eps),
    )  # fmt: skip
    ROTATE(x_NE.dtype, arguments, work=max(rows // ROWS_PER_THREAD, 1))


def gather_heads(x_BALD: Tensor, out_NE: Tensor, target_BL: Tensor) -> None:
    """Attention output of a grid back to rows ``[N, A·D]``.

    Args:
        x_BALD: D contiguous, other strides free.
        out_NE: written in place. target_BL: row of ``out`` per grid cell, −1 to drop it.
    """
    batch, heads, length, width = x_BALD.shape
    stride_b, stride_a, stride_l, one = x_BALD.stride()
    assert one == 1
    arguments = integers(
        x_BALD.data_ptr(), out_NE.data_ptr(), target_BL.data_ptr(),
        batch, length, heads, width, stride_b, stride_a, stride_l,
    )  # fmt: skip
    GATHER(x_BALD.dtype, arguments, work=max(target_BL.numel() // ROWS_PER_THREAD, 1))
