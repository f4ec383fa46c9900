"""One token through one branch: decision, norm, projections, attention, join (batch-1 decoding).

Shapes: H hidden, I inner width, A query heads, K key/value heads, D head width, S cached keys.

Decoding reads every weight once, so each kernel is a matrix-vector product at the memory's speed
with everything around it folded in. A branch that is skipped reads nothing of its weights but what
keys and values need. Products and sums are float32; what other code sees has the model's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit

from gateskip.kernels.numeric import (
    ARGUMENTS,
    FAST,
    barrier,
    bf16_at,
    double_of,
    element_bytes,
    exp,
    f32_at,
    i64_at,
    like,
    load,
    rounded,
    sigmoid,
    store,
    team,
)
from gateskip.kernels.pool import Kernel
from gateskip.kernels.products import dot as _dot
from gateskip.kernels.products import four_dots
from gateskip.kernels.products import matvec as _matvec

__all__ = ["ATTEND", "MLP", "PROJECT", "attend_head", "turn_head"]

_jit: Any = njit(fastmath=FAST, error_model="numpy", cache=True)
_inner: Any = njit(fastmath=FAST, error_model="numpy")
_kernel: Any = cfunc(ARGUMENTS, cache=True)

# Arguments 3 to 20 are the same in all kernels: 3 h, 4 out, 5 score_w, 6 score_b, 7 eps,
# 8 threshold, 9 gamma, 10 kept, 11 scratch, 12 gate_a, 13 gate_b, 14 gate_c, 15 gate_width,
# 16 comp_a, 17 comp_b, 18 comp_c, 19 comp_rank, 20 hidden.


@_inner
def _decide(d, kind):
    """(kept, 1 / rms(h)) of the token."""
    h, w, hidden = like(d[3], kind), f32_at(d[5]), d[20]
    dot = np.float32(0.0)
    square = np.float32(0.0)
    for i in range(hidden):
        x = load(h, i)
        dot += x * w[i]
        square += x * x
    inverse = np.float32(1.0) / np.sqrt(square / np.float32(hidden) + np.float32(double_of(d[7])))
    score = dot * inverse + np.float32(double_of(d[6]))
    return score >= np.float32(double_of(d[8])), inverse


@_inner
def _norm(d, kind, inverse, u):
    """The branch's input, in float32 with the roundings of the family's norm."""
    h, gamma = like(d[3], kind), like(d[9], kind)
    for i in range(d[20]):
        u[i] = rounded(h, rounded(h, load(h, i) * inverse) * load(gamma, i))


@_inner
def _gate_input(d, u, v):
    """What the gate's last matrix is applied to: u, or A·u of a low-rank gate, in ``v``."""
    a, hidden, width = f32_at(d[12]), d[20], d[15]
    if d[12] != 0:
        for r in range(width):
            v[r] = _dot(a, r * hidden, u, hidden)
    else:
        for i in range(width):
            v[i] = u[i]


@_inner
def _gate_value(d, v, row):
    """g of one channel."""
    b, c, width = f32_at(d[13]), f32_at(d[14]), d[15]
    return sigmoid(_dot(b, row * width, v, width) + c[row])


