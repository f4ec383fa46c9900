"""Row kernels of prefill on a GPU: score, normalise, join, add; each one pass over its rows.

The functions are those of :mod:`~gateskip.kernels.rows`. With torch operations a branch that skips
is thirty launches around its matrix products, and the host that waits for every branch's decision
cannot launch ahead: these are four.

Shapes: N rows of a flat stream, M selected rows, H hidden, G gate channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_rows_", "join_rows", "norm_rows", "score_rows"]

_jit: Any = triton.jit

BLOCK = 4096  # columns of a row at a time
#: Where the gate's logit comes from: a score, w·u, or a logit per channel.
SCORED, ONE, EACH = 0, 1, 2


@_jit
def _score(h, w, score, inverses, shift, eps, H: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros([BK], dtype=tl.float32)
    total = tl.zeros([BK], dtype=tl.float32)
    for start in range(0, H, BK):
        col = start + tl.arange(0, BK)
        x = tl.load(h + row * H + col, mask=col < H, other=0.0).to(tl.float32)
        square += x * x
        total += x * tl.load(w + col, mask=col < H, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(square, 0) / H + eps)
    tl.store(score + row, tl.sum(total, 0) * inverse + shift)
    tl.store(inverses + row, inverse)


@_jit
def _norm(h, inverses, gamma, u, index, H: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = row
    if index is not None:
        source = tl.load(index + row)
    inverse = tl.load(inverses + source)
    for start in range(0, H, BK):
        col = start + tl.arange(0, BK)
        x = tl.load(h + source * H + col, mask=col < H, other=0.0)
        g = tl.load(gamma + col, mask=col < H, other=0.0).to(tl.float32)
        # As the families' norms round: once before the weight, once after it.
        x = (x.to(tl.float32) * inverse).to(x.dtype).to(tl.float32)
        tl.store(u + row * H + col, (x * g).to(u.dtype.element_ty), mask=col < H)


@_jit
def _join(
    out, h, o, index, u, w, shift, logits, score, scale,
    MODE: tl.constexpr, H: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = row
    if index is not None:
        target = tl.load(index + row)
    z = shift
    if MODE == 0:
        z = tl.load(score + target) * scale + shift
    if MODE == 1:
        total = tl.zeros([BK], dtype=tl.float32)
        for start in range(0, H, BK):
            col = start + tl.arange(0, BK)
            x = tl.load(u + row * H + col, mask=col < H, other=0.0).to(tl.float32)
            total += x * tl.load(w + col, mask=col < H, other=0.0)
        z = tl.sum(total, 0) + shift
    for start in range(0, H, BK):
        col = start + tl.arange(0, BK)
        if MODE == 2:
            each = tl.load(logits + row * H + col, mask=col < H, other=0.0)
            gate = 1.0 / (1.0 + tl.exp(-each))
        else:
            gate = 1.0 / (1.0 + tl.exp(-z))
        add = gate * tl.load(o + row * H + col, mask=col < H, other=0.0).to(tl.float32)
        x = tl.load(h + target * H + col, mask=col < H, other=0.0).to(tl.float32)
        tl.store(out + target * H + col, (x + add).to(out.dtype.element_ty), mask=col < H)


@_jit
def _add(out, c, bias, index, H: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(index + row)
    for start in range(0, H, BK):
        col = start + tl.arange(0, BK)
        added = tl.load(bias + col, mask=col < H, other=0.0).to(tl.float32)
        if c is not None:
            added += tl.load(c + row * H + col, mask=col < H, other=0.0).to(tl.float32)
        x = tl.load(out + target * H + col, mask=col < H, other=0.0).to(tl.float32)
        tl.store(out + target * H + col, (x + added).to(out.dtype.element_ty), mask=col < H)


def _sizes(hidden: int) -> dict[str, int]:
    return {"H": hidden, "BK": min(triton.next_power_of_2(hidden), BLOCK)}


def score_rows(h_NH: Tensor, w_H: Tensor, shift: float, eps: float) -> tuple[Tensor, Tensor]:
    """(w·h / rms(h) + shift, 1 / rms(h)) of every row, float32 ``[N]`` each.

    Args:
        h_NH: bfloat16 or float32. w_H: float32, the norm's weight multiplied in.
    """
    n, hidden = h_NH.shape
    score_N, inverse_N = torch.empty(2, n, dtype=torch.float32, device=h_NH.device).unbind()
    if n:
        _score[(n,)](h_NH, w_H, score_N, inverse_N, shift, eps, **_sizes(hidden))
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
    if rows > m:
        u_MH[m:].zero_()
    if m:
        _norm[(m,)](h_NH, inverse_N, gamma_H, u_MH, index_M, **_sizes(h_NH.shape[1]))
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
    m, hidden = o_MH.shape
    u = w = score = None
    shift = scale = 0.0
    mode = EACH
    if scored is not None:
        mode, (score, scale, shift) = SCORED, scored
    elif one is not None:
        mode, (u, w, shift) = ONE, one
    if m:
        _join[(m,)](
            out_NH, h_NH, o_MH, index_M, u, w, shift, logits_MH, score, scale,
            MODE=mode, **_sizes(hidden),
        )  # fmt: skip


def add_rows_(out_NH: Tensor, c_MH: Tensor | None, bias_H: Tensor, index_M: Tensor) -> None:
    """out[index] += c + bias, in place; all of one dtype, c contiguous or None for 0."""
    m = index_M.shape[0]
    if m:
        _add[(m,)](out_NH, c_MH, bias_H, index_M, **_sizes(out_NH.shape[1]))
