"""A few new tokens of every row through all layers (decoding, and the check of drafted tokens).

Shapes: L layers, B rows of the batch, T new tokens of each, R = B·T tokens, H hidden, I inner
width, A query heads, K key/value heads, D head width, S cached and new keys, N tokens that a branch
keeps.

Every weight is read once for all tokens that keep its branch, and not at all where none does. What
a branch needs of its tokens (decision, norm, gate) is done by a share of the threads for each
token, the products by a share of the weights' rows. A token sees the keys up to its own. Products
and sums are float32; what other code sees has the model's dtype.
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
    f32_at,
    f64_at,
    i8_at,
    i64_at,
    like,
    load,
    rounded,
    sigmoid,
    store,
    team,
)
from gateskip.kernels.pool import Kernel
from gateskip.kernels.products import dot, matrix
from gateskip.kernels.token import attend_head, turn_head

__all__ = ["CHUNK", "STACK", "STACK_I8", "WORDS"]

_jit: Any = njit(fastmath=FAST, error_model="numpy", cache=True)
_inner: Any = njit(fastmath=FAST, error_model="numpy")
_kernel: Any = cfunc(ARGUMENTS, cache=True)

CHUNK = 384  # output channels at a time: long streams load faster
ALONE = 6  # rows of a batch up to which a row's sums do not depend on the others

#: Arguments after the team's addresses, in order. Strides are in elements; pointers are addresses.
WORDS = (
    "table", "layers", "columns",  # [L, 3, columns]: kernels/token.py says what is where
    "rows", "new",  # R and T
    "x", "between",  # the stream [R, H] before and after an attention; the result is in x
    "u", "v", "g",  # float32 [R, H] normed input; [R, H] inner of gate or compensation; [R]
    "flags", "thresholds", "threshold_stride",  # int64 [L, 2, R]; float64 [L, 2, R or 1]; 1 or 0
    "q", "scores", "attended", "act",  # float32 [R, A·D], [threads, S], [R, A·D], [R, I]
    "y", "y_stride", "lists",  # float32 [threads, R·max(D, 2·CHUNK)]; int64 [threads, 2, R]
    "cos", "sin", "table_stride",  # [R or 1, D]
    "cache", "row_stride", "head_stride", "key_stride",  # int64 [L, 2] addresses
    "place",  # of the first new key
    "mask", "mask_stride",  # float32 [R or 1, S] addends, or 0
)  # fmt: skip
(TABLE, LAYERS, COLUMNS, ROWS, NEW, X, BETWEEN, U, V, G, FLAGS, THRESHOLDS, THRESHOLD_STRIDE, Q,
 SCORES, ATTENDED, ACT, Y, Y_STRIDE, LISTS, COS, SIN, TABLE_STRIDE, CACHE, ROW_STRIDE, HEAD_STRIDE,
 KEY_STRIDE, PLACE, MASK, MASK_STRIDE) = range(3, 3 + len(WORDS))  # fmt: skip


@_inner
def _prepare(d, c, kind, source, branch, always, thread, threads):
    """Decision, norm and gate of this thread's rows. always: u of skipped rows, too."""
    hidden, rows, width = c[20], d[ROWS], c[15]
    h, w, gamma = like(source, kind), f32_at(c[5]), like(c[9], kind)
    shift, eps = np.float32(double_of(c[6])), np.float32(double_of(c[7]))
    a, gate_b, gate_c, g = f32_at(c[12]), f32_at(c[13]), f32_at(c[14]), f32_at(d[G])
    comp_a, rank = like(c[16], kind), c[19]
    flags = i64_at(d[FLAGS] + branch * rows * 8)
    step = d[THRESHOLD_STRIDE]
    thresholds = f64_at(d[THRESHOLDS] + branch * (rows if step else 1) * 8)
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        base = row * hidden
        u, v = f32_at(d[U] + base * 4), f32_at(d[V] + base * 4)
        total = np.float32(0.0)
        square = np.float32(0.0)
        for i in range(hidden):
            x = load(h, base + i)
            total += x * w[i]
            square += x * x
        inverse = np.float32(1.0) / np.sqrt(square / np.float32(hidden) + eps)
        kept = total * inverse + shift >= np.float32(thresholds[row * step])
        flags[row] = 1 if kept else 0
        if kept or always or c[16] != 0:
            for i in range(hidden):
                u[i] = rounded(h, rounded(h, load(h, base + i) * inverse) * load(gamma, i))
        if kept:
            if c[21] != 0:  # one logit for all channels
                g[row] = sigmoid(dot(gate_b, 0, u, width) + gate_c[0])
            elif c[12] != 0:
                for r in range(width):
                    v[r] = dot(a, r * hidden, u, hidden)
        elif c[16] != 0:
            for r in range(rank):
                v[r] = dot(comp_a, r * hidden, u, hidden)