@_inner
def _skip(d, kind, u, v, thread, threads):
    """out = h, plus the compensation of a skipped branch."""
    h, out, hidden, rank = like(d[3], kind), like(d[4], kind), d[20], d[19]
    a, b, c = like(d[16], kind), like(d[17], kind), like(d[18], kind)
    if d[16] != 0:
        for r in range(rank):
            v[r] = _dot(a, r * hidden, u, hidden)
    for i in range(hidden * thread // threads, hidden * (thread + 1) // threads):
        x = load(h, i)
        if d[18] != 0:
            add = load(c, i)
            if d[16] != 0:
                add += _dot(b, i * rank, v, rank)
            x += add
        store(out, i, x)


@_inner
def _join(d, kind, w, bias, x, n, u, v, alike, thread, threads):
    """out = h + g ⊙ (W·x + bias) for this thread's share of rows."""
    h, out, hidden = like(d[3], kind), like(d[4], kind), d[20]
    g = np.float32(0.0)
    if alike:
        g = _gate_value(d, v, 0)
    begin, end = hidden * thread // threads, hidden * (thread + 1) // threads
    products = f32_at(d[11] + (thread * 3 + 2) * hidden * 4)
    _matvec(w, begin, end - begin, x, n, products, 0)
    for i in range(begin, end):
        o = products[i - begin]
        if bias != 0:
            o += load(like(bias, kind), i)
        value = g if alike else _gate_value(d, v, i)
        store(out, i, load(h, i) + value * rounded(h, o))


@_jit
def _mlp(d, kind):
    # 21 alike, 22 Wg, 23 Wu, 24 Wd, 25 inner width, 26 inner scratch [2, I] float32
    thread, threads = team(d)
    hidden, inner = d[20], d[25]
    kept, inverse = _decide(d, kind)
    scratch = f32_at(d[11] + thread * 3 * hidden * 4)
    u, v = scratch, f32_at(d[11] + (thread * 3 + 1) * hidden * 4)
    if thread == 0:
        i64_at(d[10])[0] = 1 if kept else 0
    if kept or d[16] != 0:
        _norm(d, kind, inverse, u)
    if not kept:
        _skip(d, kind, u, v, thread, threads)
        return
    wg, wu, wd, act = like(d[22], kind), like(d[23], kind), like(d[24], kind), f32_at(d[26])
    begin, end = inner * thread // threads, inner * (thread + 1) // threads
    _matvec(wg, begin, end - begin, u, hidden, act, begin)
    _matvec(wu, begin, end - begin, u, hidden, act, inner + begin)
    for i in range(begin, end):
        act[i] = act[i] * sigmoid(act[i]) * act[inner + i]
    _gate_input(d, u, v)
    barrier(d, threads)
    _join(d, kind, wd, 0, act, inner, u, v, d[21] != 0, thread, threads)


@_kernel
def _mlp_bf16(d):
    _mlp(d, bf16_at(0))


@_kernel
def _mlp_f32(d):
    _mlp(d, f32_at(0))


@_inner
def turn_head(w, y, bias, first, width, gamma, eps, cos, sin):
    """Bias, norm and rotary embedding of one head's projection ``y``, rounded as ``w``'s type."""
    for i in range(width):
        if bias != 0:
            y[i] += load(like(bias, w), first + i)
        y[i] = rounded(w, y[i])
    if gamma != 0:
        g = like(gamma, w)
        square = np.float32(0.0)
        for i in range(width):
            square += y[i] * y[i]
        inverse = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
        for i in range(width):
            y[i] = rounded(w, rounded(w, y[i] * inverse) * load(g, i))
    if cos != 0:
        c, s, half = like(cos, w), like(sin, w), width // 2
        for i in range(half):
            a, b = y[i], y[half + i]
            y[i] = a * load(c, i) - b * load(s, i)
            y[half + i] = b * load(c, half + i) + a * load(s, half + i)


@_inner
def _head(kind, w, bias, first, width, hidden, u, gamma, eps, cos, sin, y):
    """One head's projection, its norm and rotary embedding, in float32."""
    _matvec(w, first, width, u, hidden, y, 0)
    turn_head(w, y, bias, first, width, gamma, eps, cos, sin)


@_jit
def _project(d, kind):
    # 21 Wq, 22 bq, 23 Wk, 24 bk, 25 Wv, 26 bv, 27 query heads, 28 kv heads, 29 head width,
    # 30 cos, 31 sin, 32 q norm, 33 k norm, 34 their eps, 35 q [A, D] float32, 36 k, 37 v,
    # 38 from one of their heads to the next
    thread, threads = team(d)
    hidden = d[20]
    kept, inverse = _decide(d, kind)
    u = f32_at(d[11] + thread * 3 * hidden * 4)
    v = f32_at(d[11] + (thread * 3 + 1) * hidden * 4)
    y = f32_at(d[11] + (thread * 3 + 2) * hidden * 4)
    if thread == 0:
        i64_at(d[10])[0] = 1 if kept else 0
    _norm(d, kind, inverse, u)
    heads, kv, width = d[27], d[28], d[29]
    eps = np.float32(double_of(d[34]))
    begin = 0 if kept else heads
    units = heads + 2 * kv - begin
    q, k, out_v = f32_at(d[35]), like(d[36], kind), like(d[37], kind)
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        head = unit + begin
        if head < heads:
            _head(kind, like(d[21], kind), d[22], head * width, width, hidden, u, d[32], eps,
                  d[30], d[31], y)  # fmt: skip
            for i in range(width):
                q[head * width + i] = rounded(k, y[i])
        elif head < heads + kv:
            head -= heads
            _head(kind, like(d[23], kind), d[24], head * width, width, hidden, u, d[33], eps,
                  d[30], d[31], y)  # fmt: skip
            for i in range(width):
                store(k, head * d[38] + i, y[i])
        else:
            head -= heads + kv
            _head(kind, like(d[25], kind), d[26], head * width, width, hidden, u, 0, eps, 0, 0, y)
            for i in range(width):
                store(out_v, head * d[38] + i, y[i])
    if not kept:
        _skip(d, kind, u, v, thread, threads)


@_kernel
def _project_bf16(d):
    _project(d, bf16_at(0))


@_kernel
def _project_f32(d):
    _project(d, f32_at(0))


@_inner
def attend_head(kind, q, key, value, keys, width, stride_k, stride_v, scale, mask, s, y):
    """Attention of one query head over its keys, in float32."""
    fours = keys // 4 * 4  # four keys at a time: what is loaded of q and y serves all of them
    for j in range(0, fours, 4):
        s[j], s[j + 1], s[j + 2], s[j + 3] = four_dots(key, j * stride_k, stride_k, q, width)
    for j in range(fours, keys):
        s[j] = _dot(key, j * stride_k, q, width)
    top = np.float32(-3.0e38)
    for j in range(keys):
        x = s[j] * scale
        if mask != 0:
            x += f32_at(mask)[j]
        s[j] = x
        top = x if x > top else top
    total = np.float32(0.0)
    for j in range(keys):
        e = exp(s[j] - top)
        s[j] = e
        total += e
    for i in range(width):
        y[i] = np.float32(0.0)
    for j in range(0, fours, 4):
        a, b, c, e, at = s[j], s[j + 1], s[j + 2], s[j + 3], j * stride_v
        for i in range(width):
            y[i] += (
                a * load(value, at + i) + b * load(value, at + stride_v + i)
                + c * load(value, at + 2 * stride_v + i) + e * load(value, at + 3 * stride_v + i)
            )  # fmt: skip
    for j in range(fours, keys):
        p, at = s[j], j * stride_v
        for i in range(width):
            y[i] += p * load(value, at + i)
    for i in range(width):
        y[i] = rounded(value, y[i] / total)


@_jit
def _attend(d, kind):
    # 21 alike, 22 q [A, D], 23 keys, 24 values, 25 S, 26 query heads, 27 groups, 28 head width,
    # 29, 30 strides of keys (head, position), 31, 32 of values, 33 scale, 34 mask [S] or 0,
    # 35 scores [A, S], 36 attended [A, D], 37 Wo, 38 bo
    thread, threads = team(d)
    hidden, heads, width = d[20], d[26], d[28]
    scale = np.float32(double_of(d[33]))
    for head in range(heads * thread // threads, heads * (thread + 1) // threads):
        group = head // d[27]
        key = like(d[23] + group * d[29] * element_bytes(kind), kind)
        value = like(d[24] + group * d[31] * element_bytes(kind), kind)
        attend_head(kind, f32_at(d[22] + head * width * 4), key, value, d[25], width, d[30], d[32],
                     scale, d[34], f32_at(d[35] + head * d[25] * 4),
                     f32_at(d[36] + head * width * 4))  # fmt: skip
    _, inverse = _decide(d, kind)
    u = f32_at(d[11] + thread * 3 * hidden * 4)
    v = f32_at(d[11] + (thread * 3 + 1) * hidden * 4)
    _norm(d, kind, inverse, u)
    _gate_input(d, u, v)
    barrier(d, threads)
    _join(d, kind, like(d[37], kind), d[38], f32_at(d[36]), heads * width, u, v, d[21] != 0, thread,
          threads)  # fmt: skip


@_kernel
def _attend_bf16(d):
    _attend(d, bf16_at(0))


@_kernel
def _attend_f32(d):
    _attend(d, f32_at(0))


MLP = Kernel(_mlp_bf16, _mlp_f32)
PROJECT = Kernel(_project_bf16, _project_f32)
ATTEND = Kernel(_attend_bf16, _attend_f32)
