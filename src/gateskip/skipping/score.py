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

from gateskip.gates import Gate

__all__ = ["branch_score"]


def branch_score(h_BTH: Tensor, norm: nn.Module, eps: float, gate: Gate, importance: str) -> Tensor:
    """Scores, float32 ``[B, T]``; gradients reach the gate only (its input is detached).

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
        return gate(u_BTH.detach()).mean(-1)
    if torch.is_grad_enabled():
        w_H, b = gate.decision_weights()
        return _linear_score(h_BTH, norm, eps, w_H, b)
    vector_H, shift = gate.decision_vector()
    return _linear_score(h_BTH, norm, eps, vector_H, shift)


def _linear_score(
    h_BTH: Tensor, norm: nn.Module, eps: float, w_H: Tensor, b: Tensor | float
) -> Tensor:
    h = h_BTH.detach().float()
    gamma = cast(Tensor, norm.weight)
    rms = torch.linalg.vector_norm(h, dim=-1).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    return torch.matmul(h, w_H * gamma.detach().float()) * rms + b


def single_score(h_H: Tensor, w_H: Tensor, b: float, eps: float) -> float:
    """The mean-logit score of one token, as a float (CPU decoding at batch 1).

    Args:
        h_H: residual of the token, ``[H]``.
        w_H: decision vector times the norm's weight, float32.
        b: decision bias.
        eps: the norm's epsilon.
    """
    h = h_H.float()
    square = float(torch.dot(h, h))
    return float(torch.dot(h, w_H)) / (square / h.shape[0] + eps) ** 0.5 + b