@_inner
def _kept(d, branch, thread):
    """(list of kept rows, how many) in this thread's own memory."""
    flags = i64_at(d[FLAGS] + branch * d[ROWS] * 8)
    chosen = i64_at(d[LISTS] + thread * 2 * d[ROWS] * 8)
    count = 0
    for row in range(d[ROWS]):
        if flags[row] != 0:
            chosen[count] = row
            count += 1
    return chosen, count


@_inner
def _blocked(d):
    """Not for a few rows: whether a token comes alone or as one of several that are checked, and
    beside whom, its sums are the same to the bit."""
    return d[ROWS] // d[NEW] > ALONE


@_inner
def _join(d, c, kind, weight, source, target, w, bias, scale, x, n, branch, thread, threads):
    """target = source + g ⊙ (W·x + bias), or the compensation; this thread's share of channels."""
    hidden, rows, width, rank = c[20], d[ROWS], c[15], c[19]
    h, out = like(source, kind), like(target, kind)
    chosen, count = _kept(d, branch, thread)
    at = d[Y] + thread * d[Y_STRIDE] * 4
    y, g, gate_b, gate_c = f32_at(at), f32_at(d[G]), f32_at(c[13]), f32_at(c[14])
    begin, end = hidden * thread // threads, hidden * (thread + 1) // threads
    for first in range(begin, end if count else begin, CHUNK):
        wide = min(CHUNK, end - first)
        matrix(like(w, weight), scale, first, wide, x, n, chosen, count, y, CHUNK, _blocked(d))
        for k in range(count):
            row = chosen[k]
            base = row * hidden + first
            value = g[row]
            inner = f32_at((d[V] if c[12] != 0 else d[U]) + row * hidden * 4)
            for i in range(wide):
                o = y[k * CHUNK + i]
                if bias != 0:
                    o += load(like(bias, kind), first + i)
                if c[21] == 0:
                    z = dot(gate_b, (first + i) * width, inner, width) + gate_c[first + i]
                    value = sigmoid(z)
                store(out, base + i, load(h, base + i) + value * rounded(h, o))
    if count == rows:
        return
    flags = i64_at(d[FLAGS] + branch * rows * 8)
    comp_b, comp_c = like(c[17], kind), like(c[18], kind)
    for row in range(rows):
        if flags[row] == 0:
            base = row * hidden
            v = f32_at(d[V] + base * 4)
            for i in range(begin, end):
                value = load(h, base + i)
                if c[18] != 0:
                    add = load(comp_c, i)
                    if c[16] != 0:
                        add += dot(comp_b, i * rank, v, rank)
                    value += add
                store(out, base + i, value)


@_inner
def _head(d, kind, weight, w, bias, scale, head, c, chosen, count, gamma, turned, at):
    """One head's projection of some rows, its norm and rotary embedding, float32 at ``at``."""
    hidden, width, eps = c[20], c[29], np.float32(double_of(c[34]))
    first = head * width
    matrix(like(w, weight), scale, first, width, f32_at(d[U]), hidden, chosen, count, f32_at(at),
           width, _blocked(d))  # fmt: skip
    for k in range(count):
        table = chosen[k] * d[TABLE_STRIDE] * element_bytes(kind)
        turn_head(kind, f32_at(at + k * width * 4), bias, first, width, gamma, eps,
                  d[COS] + table if turned else 0, d[SIN] + table)  # fmt: skip


@_inner
def _project(d, c, kind, weight, layer, thread, threads):
    """Queries of kept rows, keys and values of all: this thread's share of heads."""
    rows, heads, kv, width = d[ROWS], c[27], c[28], c[29]
    q, at = f32_at(d[Q]), d[Y] + thread * d[Y_STRIDE] * 4
    y = f32_at(at)
    chosen, count = _kept(d, 2 * layer, thread)
    everyone = i64_at(d[LISTS] + (thread * 2 + 1) * rows * 8)
    for row in range(rows):
        everyone[row] = row
    total = heads * count + 2 * kv * rows
    begin, end = total * thread // threads, total * (thread + 1) // threads
    cost = 0
    for head in range(heads if count else 0):
        if begin <= cost < end:
            _head(d, kind, weight, c[21], c[22], c[39], head, c, chosen, count, c[32], True, at)
            for k in range(count):
                to = (chosen[k] * heads + head) * width
                for i in range(width):
                    q[to + i] = rounded(like(c[9], kind), y[k * width + i])
        cost += count
    for which in range(2):
        out = like(i64_at(d[CACHE])[2 * layer + which], kind)
        w, bias, scale = (c[23], c[24], c[40]) if which == 0 else (c[25], c[26], c[41])
        for head in range(kv):
            if begin <= cost < end:
                gamma = c[33] if which == 0 else 0
                _head(d, kind, weight, w, bias, scale, head, c, everyone, rows, gamma, which == 0,
                      at)  # fmt: skip
                for row in range(rows):
                    place = d[PLACE] + row % d[NEW]
                    to = row // d[NEW] * d[ROW_STRIDE]
                    to += head * d[HEAD_STRIDE] + place * d[KEY_STRIDE]
                    for i in range(width):
                        store(out, to + i, y[row * width + i])
            cost += rows


