"""One new token of each row through a layer on a GPU: six Triton kernels, no host read.

Shapes: B rows, BP rows padded to 1 or 16, H hidden, I inner width, A query heads, K key/value
heads, D head width, R width of a gate's inner vector, C rank of a compensation, S keys.

Decisions stay on the device. Every program of a kernel decides for itself (a norm and a dot product
of what is cached on the chip anyway) and returns before it reads a weight that no row needs: what
is skipped is not read. Nothing depends on a number that the host would have to know, so a step can
be captured as a CUDA graph. Sums are float32; what other code sees has the model's dtype, rounded
where the modules of transformers round.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["ALIKE", "FULL", "LOW_RANK", "attend", "gather", "join", "mlp", "project"]

_jit: Any = triton.jit

#: What a gate's inner vector is: its logit, A·u, or u itself.
ALIKE, LOW_RANK, FULL = 0, 1, 2


@_jit
def _decide(
    x, score_w, shift, eps, tau, tau_stride,
    H: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(1 / rms(h), keep) of every row, [BP]."""
    row = tl.arange(0, BP)
    square = tl.zeros([BP], dtype=tl.float32)
    total = tl.zeros([BP], dtype=tl.float32)
    for start in range(0, H, BK):
        col = start + tl.arange(0, BK)
        there = (row < B)[:, None] & (col < H)[None, :]
        h = tl.load(x + row[:, None] * H + col[None, :], mask=there, other=0.0).to(tl.float32)
        w = tl.load(score_w + col, mask=col < H, other=0.0)
        square += tl.sum(h * h, 1)
        total += tl.sum(h * w[None, :], 1)
    inverse = 1.0 / tl.sqrt(square / H + eps)
    threshold = tl.load(tau + row * tau_stride, mask=row < B, other=float("inf"))
    return inverse, (total * inverse + shift >= threshold) & (row < B)


