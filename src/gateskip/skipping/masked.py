"""The reference: everything is computed, skipped outputs are dropped.

Shapes: B rows, T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip.gates import Gate
from gateskip.skipping.compensation import Compensation
from gateskip.skipping.join import join

__all__ = ["masked_join"]


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