@_inner
def _attend(d, c, kind, layer, thread, threads):
    """Attention of kept rows: this thread's share of their heads."""
    heads, group, width = c[26], c[27], c[28]
    chosen, count = _kept(d, 2 * layer, thread)
    scale, size = np.float32(double_of(c[33])), element_bytes(kind)
    cache = i64_at(d[CACHE])
    scores = f32_at(d[SCORES] + thread * (d[PLACE] + d[NEW]) * 4)
    units = count * heads
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        row, head = chosen[unit // heads], unit % heads
        keys = d[PLACE] + row % d[NEW] + 1
        offset = (row // d[NEW] * d[ROW_STRIDE] + head // group * d[HEAD_STRIDE]) * size
        at = (row * heads + head) * width * 4
        mask = d[MASK] + row * d[MASK_STRIDE] * 4 if d[MASK] != 0 else 0
        attend_head(kind, f32_at(d[Q] + at), like(cache[2 * layer] + offset, kind),
                    like(cache[2 * layer + 1] + offset, kind), keys, width, d[KEY_STRIDE],
                    d[KEY_STRIDE], scale, mask, scores, f32_at(d[ATTENDED] + at))  # fmt: skip


@_inner
def _inside(d, c, kind, weight, branch, thread, threads):
    """silu(gate) ⊙ up of kept rows: this thread's share of the inner width."""
    hidden, inner, rows = c[20], c[25], d[ROWS]
    chosen, count = _kept(d, branch, thread)
    begin, end = inner * thread // threads, inner * (thread + 1) // threads
    at = d[Y] + thread * d[Y_STRIDE] * 4
    y, z, u, act = f32_at(at), f32_at(at + rows * CHUNK * 4), f32_at(d[U]), f32_at(d[ACT])
    for first in range(begin, end if count else begin, CHUNK):
        wide = min(CHUNK, end - first)
        matrix(like(c[22], weight), c[27], first, wide, u, hidden, chosen, count, y, CHUNK,
               _blocked(d))  # fmt: skip
        matrix(like(c[23], weight), c[28], first, wide, u, hidden, chosen, count, z, CHUNK,
               _blocked(d))  # fmt: skip
        for k in range(count):
            to = chosen[k] * inner + first
            for i in range(wide):
                x = y[k * CHUNK + i]
                act[to + i] = x * sigmoid(x) * z[k * CHUNK + i]


@_jit
def _stack(d, kind, weight):
    thread, threads = team(d)
    row = d[COLUMNS] * 8
    for layer in range(d[LAYERS]):
        project = i64_at(d[TABLE] + 3 * layer * row)
        attend = i64_at(d[TABLE] + (3 * layer + 1) * row)
        mlp = i64_at(d[TABLE] + (3 * layer + 2) * row)
        _prepare(d, attend, kind, d[X], 2 * layer, True, thread, threads)
        barrier(d, threads)
        _project(d, project, kind, weight, layer, thread, threads)
        barrier(d, threads)
        _attend(d, attend, kind, layer, thread, threads)
        barrier(d, threads)
        _join(d, attend, kind, weight, d[X], d[BETWEEN], attend[37], attend[38], attend[39],
              f32_at(d[ATTENDED]), attend[26] * attend[28], 2 * layer, thread, threads)  # fmt: skip
        barrier(d, threads)
        _prepare(d, mlp, kind, d[BETWEEN], 2 * layer + 1, False, thread, threads)
        barrier(d, threads)
        _inside(d, mlp, kind, weight, 2 * layer + 1, thread, threads)
        barrier(d, threads)
        _join(d, mlp, kind, weight, d[BETWEEN], d[X], mlp[24], 0, mlp[29], f32_at(d[ACT]), mlp[25],
              2 * layer + 1, thread, threads)  # fmt: skip
        barrier(d, threads)


@_kernel
def _stack_bf16(d):
    _stack(d, bf16_at(0), bf16_at(0))


@_kernel
def _stack_f32(d):
    _stack(d, f32_at(0), f32_at(0))


@_kernel
def _stack_bf16_i8(d):
    _stack(d, bf16_at(0), i8_at(0))


@_kernel
def _stack_f32_i8(d):
    _stack(d, f32_at(0), i8_at(0))


STACK = Kernel(_stack_bf16, _stack_f32)
STACK_I8 = Kernel(_stack_bf16_i8, _stack_f32_i8)