@_jit
def _normed(
    x, gamma, inverse, col, H: tl.constexpr, B: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """u = γ · round(h / rms(h)) at columns, [BP, columns], in the stream's dtype."""
    row = tl.arange(0, BP)
    there = (row < B)[:, None] & (col < H)[None, :]
    h = tl.load(x + row[:, None] * H + col[None, :], mask=there, other=0.0)
    g = tl.load(gamma + col, mask=col < H, other=0.0).to(tl.float32)
    rounded = (h.to(tl.float32) * inverse[:, None]).to(h.dtype).to(tl.float32)
    return (rounded * g[None, :]).to(h.dtype)


@_jit
def _add_product(total, values, w, BP: tl.constexpr):
    """Add values [BP, BK] times rows w [BN, BK]; sums over BK are put off where BP is 1."""
    if BP == 1:
        total += w.to(tl.float32) * values.to(tl.float32)
    else:
        total += tl.dot(values.to(w.dtype), tl.trans(w), input_precision="ieee")
    return total


@_jit
def _begin(BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    if BP == 1:
        total = tl.zeros([BN, BK], dtype=tl.float32)
    else:
        total = tl.zeros([BP, BN], dtype=tl.float32)
    return total


@_jit
def _end(total, BP: tl.constexpr):
    if BP == 1:
        result = tl.sum(total, 1)[None, :]
    else:
        result = total
    return result


@_jit
def _weight(w, n, col, N: tl.constexpr, K: tl.constexpr):
    there = (n < N)[:, None] & (col < K)[None, :]
    return tl.load(w + n.to(tl.int64)[:, None] * K + col[None, :], mask=there, other=0.0)


@_jit
def _normed_product(
    x, gamma, inverse, w, n,
    N: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """u · w[n]ᵀ, float32 [BP, BN]."""
    total = _begin(BP, BN, BK)
    for start in range(0, H, BK):
        col = start + tl.arange(0, BK)
        u = _normed(x, gamma, inverse, col, H, B, BP)
        total = _add_product(total, u, _weight(w, n, col, N, H), BP)
    return _end(total, BP)


@_jit
def _product(
    values, w, n,
    N: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """values [B, K] · w[n]ᵀ, float32 [BP, BN]."""
    row = tl.arange(0, BP)
    total = _begin(BP, BN, BK)
    for start in range(0, K, BK):
        col = start + tl.arange(0, BK)
        there = (row < B)[:, None] & (col < K)[None, :]
        given = tl.load(values + row[:, None] * K + col[None, :], mask=there, other=0.0)
        total = _add_product(total, given, _weight(w, n, col, N, K), BP)
    return _end(total, BP)


@_jit
def _store(out, value, n, N: tl.constexpr, stride: tl.constexpr, B: tl.constexpr, BP: tl.constexpr):
    row = tl.arange(0, BP)
    there = (row < B)[:, None] & (n < N)[None, :]
    place = out + row[:, None] * stride + n[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=there)


@_jit
def _inner(
    block, x, gamma, inverse, some, every, gate_w, gate_shift, comp_w, inner, comp_inner,
    GATE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The first product of gate (kept rows) and compensation (skipped ones), 16 rows a block."""
    GB: tl.constexpr = (R + 15) // 16
    if block < GB:
        if some:
            n = block * 16 + tl.arange(0, 16)
            if GATE == 2:
                _store(inner, _normed(x, gamma, inverse, n, H, B, BP), n, H, H, B, BP)
            else:
                z = _normed_product(x, gamma, inverse, gate_w, n, R, H, B, BP, 16, BK)
                _store(inner, z + gate_shift, n, R, R, B, BP)
    elif C > 0:
        if not every:
            n = (block - GB) * 16 + tl.arange(0, 16)
            c = _normed_product(x, gamma, inverse, comp_w, n, C, H, B, BP, 16, BK)
            _store(comp_inner, c, n, C, C, B, BP)


@_jit
def _rows(out, bias, value, n, N: tl.constexpr, stride: tl.constexpr, B: tl.constexpr,
          BP: tl.constexpr):  # fmt: skip
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    _store(out, value, n, N, stride, B, BP)


@_jit
def project(
    x, gamma, score_w, shift, eps, tau, tau_stride, flags,
    wq, bq, wk, bk, wv, bv, q, kv,
    gate_w, gate_shift, comp_w, inner, comp_inner,
    BLOCKS, NQ: tl.constexpr, NK: tl.constexpr,
    GATE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Decision of an attention; keys and values of all rows, queries where any row is kept."""
    pid = tl.program_id(0)
    inverse, keep = _decide(x, score_w, shift, eps, tau, tau_stride, H, B, BP, BK)
    row = tl.arange(0, BP)
    kept = tl.sum(keep.to(tl.int32), 0)
    if pid == 0:
        tl.store(flags + row, keep.to(tl.int32), mask=row < B)
    QB: tl.constexpr = (NQ + BN - 1) // BN
    KB: tl.constexpr = (NK + BN - 1) // BN
    # A few programs for many blocks: a decision costs as much as a block.
    for block in range(pid, BLOCKS, tl.num_programs(0)):
        if block < QB:
            if kept > 0:
                n = block * BN + tl.arange(0, BN)
                value = _normed_product(x, gamma, inverse, wq, n, NQ, H, B, BP, BN, BK)
                _rows(q, bq, value, n, NQ, NQ, B, BP)
        elif block < QB + KB:
            n = (block - QB) * BN + tl.arange(0, BN)
            value = _normed_product(x, gamma, inverse, wk, n, NK, H, B, BP, BN, BK)
            _rows(kv, bk, value, n, NK, 2 * NK, B, BP)
        elif block < QB + 2 * KB:
            n = (block - QB - KB) * BN + tl.arange(0, BN)
            value = _normed_product(x, gamma, inverse, wv, n, NK, H, B, BP, BN, BK)
            _rows(kv + NK, bv, value, n, NK, 2 * NK, B, BP)
        else:
            _inner(
                block - QB - 2 * KB, x, gamma, inverse, kept > 0, kept == B,
                gate_w, gate_shift, comp_w, inner, comp_inner, GATE, R, C, H, B, BP, BK,
            )  # fmt: skip


@_jit
def _turned(at, norm, norm_eps, cos, sin, live, D: tl.constexpr, DP: tl.constexpr):
    """Heads at ``at`` [heads, 1], normed, turned by halves: [heads, DP], rounded as there."""
    d = tl.arange(0, DP)[None, :]
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    there = live & (d < D)
    a = tl.load(at + d, mask=there, other=0.0)
    b = tl.load(at + other, mask=there, other=0.0)
    dtype = a.dtype
    if norm is not None:
        square = tl.sum(a.to(tl.float32) * a.to(tl.float32), 1) / D
        inverse = (1.0 / tl.sqrt(square + norm_eps))[:, None]
        wa = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        wb = tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32)
        a = ((a.to(tl.float32) * inverse).to(dtype).to(tl.float32) * wa).to(dtype)
        b = ((b.to(tl.float32) * inverse).to(dtype).to(tl.float32) * wb).to(dtype)
    c = tl.load(cos + d, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=d < D, other=0.0).to(tl.float32)
    turned = tl.where(d < half, -b.to(tl.float32), b.to(tl.float32))
    left = (a.to(tl.float32) * c).to(dtype).to(tl.float32)
    return (left + (turned * s).to(dtype).to(tl.float32)).to(dtype)


@_jit
def attend(
    q, kv, flags, cos, sin, table_stride, q_norm, k_norm, norm_eps,
    keys, values, row_stride, head_stride, key_stride, length_at, mask, mask_stride,
    partial, sums, scale,
    A: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    SPLITS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Write the new key and value; a share of the cached keys for one row and key/value head.

    partial: float32 [B, A, SPLITS, D], not divided by sums [B, A, SPLITS, 2] (maximum, sum).
    """
    row, head, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    d = tl.arange(0, DP)[None, :]
    length = tl.load(length_at)
    place = row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    at = kv + row * 2 * K * D + head * D
    table = row * table_stride
    keep = tl.load(flags + row)
    k_new = _turned(at, k_norm, norm_eps, cos + table, sin + table, d >= 0, D, DP)
    v_new = tl.load(at + K * D + d, mask=d < D, other=0.0)
    if split == 0:
        tl.store(keys + place + length * key_stride + d, k_new, mask=d < D)
        tl.store(values + place + length * key_stride + d, v_new, mask=d < D)
    if keep != 0:
        G: tl.constexpr = A // K
        g = tl.arange(0, GP)
        live = (g < G)[:, None]
        at_q = q + row * A * D + (head * G + g)[:, None] * D
        query = _turned(at_q, q_norm, norm_eps, cos + table, sin + table, live & (d >= 0), D, DP)
        share = (length + SPLITS - 1) // SPLITS
        begin = split * share
        end = tl.minimum(begin + share, length)
        top = tl.full([GP], float("-inf"), dtype=tl.float32)
        total = tl.zeros([GP], dtype=tl.float32)
        gathered = tl.zeros([GP, DP], dtype=tl.float32)
        if split == 0:
            top = tl.sum(query.to(tl.float32) * k_new.to(tl.float32), 1) * scale
            if mask is not None:
                top += tl.load(mask + row * mask_stride + length)
            total = tl.full([GP], 1.0, dtype=tl.float32)
            gathered += v_new.to(tl.float32)
        for start in range(begin, end, BS):
            s = start + tl.arange(0, BS)
            seen = s < end
            there = seen[:, None] & (d < D)
            k = tl.load(keys + place + s[:, None] * key_stride + d, mask=there, other=0.0)
            v = tl.load(values + place + s[:, None] * key_stride + d, mask=there, other=0.0)
            score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if mask is not None:
                addend = tl.load(mask + row * mask_stride + s, mask=seen, other=0.0)
                score += addend[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            p = tl.exp(score - higher[:, None])
            fade = tl.exp(top - higher)
            total = total * fade + tl.sum(p, 1)
            more = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            gathered = gathered * fade[:, None] + more
            top = higher
        cell = (row * A + head * G + g) * SPLITS + split
        tl.store(partial + cell[:, None] * D + d, gathered, mask=live & (d < D))
        tl.store(sums + cell * 2, top, mask=g < G)
        tl.store(sums + cell * 2 + 1, total, mask=g < G)


@_jit
def gather(
    flags, partial, sums, attended,
    A: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the shares of the keys of one row and head: attended [B, A·D]."""
    cell = tl.program_id(0)
    keep = tl.load(flags + cell // A)
    if keep != 0:
        s = tl.arange(0, SPLITS)
        d = tl.arange(0, DP)
        top = tl.load(sums + (cell * SPLITS + s) * 2)
        weight = tl.exp(top - tl.max(top, 0))
        total = tl.sum(weight * tl.load(sums + (cell * SPLITS + s) * 2 + 1), 0)
        at = partial + (cell * SPLITS + s)[:, None] * D + d[None, :]
        share = tl.load(at, mask=(d < D)[None, :], other=0.0)
        out = tl.sum(share * weight[:, None], 0) / total
        tl.store(attended + cell * D + d, out.to(attended.dtype.element_ty), mask=d < D)


@_jit
def _join(
    x, n, kept, keep, o, gate_b, gate_c, comp_b, comp_c, inner, comp_inner,
    GATE: tl.constexpr, R: tl.constexpr, RK: tl.constexpr, C: tl.constexpr, CK: tl.constexpr,
    H: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h + g ⊙ o where a row is kept, h + compensation where not, in place."""
    row = tl.arange(0, BP)
    there = (row < B)[:, None] & (n < H)[None, :]
    h = tl.load(x + row[:, None] * H + n[None, :], mask=there, other=0.0)
    added = tl.zeros([BP, BN], dtype=tl.float32)
    if kept > 0:
        if GATE == 0:
            z = tl.load(inner + row, mask=row < B, other=0.0)[:, None]
        else:
            z = _product(inner, gate_b, n, H, R, B, BP, BN, RK)
            z += tl.load(gate_c + n, mask=n < H, other=0.0)[None, :]
        added = tl.where(keep[:, None], o.to(h.dtype).to(tl.float32) / (1.0 + tl.exp(-z)), 0.0)
    if comp_c is not None:
        if kept < B:
            c = tl.load(comp_c + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
            if C > 0:
                c += _product(comp_inner, comp_b, n, H, C, B, BP, BN, CK)
            added = tl.where(keep[:, None], added, c.to(h.dtype).to(tl.float32))
    result = (h.to(tl.float32) + added).to(h.dtype)
    tl.store(x + row[:, None] * H + n[None, :], result, mask=there)


@_jit
def _swiglu(
    x, gamma, inverse, wg, wu, act, n,
    I: tl.constexpr,  # noqa: E741
    H: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """silu(u · wg[n]ᵀ) · (u · wu[n]ᵀ), stored."""
    gates, ups = _begin(BP, BN, BK), _begin(BP, BN, BK)
    for start in range(0, H, BK):
        col = start + tl.arange(0, BK)
        u = _normed(x, gamma, inverse, col, H, B, BP)
        gates = _add_product(gates, u, _weight(wg, n, col, I, H), BP)
        ups = _add_product(ups, u, _weight(wu, n, col, I, H), BP)
    dtype = x.dtype.element_ty
    g = _end(gates, BP).to(dtype).to(tl.float32)
    up = _end(ups, BP).to(dtype).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    _store(act, silu * up, n, I, I, B, BP)


@_jit
def mlp(
    x, gamma, score_w, shift, eps, tau, tau_stride, flags, wg, wu, act,
    gate_w, gate_shift, comp_w, inner, comp_inner,
    BLOCKS, I: tl.constexpr,  # noqa: E741
    GATE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, B: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Decision of an MLP; silu(gate) · up where any row is kept."""
    pid = tl.program_id(0)
    inverse, keep = _decide(x, score_w, shift, eps, tau, tau_stride, H, B, BP, BK)
    row = tl.arange(0, BP)
    kept = tl.sum(keep.to(tl.int32), 0)
    if pid == 0:
        tl.store(flags + row, keep.to(tl.int32), mask=row < B)
    IB: tl.constexpr = (I + BN - 1) // BN
    for block in range(pid, BLOCKS, tl.num_programs(0)):
        if block < IB:
            if kept > 0:
                n = block * BN + tl.arange(0, BN)
                _swiglu(x, gamma, inverse, wg, wu, act, n, I, H, B, BP, BN, BK)
        else:
            _inner(
                block - IB, x, gamma, inverse, kept > 0, kept == B,
                gate_w, gate_shift, comp_w, inner, comp_inner, GATE, R, C, H, B, BP, BK,
            )  # fmt: skip


@_jit
def join(
    x, flags, values, w, bias, gate_b, gate_c, comp_b, comp_c, inner, comp_inner,
    I: tl.constexpr,  # noqa: E741
    GATE: tl.constexpr, R: tl.constexpr, RK: tl.constexpr, C: tl.constexpr, CK: tl.constexpr,
    H: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The last projection of kept rows, the compensation of skipped ones."""
    row = tl.arange(0, BP)
    keep = tl.load(flags + row, mask=row < B, other=0) != 0
    kept = tl.sum(keep.to(tl.int32), 0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    o = tl.zeros([BP, BN], dtype=tl.float32)
    if kept > 0:
        o = _product(values, w, n, H, I, B, BP, BN, BK)
        if bias is not None:
            o += tl.load(bias + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
    _join(
        x, n, kept, keep, o, gate_b, gate_c, comp_b, comp_c, inner, comp_inner,
        GATE, R, RK, C, CK, H, B, BP, BN,
    )  # fmt: skip
