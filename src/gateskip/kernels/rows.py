"""Row kernels of prefill: score, normalise, join, add; each one pass over its rows.

Shapes: N rows of a flat stream, M selected rows, H hidden, G gate channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import cfunc, njit
from torch import Tensor

from gateskip.kernels import real, scratch
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
    sigmoid,
    store,
    team,
)
from gateskip.kernels.pool import Kernel, integers
from gateskip.kernels.products import matrix
from gateskip.kernels.products import matvec as matvec_rows

__all__ = [
    "add_rows_",
    "join_rows",
    "matmul",
    "matvec",
    "norm_rows",
    "score_rows",
    "swiglu_",
]

_jit: Any = njit(fastmath=FAST, error_model="numpy", cache=True)
_kernel: Any = cfunc(ARGUMENTS, cache=True)


@_jit
def _score(d, kind):
    thread, threads = team(d)
    h, w, s, r = like(d[3], kind), f32_at(d[4]), f32_at(d[5]), f32_at(d[6])
    n, hidden = d[7], d[8]
    shift, eps = np.float32(double_of(d[9])), np.float32(double_of(d[10]))
    for row in range(n * thread // threads, n * (thread + 1) // threads):
        base = row * hidden
        dot = np.float32(0.0)
        square = np.float32(0.0)
        for i in range(hidden):
            x = load(h, base + i)
            dot += x * w[i]
            square += x * x
        inverse = np.float32(1.0) / np.sqrt(square / np.float32(hidden) + eps)
        r[row] = inverse
        s[row] = dot * inverse + shift


@_kernel
def _score_bf16(d):
    _score(d, bf16_at(0))


@_kernel
def _score_f32(d):
    _score(d, f32_at(0))


@_jit
def _norm(d, kind):
    thread, threads = team(d)
    h, r, gamma, u = like(d[3], kind), f32_at(d[4]), like(d[5], kind), like(d[6], kind)
    index, m, hidden = i64_at(d[7]), d[8], d[9]
    chosen = d[7] != 0
    for row in range(m * thread // threads, m * (thread + 1) // threads):
        source = index[row] if chosen else row
        inverse = r[source]
        for i in range(hidden):
            # As the families' norms round: once before the weight, once after it.
            x = rounded(u, load(h, source * hidden + i) * inverse)
            store(u, row * hidden + i, x * load(gamma, i))


@_kernel
def _norm_bf16(d):
    _norm(d, bf16_at(0))


@_kernel
def _norm_f32(d):
    _norm(d, f32_at(0))


@_jit
def _join(d, kind):
    thread, threads = team(d)
    out, h, o = like(d[3], kind), like(d[4], kind), like(d[5], kind)
    index, m, hidden = i64_at(d[6]), d[7], d[8]
    u, w, shift = like(d[9], kind), f32_at(d[10]), np.float32(double_of(d[11]))
    z, score, scale = f32_at(d[12]), f32_at(d[13]), np.float32(double_of(d[14]))
    chosen, one, known = d[6] != 0, d[12] == 0, d[13] != 0
    for row in range(m * thread // threads, m * (thread + 1) // threads):
        target = index[row] if chosen else row
        at, to = row * hidden, target * hidden
        if one:
            dot = np.float32(0.0)
            if known:
                dot = score[target] * scale
            else:
                for i in range(hidden):
                    dot += load(u, at + i) * w[i]
            g = sigmoid(dot + shift)
            for i in range(hidden):
                store(out, to + i, load(h, to + i) + g * load(o, at + i))
        else:
            for i in range(hidden):
                store(out, to + i, load(h, to + i) + sigmoid(z[at + i]) * load(o, at + i))


@_kernel
def _join_bf16(d):
    _join(d, bf16_at(0))


@_kernel
def _join_f32(d):
    _join(d, f32_at(0))


@_jit
def _add(d, kind):
    thread, threads = team(d)
    out, c, bias = like(d[3], kind), like(d[4], kind), like(d[5], kind)
    index, m, hidden = i64_at(d[6]), d[7], d[8]
    for row in range(m * thread // threads, m * (thread + 1) // threads):
        at, to = row * hidden, index[row] * hidden
        if d[4] == 0:
            for i in range(hidden):
                store(out, to + i, load(out, to + i) + load(bias, i))
        else:
            for i in range(hidden):
                store(out, to + i, load(out, to + i) + (load(c, at + i) + load(bias, i)))


@_kernel
def _add_bf16(d):
    _add(d, bf16_at(0))


@_kernel
def _add_f32(d):
    _add(d, f32_at(0))


@_jit
def _swiglu(d, kind):
    thread, threads = team(d)
    a, b, n = like(d[3], kind), like(d[4], kind), d[5]
    for i in range(n * thread // threads, n * (thread + 1) // threads):
        x = load(a, i)
        store(a, i, rounded(a, x * sigmoid(x)) * load(b, i))


@_kernel
def _swiglu_bf16(d):
    _swiglu(d, bf16_at(0))


@_kernel
def _swiglu_f32(d):
    _swiglu(d, f32_at(0))


@_jit
def _product(d, kind):
    # 3 W [R, N], 4 x [N], 5 y [R], 6 R, 7 N, 8 x and 9 y in float32
    thread, threads = team(d)
    x, y, rows, n = like(d[4], kind), like(d[5], kind), d[6], d[7]
    begin, end = rows * thread // threads, rows * (thread + 1) // threads
    # Every thread converts all of x: what it writes is what the others write.
    wide, out = f32_at(d[8] + thread * n * 4), f32_at(d[9])
    for i in range(n):
        wide[i] = load(x, i)
    matvec_rows(like(d[3], kind), begin, end - begin, wide, n, out, begin)
    for i in range(begin, end):
        store(y, i, out[i])


@_kernel
def _product_bf16(d):
    _product(d, bf16_at(0))


@_kernel
def _product_f32(d):
    _product(d, f32_at(0))


@_jit
def _products(d, kind):
    # 3 W [R, N], 4 x [M, N], 5 y [M, R], 6 R, 7 N, 8 x and 9 y in float32, 10 M, 11 0 to M − 1
    thread, threads = team(d)
    x, y, rows, n, m = like(d[4], kind), like(d[5], kind), d[6], d[7], d[10]
    begin, end = rows * thread // threads, rows * (thread + 1) // threads
    wide = f32_at(d[8] + thread * m * n * 4)
    for i in range(m * n):
        wide[i] = load(x, i)
    out = f32_at(d[9])
    matrix(like(d[3], kind), 0, begin, end - begin, wide, n, i64_at(d[11]), m,
           f32_at(d[9] + begin * 4), rows, False)  # fmt: skip
    for k in range(m):
        for i in range(k * rows + begin, k * rows + end):
            store(y, i, out[i])


@_kernel
def _products_bf16(d):
    _products(d, bf16_at(0))


@_kernel
def _products_f32(d):
    _products(d, f32_at(0))


PRODUCT = Kernel(_product_bf16, _product_f32)
PRODUCTS = Kernel(_products_bf16, _products_f32)
SWIGLU = Kernel(_swiglu_bf16, _swiglu_f32)
SCORE = Kernel(_score_bf16, _score_f32)
NORM = Kernel(_norm_bf16, _norm_f32)
JOIN = Kernel(_join_bf16, _join_f32)
ADD = Kernel(_add_bf16, _add_f32)
ROWS_PER_THREAD = 8


def _work(rows: int) -> int:
    return max(rows // ROWS_PER_THREAD, 1)


def score_rows(h_NH: Tensor, w_H: Tensor, shift: float, eps: float) -> tuple[Tensor, Tensor]:
    """(w·h / rms(h) + shift, 1 / rms(h)) of every row, float32 ``[N]`` each.

    Args:
        h_NH: bfloat16 or float32. w_H: float32, the norm's weight multiplied in.
    """
    n, hidden = h_NH.shape
    score_N, inverse_N = torch.empty(2, n, dtype=torch.float32).unbind()
    arguments = integers(
        h_NH.data_ptr(), w_H.data_ptr(), score_N.data_ptr(), inverse_N.data_ptr(),
        n, hidden, real(shift), real(eps),
    )  # fmt: skip
    SCORE(h_NH.dtype, arguments, work=_work(n))
    return score_N, inverse_N


def norm_rows(
    h_NH: Tensor, inverse_N: Tensor, gamma_H: Tensor, index_M: Tensor | None, rows: int
) -> Tensor:
    """gamma ⊙ h / rms(h) of the rows at ``index_M`` (None: all) in h's dtype, ``[rows, H]``.

    Args:
        rows: at least M; rows from M on are zero.
    """
    m = h_NH.shape[0] if index_M is None else index_M.shape[0]
    u_MH = h_NH.new_empty(rows, h_NH.shape[1])
    u_MH[m:].zero_()
    arguments = integers(
        h_NH.data_ptr(), inverse_N.data_ptr(), gamma_H.data_ptr(), u_MH.data_ptr(),
        0 if index_M is None else index_M.data_ptr(), m, h_NH.shape[1],
    )  # fmt: skip
    NORM(h_NH.dtype, arguments, work=_work(m))
    return u_MH


def join_rows(
    out_NH: Tensor,
    h_NH: Tensor,
    o_MH: Tensor,
    index_M: Tensor | None,
    *,
    one: tuple[Tensor, Tensor, float] | None = None,
    logits_MH: Tensor | None = None,
    scored: tuple[Tensor, float, float] | None = None,
) -> None:
    """out[index] = h[index] + σ(z) ⊙ o, in float32 inside; ``out_NH`` may be ``h_NH``.

    Args:
        one: (u [M, H], w [H] float32, b) where all channels have the logit w·u + b.
        scored: (score [N] float32, a, b) where all channels have the logit a·score + b.
        logits_MH: else z per channel, float32.
    """
    u = w = score = 0
    shift = scale = 0.0
    if scored is not None:
        score, scale, shift = scored[0].data_ptr(), scored[1], scored[2]
    elif one is not None:
        u, w, shift = one[0].data_ptr(), one[1].data_ptr(), one[2]
    m, hidden = o_MH.shape
    arguments = integers(
        out_NH.data_ptr(), h_NH.data_ptr(), o_MH.data_ptr(),
        0 if index_M is None else index_M.data_ptr(), m, hidden, u, w, real(shift),
        0 if logits_MH is None else logits_MH.data_ptr(), score, real(scale),
    )  # fmt: skip
    JOIN(out_NH.dtype, arguments, work=_work(m))


def add_rows_(out_NH: Tensor, c_MH: Tensor | None, bias_H: Tensor, index_M: Tensor) -> None:
    """out[index] += c + bias, in place; all of one dtype, c contiguous or None for 0."""
    arguments = integers(
        out_NH.data_ptr(), 0 if c_MH is None else c_MH.data_ptr(), bias_H.data_ptr(),
        index_M.data_ptr(), index_M.shape[0], out_NH.shape[1],
    )  # fmt: skip
    ADD(out_NH.dtype, arguments, work=_work(index_M.shape[0]))


def matvec(weight_RN: Tensor, x_N: Tensor) -> Tensor:
    """W·x in x's dtype ``[R]``, summed in float32."""
    rows, n = weight_RN.shape
    y_R = x_N.new_empty(rows)
    threads = max(torch.get_num_threads(), 1)
    wide, out = scratch(threads * n + rows).split((threads * n, rows))
    arguments = integers(
        weight_RN.data_ptr(), x_N.data_ptr(), y_R.data_ptr(), rows, n, wide.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    PRODUCT(x_N.dtype, arguments, work=_work(rows))
    return y_R


def matmul(weight_RN: Tensor, x_MN: Tensor) -> Tensor:
    """x·Wᵀ of a few rows in x's dtype ``[M, R]``, summed in float32; W is read once."""
    rows, n = weight_RN.shape
    m = x_MN.shape[0]
    y_MR = x_MN.new_empty(m, rows)
    threads = max(torch.get_num_threads(), 1)
    sizes = threads * m * n, m * rows
    wide, out = scratch(sum(sizes)).split(sizes)
    order = np.arange(m, dtype=np.int64)
    arguments = integers(
        weight_RN.data_ptr(), x_MN.data_ptr(), y_MR.data_ptr(), rows, n, wide.data_ptr(),
        out.data_ptr(), m, order.ctypes.data,
    )  # fmt: skip
    PRODUCTS(x_MN.dtype, arguments, work=_work(rows))
    return y_MR


def swiglu_(gate_MI: Tensor, up_MI: Tensor) -> Tensor:
    """silu(gate) ⊙ up, written over ``gate_MI``."""
    SWIGLU(
        gate_MI.dtype,
        integers(gate_MI.data_ptr(), up_MI.data_ptr(), gate_MI.numel()),
        work=_work(gate_MI.shape[0]),
    )
    return gate_MI
