"""The reference: everything is computed, skipped outputs are dropped.

Shapes: B rows, T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gateskip.skipping.compensation import Compensation

__all__ = ["masked_join"]


def masked_join(
    h_BTH: Tensor,
    kept_BTH: Tensor,
    u_BTH: Tensor,
    keep_BT: Tensor,
    valid_BT: Tensor,
    compensation: Compensation | None,
) -> Tensor:
    """h' = keep · (h + g ⊙ o) + (1 − keep) · (h + compensation(u)), valid tokens only.

    Tokens of padding keep h. The reference for every other execution.

    Args:
        kept_BTH: h + g ⊙ o of every token.
    """
    skipped = h_BTH if compensation is None else h_BTH + compensation(u_BTH)
    skipped = torch.where(valid_BT[..., None], skipped, h_BTH)
    return torch.where(keep_BT[..., None], kept_BTH, skipped)
