"""Where a branch re-enters the residual stream: h + g(u) ⊙ o.

Shapes: B rows, T tokens, N flat tokens, M selected ones, H hidden. The product and the sum are
float32, rounded once to the stream's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip import kernels
from gateskip.gates import Gate

__all__ = ["gate_value", "join", "join_at", "scale"]


def scale(x: Tensor, u: Tensor, gate: Gate) -> Tensor:
    """g(u) ⊙ x, same shape and dtype as x: a branch's input where the gate acts before it."""
    return (gate_value(gate, u) * x.float()).to(x.dtype)


def gate_value(gate: Gate, u: Tensor) -> Tensor:
    """g(u), float32 ``[..., H]`` or ``[..., 1]``."""
    g: Tensor = gate(u.detach() if gate.detach_input else u)
    return g


def join(
    h_BTH: Tensor, o_BTH: Tensor, u_BTH: Tensor, gate: Gate, score_N: Tensor | None = None
) -> Tensor:
    """h + g(u) ⊙ o of every token, same shape and dtype as h.

    Args:
        score_N: mean-logit scores of all tokens, float32, where they are known: the kernels then
            need not read u again.
    """
    if _fused(h_BTH, o_BTH, u_BTH):
        out = torch.empty_like(h_BTH)
        width = h_BTH.shape[-1]
        _join_fused(
            out.view(-1, width), h_BTH.view(-1, width), o_BTH.view(-1, width),
            u_BTH.view(-1, width), gate, None, score_N,
        )  # fmt: skip
        return out
    g = gate_value(gate, u_BTH)
    if h_BTH.dtype == torch.float32:
        return h_BTH + g * o_BTH
    if torch.is_grad_enabled():
        return (h_BTH.float() + g * o_BTH.float()).to(h_BTH.dtype)
    # Explicit conversions: PyTorch's mixed-dtype products on a CPU are five times slower.
    return o_BTH.float().mul_(g).add_(h_BTH.float()).to(h_BTH.dtype)


def join_at(
    out_NH: Tensor, h_NH: Tensor, o_MH: Tensor, u_MH: Tensor, gate: Gate, index_M: Tensor,
    score_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``out`` with rows ``index_M`` set to h + g(u) ⊙ o, in place where no graph is recorded.

    Args:
        out_NH: a copy of h, or h itself where nobody else holds it. score_N: as in :func:`join`.
    """
    if _fused(h_NH, o_MH, u_MH) and out_NH.is_contiguous():
        _join_fused(out_NH, h_NH, o_MH, u_MH, gate, index_M, score_N)
        return out_NH
    return out_NH.index_copy_(0, index_M, join(h_NH.index_select(0, index_M), o_MH, u_MH, gate))


def _fused(h: Tensor, o: Tensor, u: Tensor) -> bool:
    return kernels.row_kernels(h) is not None and all(
        t.dtype == h.dtype and t.is_contiguous() and type(t) is Tensor for t in (o, u)
    )


def _join_fused(
    out_NH: Tensor, h_NH: Tensor, o_MH: Tensor, u_MH: Tensor, gate: Gate, index_M: Tensor | None,
    score_N: Tensor | None,
) -> None:  # fmt: skip
    join_rows = kernels.row_kernels(h_NH).join_rows
    alike = gate.one_logit()
    affine = gate.score_affine()
    if alike is not None and score_N is not None and affine is not None:
        join_rows(out_NH, h_NH, o_MH, index_M, scored=(score_N, *affine))
        return
    if alike is not None:
        join_rows(out_NH, h_NH, o_MH, index_M, one=(u_MH, *alike))
        return
    z_MG = gate.logits(u_MH.float())
    join_rows(out_NH, h_NH, o_MH, index_M, logits_MH=z_MG.contiguous())
