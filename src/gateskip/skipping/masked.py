"""The reference: everything is computed, skipped outputs are dropped.

Shapes: B rows, T tokens, H hidden, G gate channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gateskip.gates import Gate
from gateskip.skipping.compensation import Compensation

__all__ = ["join", "masked_join"]


def join(h_BTH: Tensor, o_BTH: Tensor, u_BTH: Tensor, gate: Gate) -> Tensor:
    """h + g(u) ⊙ o with the product and the sum in float32, rounded once to h's dtype."""
    if u_BTH.numel() == u_BTH.shape[-1] and not torch.is_grad_enabled():
        alike = gate.one_logit()
        if alike is not None and u_BTH.device.type == "cpu":
            # One token, one value: a single kernel, whose arithmetic is float32 inside.
            z = float(torch.dot(u_BTH.reshape(-1).float(), alike[0])) + alike[1]
            return torch.add(h_BTH, o_BTH, alpha=1.0 / (1.0 + math.exp(min(-z, 700.0))))
    g = gate(u_BTH.detach())
    if h_BTH.dtype == torch.float32:
        return h_BTH + g * o_BTH
    if torch.is_grad_enabled():
        return (h_BTH.float() + g * o_BTH.float()).to(h_BTH.dtype)
    # Explicit conversions: PyTorch's mixed-dtype products on a CPU are five times slower.
    return o_BTH.float().mul_(g).add_(h_BTH.float()).to(h_BTH.dtype)


def masked_join(
    h_BTH: Tensor,
    o_BTH: Tensor,
    u_BTH: Tensor,
    gate: Gate,
    keep_BT: Tensor,
    valid_BT: Tensor,
    compensation: Compensation | None,
) -> Tensor:
    """h' = h + keep · g ⊙ o + (1 − keep) · compensation(u), valid tokens only.

    Tokens of padding keep h. The reference for every other execution.
    """
    kept = join(h_BTH, o_BTH, u_BTH, gate)
    skipped = h_BTH if compensation is None else h_BTH + compensation(u_BTH)
    skipped = torch.where(valid_BT[..., None], skipped, h_BTH)
    return torch.where(keep_BT[..., None], kept, skipped)
