r"""Scores: the scalar that ranks a token at a branch.

Shapes: B rows, T tokens, H hidden.

For an RMS-normalised input u = γ ⊙ h / rms(h) the mean-logit score is
s = (w ⊙ γ)·h / rms(h) + b: one dot product and one norm of the residual, so a skipped token's
normalised input need not exist. Masked and compacted execution share this function, hence decide
alike.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from gateskip import kernels
from gateskip.config import BranchKey
from gateskip.gates import Gate, no_autocast

__all__ = ["branch_score", "normed_at", "random_score", "scaled_vector", "single_score"]


def branch_score(
    h_BTH: Tensor, norm: nn.Module, eps: float, gate: Gate, importance: str
) -> tuple[Tensor, Tensor | None]:
    """(scores [B, T], 1 / rms(h) [B·T] where the kernels found it), float32.

    Gradients reach the gate only (its input is detached).

    Args:
        h_BTH: residual stream before the branch's norm.
        norm: the branch's RMS norm, with ``weight``.
        eps: the norm's epsilon.
        gate: the branch's gate.
        importance: ``"mean_logit"`` or ``"mean_gate"``.
    """
    if importance == "mean_gate":
        with torch.no_grad():
            u_BTH = norm(h_BTH)
        return gate(u_BTH.detach()).mean(-1), None
    if torch.is_grad_enabled():
        w_H, b = gate.decision_weights()
        return _linear_score(h_BTH, eps, w_H * norm.weight.detach().float(), b), None  # type: ignore[operator]
    vector_H, shift = scaled_vector(gate, norm)
    if not kernels.supported(h_BTH):
        return _linear_score(h_BTH, eps, vector_H, shift), None
    from gateskip.kernels.rows import score_rows

    score_N, inverse_N = score_rows(h_BTH.view(-1, h_BTH.shape[-1]), vector_H, shift, eps)
    return score_N.view(h_BTH.shape[:-1]), inverse_N


def scaled_vector(gate: Gate, norm: nn.Module) -> tuple[Tensor, float]:
    """(decision vector times the norm's weight [H] float32, decision bias), cached."""
    w_H, b = gate.decision_vector()
    weight = cast(Tensor, norm.weight)
    stamp = (w_H.data_ptr(), weight.data_ptr(), weight._version)
    cached = vars(gate).get("_scaled")
    if gate.training or cached is None or cached[0] != stamp:
        # The decision vector is kept alive here, so its address cannot be given to another.
        cached = (stamp, (w_H * weight.detach().float()).contiguous(), w_H)
        vars(gate)["_scaled"] = cached
    return cached[1], b


def normed_at(
    h_NH: Tensor, norm: nn.Module, inverse_N: Tensor | None, index_M: Tensor | None, rows: int
) -> Tensor:
    """The branch's input u = norm(h) at rows ``index_M`` (None: all), ``[rows, H]``.

    Args:
        inverse_N: 1 / rms(h) from :func:`branch_score`, saves reading the rows twice.
        rows: at least M; rows from M on are zero.
    """
    weight = cast(Tensor, norm.weight)
    hooked = norm._forward_hooks or norm._forward_pre_hooks
    fused = inverse_N is not None and not hooked and kernels.supported(h_NH)
    if fused and kernels.supported(weight.detach()) and weight.dtype == h_NH.dtype:
        from gateskip.kernels.rows import norm_rows

        assert inverse_N is not None
        return norm_rows(h_NH, inverse_N, weight, index_M, rows)
    u_MH: Tensor = norm(h_NH if index_M is None else h_NH.index_select(0, index_M))
    more = rows - u_MH.shape[0]
    return nn.functional.pad(u_MH, (0, 0, 0, more)) if more else u_MH


def random_score(place_BT: Tensor, key: BranchKey, seed: int) -> Tensor:
    """A score in [0, 1) that knows nothing of the token: a hash of its place and the branch.

    The same in prefill and decoding, alone or in a batch, so it is a null in every execution.

    Args:
        place_BT: the token's place among the valid ones of its sequence, int64 ``[B, T]``.
    """
    salt = (seed * 2 + (key[1] == "mlp")) * 1_000_003 + key[0] * 7_919
    x = (place_BT + salt) & 0x7FFFFFFF
    for factor in (0x45D9F3B, 0x119DE1F3):  # multiply-xorshift rounds on 31 bits
        x = ((x ^ (x >> 16)) * factor) & 0x7FFFFFFF
    x = x ^ (x >> 16)
    return (x & 0xFFFFFF).float() / float(1 << 24)


def _linear_score(h_BTH: Tensor, eps: float, scaled_H: Tensor, b: Tensor | float) -> Tensor:
    with no_autocast(h_BTH):
        h = h_BTH.detach().float()
        rms = torch.linalg.vector_norm(h, dim=-1).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
        return torch.matmul(h, scaled_H) * rms + b


def single_score(h_H: Tensor, w_H: Tensor, b: float, eps: float) -> float:
    """The mean-logit score of one token, as a float (CPU decoding at batch 1).

    Args:
        h_H: residual of the token, ``[H]``.
        w_H: decision vector times the norm's weight, float32.
        b: decision bias.
        eps: the norm's epsilon.
    """
    with no_autocast(h_H):
        h = h_H.float()
        square, product = float(torch.dot(h, h)), float(torch.dot(h, w_H))
    return product / (square / h.shape[0] + eps) ** 0.5 + b
